"""The online loop: prompts -> rollouts -> rewards -> advantages -> packed batches -> updates -> new
weights.

What a step samples is a function of the seed, the step and the weights; the position in the stream
of prompts and the train state are all that a checkpoint has to hold.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pt_jax import sharding
from pt_jax.data.batch import PolicyBatch
from pt_jax.data.tasks import Problem, Task
from pt_jax.data.tokenizers import IncrementalDetokenizer
from pt_jax.experiment import Evaluate, Online, Problems
from pt_jax.loops.context import Context
from pt_jax.loops.progress import Progress
from pt_jax.loops.rollouts import (
  CORRECT,
  Judged,
  concatenate,
  generate_and_judge,
  pack_policy,
  rollout_metrics,
  sample_rows,
)
from pt_jax.losses.credit import assign_credit, kept_groups
from pt_jax.metrics import check_finite
from pt_jax.rewards.stack import RewardStack
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from pt_jax.steps import policy
from pt_jax.steps.state import Updater
from pt_jax.weights import Params

HISTOGRAMS_EVERY = 10  # steps


class Prompts:
  """An endless stream of problems, every epoch in an order of its own; its state is one number."""

  def __init__(self, task: Task, seed: int):
    self.drawn = 0  # problems taken so far; set it to go on elsewhere
    self._task, self._seed = task, seed
    self._epoch, self._order = -1, np.zeros(0, int)

  def take(self, count: int) -> list[Problem]:
    """The next `count` problems."""
    problems = []
    for i in range(self.drawn, self.drawn + count):
      epoch, index = divmod(i, len(self._task))
      if epoch != self._epoch:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._task))
        self._epoch, self._order = epoch, order
      problems.append(self._task[int(self._order[index])])
    self.drawn += count
    return problems


def run_online(stage: Online, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes an online stage.

  Returns the parameters it ends with and its last held-out evaluation.

  Raises ValueError for a non-finite loss (before a checkpoint is written) and for problems or
  rewards that the stage cannot use.
  """
  loop = _Loop(stage, context)
  with context.progress(stage.steps, loop.start) as progress:
    for step in range(loop.start, stage.steps):
      loop.step(step, progress)
  return loop.state.params, loop.finish()


def run_evaluate(stage: Evaluate, context: Context) -> tuple[Params, dict[str, float]]:
  """Scores the parameters of the stage before on held-out problems; returns them unchanged."""
  task, stack = stage.problems(context.tokenizer), stage.rewards()
  longest = max(len(task.encode(p)) for p in _held_out(task, stage.count))
  length = longest + stage.sampling.max_tokens
  engine = _engine(context, context.params, stage.slots, length)
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
  problems, key = _held_out(task, count), context.key("evaluation", 0)
  judge = functools.partial(
    generate_and_judge, engine, problems, task, context.tokenizer, stack, key=key
  )
  sampled, greedy = judge(sampling), judge(dataclasses.replace(sampling, temperature=0.0))
  right = lambda judged: float(judged.rewards.components[CORRECT].mean())
  metrics = {"pass@1": right(sampled), "greedy": right(greedy)} | rollout_metrics(sampled)
  return {f"eval/{name}": value for name, value in metrics.items()}, sampled


