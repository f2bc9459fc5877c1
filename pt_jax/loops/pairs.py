"""From scored completions to what a preference update compares: the host's part.

B completions of several prompts, N pairs of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pt_jax.data import packing
from pt_jax.data.batch import ComparisonBatch
from pt_jax.data.groups import MISMATCHED, Group, group_length, pack_groups
from pt_jax.data.packing import Example
from pt_jax.experiment import Pairing
from pt_jax.loops.rollouts import Judged


class Pairs(NamedTuple):
  """Completions of one prompt, the first with the higher score."""

  chosen: np.ndarray  # [N] int, index of the completion
  rejected: np.ndarray  # [N] int
  weights: np.ndarray  # [N] float32, those of one prompt add up to 1


def separable(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """[B] bool: whether the prompt of a completion has two different scores."""
  _, group = np.unique(groups, return_inverse=True)
  low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
  np.minimum.at(low, group, scores)
  np.maximum.at(high, group, scores)
  return (low < high)[group]


def pair_up(
  scores: np.ndarray, groups: np.ndarray, pairing: Pairing, rng: np.random.Generator
) -> Pairs:
  """The pairs of each prompt that has different scores, prompts in their order.

  Args:
    scores: [B], higher is better.
    groups: [B] int, number of the prompt.
    pairing: `best_worst` takes one pair, random ones among equals; `random` any one with different
      scores; `all` every one of those.
    rng: for the draws.
  """
  chosen: list[np.ndarray] = []
  rejected: list[np.ndarray] = []
  weights: list[np.ndarray] = []
  for group in np.unique(groups):
    members = rng.permutation(np.flatnonzero(groups == group))
    better, worse = np.nonzero(scores[members][:, None] > scores[members][None])
    if not len(better):
      continue
    if pairing == "best_worst":
      better, worse = [scores[members].argmax()], [scores[members].argmin()]
    elif pairing == "random":
      pick = rng.integers(len(better))
      better, worse = better[pick : pick + 1], worse[pick : pick + 1]
    chosen.append(members[better])
    rejected.append(members[worse])
    weights.append(np.full(len(better), 1 / len(better), np.float32))
  none = [np.zeros(0, int)]
  join = lambda parts: np.concatenate(parts or none)
  return Pairs(join(chosen), join(rejected), join(weights).astype(np.float32))


def pair_groups(judged: Judged, pairs: Pairs) -> list[Group]:
  """Each pair as a group. Its `references` are the log-probs that the sampler reported."""
  return [
    Group(
      completions=(_example(judged, c), _example(judged, j)),
      labels=(1.0, 0.0),
      weight=float(weight),
      references=(_sampled(judged, c), _sampled(judged, j)),
    )
    for c, j, weight in zip(*pairs)
  ]


def single_groups(judged: Judged, right: np.ndarray, *, mismatched: bool) -> list[Group]:
  """Each completion with its label as a group; `references` as in `pair_groups`.

  Args:
    judged: of at least two prompts if `mismatched`.
    right: [B] bool.
    mismatched: behind each completion stands one of the next prompt in its place, which tells how
      far the policy has moved (arXiv 2402.01306, section 4.1).
  """
  groups = []
  _, index, counts = np.unique(judged.groups, return_inverse=True, return_counts=True)
  first = np.cumsum(counts) - counts
  for i, is_right in enumerate(right):
    completions, labels = [_example(judged, i)], [float(is_right)]
    references = [_sampled(judged, i)]
    if mismatched:
      following = (index[i] + 1) % len(counts)
      other = first[following] + (i - first[index[i]]) % counts[following]
      completions.append(_example(judged, i, answer_of=int(other)))
      labels.append(MISMATCHED)
      references.append(np.zeros(len(completions[-1].tokens), np.float32))
    groups.append(Group(tuple(completions), tuple(labels), references=tuple(references)))
  return groups


def pack_comparisons(groups: Sequence[Group], rows: int, row_length: int) -> ComparisonBatch:
  """Packs groups into a batch of [A, rows, row_length] NumPy arrays.

  A is enough for groups that fill a row each (`packing.microbatches_for`); the microbatches behind
  hold nothing.
  """
  whole = rows * packing.microbatches_for(len(groups), rows)
  plan = packing.pack([group_length(g) for g in groups], row_length, rows=whole)
  batch = pack_groups(groups, plan)
  return jax.tree.map(lambda x: x.reshape(-1, rows, row_length), batch)


def pair_rows(judged: Judged, scores: np.ndarray, pairs: Pairs, count: int) -> list[dict[str, Any]]:
  """The first `count` pairs, for samples.jsonl."""
  return [
    _row(judged, c)
    | {"completion": judged.completions[c].text, "rejected": judged.completions[j].text}
    | {"score": float(scores[c]), "rejected_score": float(scores[j])}
    for c, j in zip(pairs.chosen[:count], pairs.rejected[:count])
  ]


def single_rows(
  judged: Judged, scores: np.ndarray, right: np.ndarray, count: int
) -> list[dict[str, Any]]:
  """The first completion of the first `count` prompts, for samples.jsonl."""
  _, first = np.unique(judged.groups, return_index=True)
  return [
    _row(judged, i)
    | {"completion": judged.completions[i].text}
    | {"score": float(scores[i]), "label": float(right[i])}
    for i in first[:count]
  ]


def _row(judged: Judged, i: int) -> dict[str, Any]:
  problem = judged.completions[i].problem
  return {"problem": problem.id, "prompt": problem.prompt, "answer": problem.answer}


def _example(judged: Judged, i: int, answer_of: int | None = None) -> Example:
  """Prompt i and its completion, or the completion of another; the completion is trained, less
  what was forced."""
  r, other = judged.rollouts, i if answer_of is None else answer_of
  prompt = np.asarray(r.tokens[i, : r.prompt_length[i]])
  own = slice(r.prompt_length[other], r.length[other])
  answer, chosen = np.asarray(r.tokens[other, own]), ~np.asarray(r.forced[other, own])
  mask = np.r_[np.zeros(len(prompt)), chosen].astype(np.float32)
  return Example(np.concatenate([prompt, answer]).astype(np.int32), mask)


def _sampled(judged: Judged, i: int) -> np.ndarray:
  return np.asarray(judged.rollouts.logprobs[i, : judged.rollouts.length[i]])
