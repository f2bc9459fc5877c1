"""What an objective wants to know of completions beside their rewards: steps, baselines, values.

Letters: N completions, W places of tokens (prompts included), right-padded.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pt_jax.data.tokenizers import Tokenizer
from pt_jax.loops.rollouts import Judged, chosen_tokens, read_completions
from pt_jax.rewards.stack import RewardStack
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import SamplingParams, StopReason


def step_ends(judged: Judged, tokenizer: Tokenizer, mark: str) -> np.ndarray:
  """[N, W] bool: tokens of completions whose text holds the mark, and the last chosen one of each.

  A stop token right behind a mark is no step of its own: it belongs to the one before.
  """
  rollouts = judged.rollouts
  tokens, drawn = np.asarray(rollouts.tokens), chosen_tokens(rollouts)
  marks = [t for t in np.unique(tokens[drawn]).tolist() if mark in tokenizer.decode([t])]
  places = np.arange(drawn.shape[1])
  last = places == np.max(np.where(drawn, places, -1), axis=1)[:, None]
  marked = drawn & np.isin(tokens, marks)
  stopped = (np.asarray(rollouts.stop) == StopReason.TOKEN)[:, None]
  after_mark = np.pad(marked[:, :-1], ((0, 0), (1, 0)))
  return marked | (drawn & last & ~(stopped & after_mark))


def step_rewards(
  judged: Judged,
  ends: np.ndarray,
  tokenizer: Tokenizer,
  rewards: Callable[[Completion, Sequence[str]], Sequence[float]],
) -> np.ndarray:
  """[N, W] float32: where a step ends, what it is worth; 0 elsewhere.

  Raises ValueError when the function gives another number of rewards than there are steps, or one
  that is not finite.
  """
  found = np.zeros(ends.shape, np.float32)
  for i, completion in enumerate(judged.completions):
    places = np.flatnonzero(ends[i])
    texts = _texts(judged, i, places, tokenizer)
    scores = np.asarray(rewards(completion, texts), np.float32)
    if scores.shape != places.shape or not np.isfinite(scores).all():
      raise ValueError(
        f"step rewards, problem {completion.problem.id!r}: expected {len(places)} finite numbers, "
        f"found {scores.tolist()}"
      )
    found[i, places] = scores
  return found


def greedy_rewards(judge: Callable[..., Judged], judged: Judged, sampling: SamplingParams):
  """The reward of the greedy completion of every completion's prompt (ReMax).

  Args:
    judge: `generate_and_judge` with engine, task, tokenizer, stack and key bound.
    judged: the sampled completions.
    sampling: how they were sampled.

  Returns:
    rewards [N], and the tokens that were drawn for them.
  """
  _, first, index = np.unique(judged.groups, return_index=True, return_inverse=True)
  problems = [judged.completions[i].problem for i in first]
  greedy = judge(problems, sampling=dataclasses.replace(sampling, temperature=0.0))
  return greedy.rewards.total[index], sum(c.tokens for c in greedy.completions)


def prompt_values(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """[N], what a completion's prompt is worth: the mean reward of the others of its group."""
  _, index, size = np.unique(groups, return_inverse=True, return_counts=True)
  return (np.bincount(index, rewards)[index] - rewards) / (size[index] - 1)


def step_values(
  judged: Judged,
  ends: np.ndarray,
  *,
  engine: Engine,
  tokenizer: Tokenizer,
  stack: RewardStack,
  sampling: SamplingParams,
  count: int,
  key: jax.Array,
) -> tuple[np.ndarray, int]:
  """The mean reward of `count` completions from the end of every step but the last (VinePPO).

  Args:
    judged: the completions whose steps are valued.
    ends: [N, W] bool, from `step_ends`.
    engine: with the weights to sample from; a completion ends where its window does.
    tokenizer, stack, sampling: as the completions were made.
    count: completions from each step.
    key: PRNG key.

  Returns:
    [N, W] float32, 0 where no step ends or the completion does; and the tokens that were drawn.

  Source: arXiv 2410.01679, eq. 6.
  """
  rollouts = judged.rollouts
  values = np.zeros(ends.shape, np.float32)
  inner = ends & (np.arange(ends.shape[1]) < np.asarray(rollouts.length)[:, None] - 1)
  places = np.argwhere(inner)
  if not len(places):
    return values, 0
  prefixes = [rollouts.tokens[i, : t + 1].tolist() for i, t in places]
  continued = engine.generate(prefixes, sampling, key=key, n=count)
  rows = np.repeat(places[:, 0], count)
  problems = [judged.completions[i].problem for i in rows]
  starts = np.asarray(rollouts.prompt_length)[rows]
  rewards = stack(read_completions(problems, continued, starts, tokenizer)).total
  values[inner] = rewards.reshape(-1, count).mean(1)
  return values, int((continued.length - continued.prompt_length).sum())


def _texts(judged: Judged, i: int, places: np.ndarray, tokenizer: Tokenizer) -> list[str]:
  """The text of each step of completion i, whose last tokens stand at `places`."""
  rollouts = judged.rollouts
  starts = np.concatenate([[rollouts.prompt_length[i]], places[:-1] + 1])
  texts = []
  for start, stop in zip(starts, places + 1):
    tokens = rollouts.tokens[i, start:stop].tolist()
    closed = stop == rollouts.length[i] and rollouts.stop[i] == StopReason.TOKEN
    texts.append(tokenizer.decode(tokens[:-1] if closed else tokens))
  return texts