class _Loop:
  """What an online stage carries from step to step."""

  def __init__(self, stage: Online, context: Context):
    self.stage, self.context = stage, context
    self.task, self.stack = stage.problems(context.tokenizer), stage.rewards()
    _held_out(self.task, stage.evaluate_problems)
    self.updater = Updater(stage.optimizer, context.table, context.layout)
    self.prompts = Prompts(self.task.train, context.seed)
    self.state, saved = context.start(self.updater)
    self.start = saved.step if saved else 0
    self.prompts.drawn = saved.host["drawn"] if saved else 0
    self.reference = context.params if stage.objective.kl is not None else None
    self.engine = _engine(
      context, self.state.params, stage.slots, stage.row_length, version=self.start
    )
    self._compile()
    self.results: dict[str, float] = {}
    self.pending: tuple[int, list[dict[str, jax.Array]], dict[str, float]] | None = None

  def _compile(self) -> None:
    stage, config = self.stage, self.context.config
    shared = {"config": config, "temperature": stage.sampling.temperature or 1.0}
    self._one_update = stage.epochs * stage.minibatches == 1
    step = functools.partial(
      policy.policy_step,
      updater=self.updater,
      objective=stage.objective,
      first_update=self._one_update,
      **shared,
    )
    self._update = jax.jit(step, donate_argnums=0)
    self._score = jax.jit(functools.partial(policy.score, **shared))

  def step(self, step: int, progress: Progress) -> None:
    """Samples, judges, updates; logs what the step before measured."""
    started = time.perf_counter()
    judged, drawn = self._rollouts(step)
    self._flush(progress)
    sampled = time.perf_counter()
    metrics = self._update_all(step, judged)
    self.engine.update(self.state.params, step + 1)
    figures = rollout_metrics(judged) | drawn
    tokens = int(sum(c.tokens for c in judged.completions))
    figures["perf/rollout_tokens_per_second"] = tokens / (sampled - started)
    figures["perf/rollout_seconds"] = sampled - started
    self.context.stage.samples(step + 1, sample_rows(judged, self.stage.sample_rows))
    if step % HISTOGRAMS_EVERY == 0:
      self.context.stage.histogram(step + 1, "reward", judged.rewards.total)
      self.context.stage.histogram(step + 1, "length", [c.tokens for c in judged.completions])
    self.pending = step + 1, metrics, figures
    done, stage = step + 1, self.stage
    if stage.evaluate_every and done % stage.evaluate_every == 0 and done < stage.steps:
      self._flush(progress)
      self._evaluate(done)
    if stage.checkpoint_every and done % stage.checkpoint_every == 0 and done < stage.steps:
      self._flush(progress)
      self.context.stage.save(done, self.state, {"drawn": self.prompts.drawn})
    if done == stage.steps:
      self._flush(progress)

  def finish(self) -> dict[str, float]:
    """The last held-out evaluation."""
    self._evaluate(self.stage.steps)
    return self.results

  def _rollouts(self, step: int) -> tuple[Judged, dict[str, float]]:
    """The completions of one step: `prompts` groups. Where the objective drops groups, more are
    drawn in their place, up to the limit; then dropped ones fill what is left."""
    stage, objective = self.stage, self.stage.objective
    key = self.context.key("rollouts", step)
    kept: list[Judged] = []
    dropped: list[Judged] = []
    groups = useful = 0
    for attempt in range(stage.resample_limit):
      judged = generate_and_judge(
        self.engine,
        self.prompts.take(stage.prompts),
        self.task,
        self.context.tokenizer,
        self.stack,
        stage.sampling,
        key=jax.random.fold_in(key, attempt),
        n=stage.group_size,
        first_group=groups,
      )
      groups += stage.prompts
      keep = kept_groups(judged.rewards.total, judged.groups, objective=objective)
      useful += int(keep.sum()) // stage.group_size
      kept.append(judged.take(np.flatnonzero(keep)))
      dropped.append(judged.take(np.flatnonzero(~keep)))
      if useful >= stage.prompts:
        break
    rows = np.arange(stage.prompts * stage.group_size)
    chosen = concatenate([*kept, *dropped]).take(rows)
    figures = {
      "rollout/groups_drawn": groups,
      "rollout/groups_kept": useful,
      "rollout/zero_variance": _zero_variance(chosen),
    }
    return chosen, figures

  def _update_all(self, step: int, judged: Judged) -> list[dict[str, jax.Array]]:
    """All updates of one step: `epochs` passes over `minibatches` of its groups."""
    stage = self.stage
    batches = [self._batch(part) for part in self._minibatches(judged)]
    order = np.random.default_rng((self.context.seed, step))
    metrics: list[dict[str, jax.Array]] = []
    for _ in range(stage.epochs):
      for i in order.permutation(len(batches)):
        self.state, measured = self._update(self.state, batches[i])
        metrics.append(measured)
    return metrics

  def _minibatches(self, judged: Judged) -> Iterator[tuple[Judged, Any]]:
    """Whole groups stay together; advantages are those of the whole step."""
    stage = self.stage
    lengths = np.array([c.tokens for c in judged.completions])
    cut = np.isin(judged.rollouts.stop, (StopReason.LENGTH, StopReason.BUDGET))
    credit = assign_credit(
      judged.rewards.total, lengths, cut, judged.groups, objective=stage.objective
    )
    for rows in np.split(np.arange(len(lengths)), stage.minibatches):
      part = dataclasses.replace(
        credit,
        rewards=credit.rewards[rows],
        advantages=credit.advantages[rows],
        trained=credit.trained[rows],
      )
      yield judged.take(rows), part

  def _batch(self, part: tuple[Judged, Any]) -> PolicyBatch:
    packed = pack_policy(*part, self.stage.rows, self.stage.row_length)
    batch = sharding.put(packed, sharding.batch_spec(1), self.context.mesh)
    if not self._one_update:
      batch = batch.replace(old_logprobs=self._score(self.state.params, batch))
    if self.reference is not None:
      batch = batch.replace(reference_logprobs=self._score(self.reference, batch))
    return batch

  def _flush(self, progress: Progress) -> None:
    """Logs the step that is pending; its updates have long been dispatched."""
    if self.pending is None:
      return
    step, updates, figures = self.pending
    self.pending = None
    measured = jax.device_get(updates)
    metrics = {}
    for name in measured[0]:
      values = np.array([m[name] for m in measured])
      metrics[name] = float(values.max() if name.endswith("_max") else values.mean())
    try:
      check_finite(metrics, step)
    except ValueError as error:
      raise ValueError(f"stage {self.stage.name}: {error}") from error
    self.context.stage.log(step, metrics | figures)
    progress.update(
      step,
      tokens=int(figures["length/mean"] * self.stage.prompts * self.stage.group_size),
      reward=figures["reward"],
      entropy=metrics["policy/entropy"],
      gap=metrics["rollout/logprob_gap_max"],
    )

  def _evaluate(self, step: int) -> None:
    stage = self.stage
    self.results, _ = evaluate(
      self.engine, self.task, self.stack, stage.sampling, stage.evaluate_problems, self.context
    )
    self.context.stage.log(step, self.results)


def _zero_variance(judged: Judged) -> float:
  """Share of groups whose rewards are all equal: they give no gradient."""
  _, group = np.unique(judged.groups, return_inverse=True)
  total = judged.rewards.total
  low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
  np.minimum.at(low, group, total)
  np.maximum.at(high, group, total)
  return float(np.mean(low == high))


def _held_out(task: Problems, count: int) -> list[Problem]:
  if len(task.held_out) < count:
    raise ValueError(f"held-out problems: expected at least {count}, found {len(task.held_out)}")
  return [task.held_out[i] for i in range(count)]


def _engine(
  context: Context, params: Params, slots: int, max_length: int, version: int = 0
) -> Engine:
  return Engine(
    context.config,
    params,
    slots=slots,
    max_length=max_length,
    detokenizer=functools.partial(IncrementalDetokenizer, context.tokenizer),
    version=version,
  )
