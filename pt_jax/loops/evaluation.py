"""Held-out problems answered by a policy: pass@1, and the engine that answers them."""

import dataclasses
import functools

from pt_jax.data.tasks import Problem
from pt_jax.data.tokenizers import IncrementalDetokenizer
from pt_jax.experiment import Evaluate, Problems
from pt_jax.loops.context import Context
from pt_jax.loops.rollouts import (
  CORRECT,
  Judged,
  generate_and_judge,
  rollout_metrics,
  sample_rows,
)
from pt_jax.rewards.stack import RewardStack
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.weights import Params


def run_evaluate(stage: Evaluate, context: Context) -> tuple[Params, dict[str, float]]:
  """Scores the parameters of the stage before on held-out problems; returns them unchanged."""
  task, stack = stage.problems(context.tokenizer), stage.rewards()
  longest = max(len(task.encode(p)) for p in held_out_problems(task, stage.count))
  length = longest + stage.sampling.max_tokens
  engine = new_engine(context, context.params, stage.slots, length)
  results, judged = evaluate(engine, task, stack, stage.sampling, stage.count, context)
  context.stage.log(0, results)
  context.stage.samples(0, sample_rows(judged, 16))
  return context.params, results


def evaluate(
  engine: Engine,
  task: Problems,
  stack: RewardStack,
  sampling: SamplingParams,
  count: int,
  context: Context,
) -> tuple[dict[str, float], Judged]:
  """Scores one sampled and one greedy completion of each of `count` held-out problems.

  `eval/pass@1` is the share of right answers among completions sampled as the stage samples (the
  estimator of arXiv 2107.03374 with one sample), `eval/greedy` among greedy ones; reward, lengths
  and stop reasons are those of the sampled ones, which are returned too. The draws are the same for
  every call, so that only the weights make a difference.
  """
  problems, key = held_out_problems(task, count), context.key("evaluation", 0)
  judge = functools.partial(
    generate_and_judge, engine, problems, task, context.tokenizer, stack, key=key
  )
  sampled, greedy = judge(sampling), judge(dataclasses.replace(sampling, temperature=0.0))
  right = lambda judged: float(judged.rewards.components[CORRECT].mean())
  metrics = {"pass@1": right(sampled), "greedy": right(greedy)} | rollout_metrics(sampled)
  return {f"eval/{name}": value for name, value in metrics.items()}, sampled


def held_out_problems(task: Problems, count: int) -> list[Problem]:
  """The first `count` held-out problems. Raises ValueError when there are fewer."""
  if len(task.held_out) < count:
    raise ValueError(f"held-out problems: expected at least {count}, found {len(task.held_out)}")
  return [task.held_out[i] for i in range(count)]


def new_engine(
  context: Context, params: Params, slots: int, max_length: int, version: int = 0
) -> Engine:
  """A rollout engine for the model and tokenizer of a stage."""
  return Engine(
    context.config,
    params,
    slots=slots,
    max_length=max_length,
    detokenizer=functools.partial(IncrementalDetokenizer, context.tokenizer),
    version=version,
  )
