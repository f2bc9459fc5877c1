"""From problems to judged completions to packed policy batches: the host's part of online RL."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np

from pt_jax.data import packing
from pt_jax.data.batch import PADDING_SEGMENT, PolicyBatch
from pt_jax.data.tasks import Problem
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import Problems
from pt_jax.losses.credit import Credit
from pt_jax.rewards.stack import Rewards, RewardStack
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import Rollouts, SamplingParams, StopReason

CORRECT = "correct"  # the reward component that pass@1 is the mean of


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
  completions = []
  for i, problem in enumerate(p for p in problems for _ in range(n)):
    tokens = rollouts.tokens[i, rollouts.prompt_length[i] : rollouts.length[i]].tolist()
    stop = StopReason(int(rollouts.stop[i]))
    text = tokenizer.decode(tokens[:-1] if stop == StopReason.TOKEN else tokens)
    completions.append(Completion(problem, text, len(tokens), stop))
  groups = first_group + np.repeat(np.arange(len(problems)), n)
  return Judged(completions, rollouts, stack(completions), groups)


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
      r, tokens=pad(r.tokens, 0), logprobs=pad(r.logprobs, 0), version=pad(r.version, -1)
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


def pack_policy(judged: Judged, credit: Credit, rows: int, row_length: int) -> PolicyBatch:
  """Packs completions into a policy batch of [A, rows, row_length] NumPy arrays.

  A is the next power of two of what they need, so that few programs are compiled; the microbatches
  behind hold nothing and are not computed.

  Old and reference log-probs are 0: `steps.policy.score` fills them in where they are read.
  """
  r = judged.rollouts
  plan = packing.pack(r.length, row_length, rows_multiple=rows)
  microbatches = 1 << (plan.rows // rows - 1).bit_length()
  plan = dataclasses.replace(plan, rows=microbatches * rows)
  index = np.arange(r.tokens.shape[1])
  drawn = (index >= r.prompt_length[:, None]) & (index < r.length[:, None])
  drawn &= credit.trained[:, None]
  field = lambda values: packing.lay_out(plan, values.astype(np.float32))
  mask = field(drawn)
  zeros = np.zeros_like(mask)
  batch = PolicyBatch(
    tokens=cast(Any, packing.lay_out(plan, np.asarray(r.tokens))),
    positions=cast(Any, packing.lay_out(plan, np.broadcast_to(index, drawn.shape), 0, np.int32)),
    segment_ids=cast(Any, packing.spread(plan, plan.segment, PADDING_SEGMENT, np.int32)),
    mask=cast(Any, mask),
    advantages=cast(Any, packing.spread(plan, credit.advantages) * (mask > 0)),
    old_logprobs=cast(Any, zeros),
    sampler_logprobs=cast(Any, field(np.where(drawn, r.logprobs, 0))),
    reference_logprobs=cast(Any, zeros),
  )
  return jax.tree.map(lambda x: x.reshape(-1, rows, row_length), batch)


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
