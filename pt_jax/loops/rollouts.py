"""From problems to judged completions to packed policy batches: the host's part of online RL."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np

from pt_jax.data import packing
from pt_jax.data.batch import PADDING_SEGMENT, PolicyBatch
from pt_jax.data.shared_prompts import SharedPlan, pack_shared
from pt_jax.data.tasks import Problem
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import Problems
from pt_jax.losses.credit import Credit
from pt_jax.rewards.stack import Rewards, RewardStack
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.figures import EngineFigures
from pt_jax.rollout.rollouts import Rollouts, SamplingParams, StopReason

CORRECT = "correct"  # the reward component that pass@1 is the mean of
# Fields of a policy batch that are 0 until something scores it or credit is assigned.
UNSCORED = (
  *("advantages", "returns", "positive"),
  *("old_logprobs", "reference_logprobs", "old_values"),
)


@dataclasses.dataclass(frozen=True)
class Judged:
  """Completions of some problems and what they scored; B = len(problems) * group size."""

  completions: list[Completion]  # B
  rollouts: Rollouts  # NumPy, [B, ...]
  rewards: Rewards  # [B]
  groups: np.ndarray  # [B] int, numbers of the problems

  def take(self, rows: np.ndarray) -> "Judged":
    """The completions at these indices."""
    pick = lambda x: x[rows]
    return Judged(
      [self.completions[i] for i in rows],
      jax.tree.map(pick, self.rollouts),
      Rewards(pick(self.rewards.total), jax.tree.map(pick, self.rewards.components)),
      self.groups[rows],
    )


def generate_and_judge(
  engine: Engine,
  problems: Sequence[Problem],
  task: Problems,
  tokenizer: Tokenizer,
  stack: RewardStack,
  sampling: SamplingParams,
  *,
  key: jax.Array,
  n: int = 1,
  first_group: int = 0,
) -> Judged:
  """n completions of each problem, decoded and scored.

  Args:
    engine: with the weights to sample from.
    problems: what to answer.
    task: its `encode` makes the prompts.
    tokenizer: decodes.
    stack: scores.
    sampling: how to draw.
    key: PRNG key.
    n: completions per problem; row i * n + j is completion j of problem i.
    first_group: number of the first problem.
  """
  prompts = [np.asarray(task.encode(p)).tolist() for p in problems]
  for problem, prompt in zip(problems, prompts):
    if len(prompt) + sampling.max_tokens > engine.max_length:
      raise ValueError(
        f"problem {problem.id}: prompt of {len(prompt)} tokens and max_tokens "
        f"{sampling.max_tokens} exceed row_length {engine.max_length}"
      )
  rollouts = engine.generate(prompts, sampling, key=key, n=n)
  asked = [problem for problem in problems for _ in range(n)]
  completions = read_completions(asked, rollouts, np.asarray(rollouts.prompt_length), tokenizer)
  groups = first_group + np.repeat(np.arange(len(problems)), n)
  return Judged(completions, rollouts, stack(completions), groups)


def read_completions(
  problems: Sequence[Problem], rollouts: Rollouts, starts: np.ndarray, tokenizer: Tokenizer
) -> list[Completion]:
  """The decoded completions of rollouts: one of each problem, from its start [B] on."""
  completions = []
  for i, problem in enumerate(problems):
    tokens = rollouts.tokens[i, starts[i] : rollouts.length[i]].tolist()
    stop = StopReason(int(rollouts.stop[i]))
    text = tokenizer.decode(tokens[:-1] if stop == StopReason.TOKEN else tokens)
    completions.append(Completion(problem, text, len(tokens), stop))
  return completions


def concatenate(parts: Sequence[Judged]) -> Judged:
  """Several batches of completions as one; shorter rows are padded to the longest."""
  if len(parts) == 1:
    return parts[0]
  width = max(part.rollouts.tokens.shape[1] for part in parts)
  join = lambda *xs: np.concatenate([np.asarray(x) for x in xs])

  def widen(r: Rollouts) -> Rollouts:
    pad: Callable[[Any, int], Any] = lambda x, fill: np.pad(
      x, ((0, 0), (0, width - x.shape[1])), constant_values=fill
    )
    return dataclasses.replace(
      r,
      tokens=pad(r.tokens, 0),
      logprobs=pad(r.logprobs, 0),
      version=pad(r.version, -1),
      forced=pad(r.forced, False),
    )

  rewards = Rewards(
    join(*(p.rewards.total for p in parts)),
    jax.tree.map(join, *(p.rewards.components for p in parts)),
  )
  return Judged(
    [c for part in parts for c in part.completions],
    jax.tree.map(join, *(widen(p.rollouts) for p in parts)),
    rewards,
    join(*(p.groups for p in parts)),
  )


@dataclasses.dataclass(frozen=True)
class Packed:
  """Completions laid into rows of a policy batch, on the host; N completions of W tokens at most
  (prompts included), A microbatches of B rows of S positions."""

  plan: packing.Plan  # of N completions in A * B rows
  start: np.ndarray  # [N], the first of its tokens that the plan lays out
  drawn: np.ndarray  # [N, W] bool, the tokens that the policy chose
  batch: PolicyBatch  # leaves [A, B, S]; advantages, scores and returns are 0

  def lay_out(self, values: np.ndarray) -> np.ndarray:
    """[N, W] to [A, B, S] float32, 0 where no token stands."""
    values = _moved(np.asarray(values, np.float32), self.start)
    return packing.lay_out(self.plan, values).reshape(self.batch.tokens.shape)

  def take_back(self, values: np.ndarray) -> np.ndarray:
    """[A, B, S] to [N, W]."""
    flat = np.asarray(values).reshape(-1, self.plan.row_length)
    return _moved(packing.take_back(self.plan, flat, self.drawn.shape[1]), -self.start)

  def fields(self, credit: Credit) -> dict[str, np.ndarray]:
    """What credit decides of the batch: mask, advantages, returns, positive; [A, B, S] each."""
    trained = self.drawn & credit.trained[:, None]
    return {
      "mask": self.lay_out(trained),
      "advantages": self.lay_out(np.where(trained, credit.advantages, 0)),
      "returns": self.lay_out(np.where(trained, credit.returns, 0)),
      "positive": self.lay_out(trained & credit.positive[:, None]),
    }


def drawn_tokens(rollouts: Rollouts) -> np.ndarray:
  """[N, W] bool, which tokens of the rollouts belong to completions."""
  index = np.arange(rollouts.tokens.shape[1])
  start, stop = (np.asarray(x)[:, None] for x in (rollouts.prompt_length, rollouts.length))
  return (index >= start) & (index < stop)


def chosen_tokens(rollouts: Rollouts) -> np.ndarray:
  """[N, W] bool, which tokens of completions the policy chose: not those that were forced."""
  return drawn_tokens(rollouts) & ~np.asarray(rollouts.forced)


def pack_rollouts(
  rollouts: Rollouts, rows: int, row_length: int, *, share_prompts: bool = False
) -> Packed:
  """Packs completions into a policy batch of [A, rows, row_length] NumPy arrays.

  A is enough for completions that fill a row each, whatever their lengths now, so that one program
  is compiled (`packing.microbatches_for`); the microbatches behind hold nothing and are not
  computed. All tokens of completions that the policy chose are in the mask; what was forced upon it
  is read and not trained. With `share_prompts`, completions of equal prompts stand behind one, see
  `data.shared_prompts`.
  """
  r, drawn = rollouts, chosen_tokens(rollouts)
  start, shared = np.zeros_like(r.length), None
  if share_prompts:
    starts = np.asarray(r.prompt_length)
    prompts = [tokens[:n].tobytes() for tokens, n in zip(np.asarray(r.tokens), starts)]
    lengths = np.asarray(r.length)
    shared = pack_shared(prompts, starts, lengths, row_length, rows_multiple=rows)
    start, plan = starts - 1, shared.completions
  else:
    plan = packing.pack(r.length, row_length, rows_multiple=rows)
  plan = dataclasses.replace(plan, rows=rows * packing.microbatches_for(len(drawn), rows))
  positions = np.broadcast_to(np.arange(drawn.shape[1], dtype=np.int32), drawn.shape)
  lay_out = lambda values: packing.lay_out(plan, _moved(np.asarray(values), start))
  mask = lay_out(drawn.astype(np.float32))
  zeros = np.zeros_like(mask)
  batch = PolicyBatch(
    tokens=cast(Any, lay_out(r.tokens)),
    positions=cast(Any, lay_out(positions)),
    segment_ids=cast(Any, packing.spread(plan, plan.segment, PADDING_SEGMENT, np.int32)),
    mask=cast(Any, mask),
    sampler_logprobs=cast(Any, lay_out(np.where(drawn, r.logprobs, 0).astype(np.float32))),
    **{name: cast(Any, zeros) for name in UNSCORED},
  )
  if shared is not None:
    batch = _with_prompts(batch, plan.rows, shared, np.asarray(r.tokens), positions)
  shape = (-1, rows, row_length)
  return Packed(plan, start, drawn, jax.tree.map(lambda x: x.reshape(shape), batch))


def _with_prompts(
  batch: PolicyBatch, rows: int, shared: SharedPlan, tokens: np.ndarray, positions: np.ndarray
) -> PolicyBatch:
  """A batch [rows, S] of completions alone, with their prompts."""
  plan, prompts = (dataclasses.replace(x, rows=rows) for x in shared[:2])
  spread = functools.partial(packing.spread, fill=PADDING_SEGMENT, dtype=np.int32)
  own, owner = packing.lay_out, shared.owner
  return dataclasses.replace(
    batch,
    tokens=batch.tokens + own(prompts, tokens[owner]),
    positions=batch.positions + own(prompts, positions[owner]),
    prefix_ids=cast(Any, np.maximum(spread(plan, shared.prefix), spread(prompts, prompts.segment))),
  )


def _moved(values: np.ndarray, start: np.ndarray) -> np.ndarray:
  """[N, W], each row moved to the left by its `start` [N] (to the right below 0), 0 where nothing
  comes from."""
  if not np.any(start):
    return values
  index = np.arange(values.shape[1]) + np.asarray(start)[:, None]
  there = (index >= 0) & (index < values.shape[1])
  return np.where(there, np.take_along_axis(values, np.where(there, index, 0), 1), 0)


def rollout_metrics(judged: Judged) -> dict[str, float]:
  """Reward in total and by component, lengths and stop reasons of completions."""
  lengths = np.array([c.tokens for c in judged.completions])
  metrics = {
    "reward": float(judged.rewards.total.mean()),
    "length/mean": float(lengths.mean()),
    "length/max": float(lengths.max()),
  }
  for name, scores in judged.rewards.components.items():
    metrics[f"reward/{name}"] = float(scores.mean())
  for reason in StopReason:
    metrics[f"stop/{reason.name.lower()}"] = float(np.mean(judged.rollouts.stop == reason))
  return metrics


def engine_metrics(engine: Engine, before: EngineFigures) -> dict[str, float]:
  """What the engine has done since `before`, see `EngineFigures.since`."""
  return {f"perf/engine_{name}": x for name, x in engine.figures.since(before).items()}


def cut(judged: Judged) -> np.ndarray:
  """[B] bool, completions that a limit ended."""
  return np.isin(judged.rollouts.stop, (StopReason.LENGTH, StopReason.BUDGET))


def sample_rows(judged: Judged, count: int) -> list[dict[str, Any]]:
  """The first completion of the first `count` problems, for samples.jsonl."""
  _, first = np.unique(judged.groups, return_index=True)
  return [
    {
      "problem": judged.completions[i].problem.id,
      "prompt": judged.completions[i].problem.prompt,
      "completion": judged.completions[i].text,
      "answer": judged.completions[i].problem.answer,
      "reward": float(judged.rewards.total[i]),
      "stop": judged.completions[i].stop.name.lower(),
    }
    for i in first[:count]
  ]
