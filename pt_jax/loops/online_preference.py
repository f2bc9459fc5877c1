"""The online preference loop: prompts -> rollouts -> scores -> pairs or labels -> updates -> new
weights.

The weights that sample may be older than those that are trained (`refresh_every`), and the
reference may follow the policy (`reference_every`): both are in the checkpoint, with the train
state and the position in the stream of prompts, so a resumed run repeats and loses nothing.

Source: arXiv 2402.04792 (online), arXiv 2404.19733 (iterative).
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import sharding
from pt_jax.data.batch import ComparisonBatch
from pt_jax.data.groups import Group
from pt_jax.experiment import ModelReward, OnlinePreference
from pt_jax.loops import pairs
from pt_jax.loops.context import Context, in_stage
from pt_jax.loops.evaluation import evaluate, new_engine
from pt_jax.loops.model_rewards import NAME, RewardModel
from pt_jax.loops.offline import due
from pt_jax.loops.online import HISTOGRAMS_EVERY
from pt_jax.loops.progress import Progress
from pt_jax.loops.prompts import Prompts
from pt_jax.loops.rollouts import (
  Judged,
  concatenate,
  engine_metrics,
  generate_and_judge,
  rollout_metrics,
)
from pt_jax.losses.mismatch import logprob_gap
from pt_jax.metrics import check_finite
from pt_jax.rewards import judges
from pt_jax.steps import policy
from pt_jax.steps.preference import PreferenceState, PreferenceUpdater, preference_step
from pt_jax.steps.state import Updater
from pt_jax.weights import Params


@flax.struct.dataclass
class OnlineState:
  """What a checkpoint of this loop holds."""

  train: PreferenceState
  behaviour: Params | None  # what samples, where that is not always the policy
  reference: Params | None  # where it moves

  @property
  def params(self) -> Params:
    """Of the policy."""
    return self.train.params


class _Creator(NamedTuple):
  updater: PreferenceUpdater
  stale: bool  # whether completions may be of weights before the policy's
  moving: bool  # whether the reference moves

  def create(self, params: Params) -> OnlineState:
    copy = lambda kept: jax.tree.map(jnp.copy, params) if kept else None
    return OnlineState(self.updater.create(params), copy(self.stale), copy(self.moving))


class Scored(NamedTuple):
  """The completions of one step and what orders those of a prompt."""

  judged: Judged
  scores: np.ndarray  # [B] float32


class Compared(NamedTuple):
  """What the updates of one step compare."""

  groups: list[Group]
  rows: list[dict[str, Any]]  # for samples.jsonl
  figures: dict[str, float]


def run_online_preference(
  stage: OnlinePreference, context: Context
) -> tuple[Params, dict[str, float]]:
  """Runs or resumes an online preference stage.

  Returns the parameters it ends with and its last held-out evaluation.

  Raises ValueError for a non-finite loss (before a checkpoint is written), for scores that are no
  finite numbers, and for problems or rewards that the stage cannot use.
  """
  with in_stage(stage.name):
    loop = _Loop(stage, context)
    with context.progress(stage.steps, loop.start) as progress:
      for step in range(loop.start, stage.steps):
        loop.step(step, progress)
    return loop.state.params, loop.finish()


class _Loop:
  """What an online preference stage carries from step to step."""

  def __init__(self, stage: OnlinePreference, context: Context):
    self.stage, self.context = stage, context
    self.task, self.stack = stage.problems(context.tokenizer), stage.rewards()
    self.prompts = Prompts(self.task.train, context.seed)
    updater = Updater(stage.optimizer, context.table, context.layout)
    creator = _Creator(
      PreferenceUpdater(updater), stale=stage.refresh_every > 1, moving=stage.reference_every > 0
    )
    self.state, saved = context.start(creator)
    self.start = saved.step if saved else 0
    self.version = saved.host["version"] if saved else 0  # steps behind the weights that sample
    if saved:
      self.prompts.set_state(saved.host["prompts"])
    room = stage.row_length // stage.completions_per_group
    self.engine = new_engine(context, self._behaviour, stage.slots, room, version=self.version)
    self._compile(updater)
    self.reward_model = None
    if isinstance(stage.judge, ModelReward):
      self.reward_model = RewardModel(stage.judge, context, stage.rows, stage.row_length)
    self.results: dict[str, float] = {}
    self.pending: tuple[int, list[dict[str, jax.Array]], dict[str, float]] | None = None

  def _compile(self, updater: Updater) -> None:
    stage, config = self.stage, self.context.config
    step = functools.partial(
      preference_step, config=config, updater=updater, objective=stage.objective
    )
    self._update = jax.jit(step, donate_argnums=0)
    self._score = jax.jit(functools.partial(policy.score, config=config, temperature=1.0))
    gap = functools.partial(_gap, config=config, temperature=stage.sampling.temperature or 1.0)
    self._measure_gap = jax.jit(gap)

  @property
  def _behaviour(self) -> Params:
    return self.state.params if self.state.behaviour is None else self.state.behaviour

  @property
  def _reference(self) -> Params:
    return self.context.params if self.state.reference is None else self.state.reference

  def step(self, step: int, progress: Progress) -> None:
    """Samples, scores, compares, updates; logs what the step before measured."""
    stage, started = self.stage, time.perf_counter()
    engine = self.engine.figures.copy()
    (judged, scores), drawn = self._rollouts(step)
    self._flush(progress)
    seconds = time.perf_counter() - started
    compared = self._compare(judged, scores, np.random.default_rng((self.context.seed, step)))
    figures = rollout_metrics(judged) | drawn | compared.figures
    figures["rollout/staleness"] = step - self.version
    figures["perf/rollout_tokens_per_second"] = sum(c.tokens for c in judged.completions) / seconds
    figures["perf/rollout_seconds"] = seconds
    figures |= engine_metrics(self.engine, engine)
    self.context.stage.samples(step + 1, compared.rows)
    if step % HISTOGRAMS_EVERY == 0:
      self.context.stage.histogram(step + 1, "score", scores)
      self.context.stage.histogram(step + 1, "length", [c.tokens for c in judged.completions])
    self.pending = step + 1, self._update_all(step, compared.groups), figures
    self._refresh(step + 1)
    if due(step + 1, stage.evaluate_every) and step + 1 < stage.steps:
      self._flush(progress)
      self._evaluate(step + 1)
    if due(step + 1, stage.checkpoint_every) and step + 1 < stage.steps:
      self._flush(progress)
      host = {"prompts": self.prompts.state(), "version": self.version}
      self.context.stage.save(step + 1, self.state, host)
    if step + 1 == stage.steps:
      self._flush(progress)

  def finish(self) -> dict[str, float]:
    """The last held-out evaluation."""
    self._evaluate(self.stage.steps)
    return self.results

  def _rollouts(self, step: int) -> tuple[Scored, dict[str, float]]:
    """`prompts` groups of completions. Where pairs are needed, others are drawn in the place of
    groups that give none, up to the limit; then those fill what is left."""
    stage, key = self.stage, self.context.key("rollouts", step)
    kept: list[Scored] = []
    dropped: list[Scored] = []
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
      scores = self._scores(judged)
      differ = pairs.separable(scores, judged.groups)
      useful += int(differ.sum()) // stage.group_size
      keep = differ | stage.objective.unpaired
      for part, rows in ((kept, np.flatnonzero(keep)), (dropped, np.flatnonzero(~keep))):
        part.append(Scored(judged.take(rows), scores[rows]))
      if keep.all() or useful >= stage.prompts:
        break
    rows = np.arange(stage.prompts * stage.group_size)
    parts = [*kept, *dropped]
    judged = concatenate([part.judged for part in parts]).take(rows)
    scores = np.concatenate([part.scores for part in parts])[rows]
    tied = ~pairs.separable(scores, judged.groups)
    figures = {
      "rollout/groups_drawn": groups,
      "rollout/groups_kept": useful,
      "rollout/zero_variance": float(tied.mean()),
      "rollout/score": float(scores.mean()),
    }
    return Scored(judged, scores), figures

  def _scores(self, judged: Judged) -> np.ndarray:
    """[B] float32: the total reward, or what the stage's judge says."""
    judge = self.stage.judge
    if judge is None:
      return judged.rewards.total
    if isinstance(judge, ModelReward):
      assert self.reward_model is not None
      return self.reward_model.judge(judged).rewards.components[NAME]
    return judges.judged(judge, judged.completions, judged.groups)

  def _compare(self, judged: Judged, scores: np.ndarray, rng: np.random.Generator) -> Compared:
    stage = self.stage
    if stage.objective.unpaired:
      right = scores > stage.threshold
      groups = pairs.single_groups(judged, right, mismatched=stage.objective.loss == "kto")
      rows = pairs.single_rows(judged, scores, right, stage.sample_rows)
      return Compared(groups, rows, {"rollout/right": float(right.mean())})
    made = pairs.pair_up(scores, judged.groups, stage.pairing, rng)
    figures = {"rollout/pairs": float(len(made.chosen))}
    if len(made.chosen):
      figures["rollout/score_difference"] = float(
        (scores[made.chosen] - scores[made.rejected]).mean()
      )
      reward = judged.rewards.total
      figures["rollout/reward_agrees"] = float((reward[made.chosen] > reward[made.rejected]).mean())
    rows = pairs.pair_rows(judged, scores, made, stage.sample_rows)
    return Compared(pairs.pair_groups(judged, made), rows, figures)

  def _update_all(self, step: int, groups: list[Group]) -> list[dict[str, jax.Array]]:
    """All updates of one step: `epochs` passes over `minibatches` parts of the groups, none over
    an empty part. The reference's log-probs are computed once."""
    count = min(self.stage.minibatches, len(groups))
    parts = np.array_split(np.arange(len(groups)), max(count, 1))
    batches = [self._batch([groups[i] for i in part]) for part in parts if len(part)]
    gap = {}
    if batches and step == self.version:
      gap = self._measure_gap(self.state.params, batches[0])
    batches = [self._with_reference(batch) for batch in batches]
    order = np.random.default_rng((self.context.seed, step, 1))
    metrics: list[dict[str, jax.Array]] = []
    for _ in range(self.stage.epochs):
      for i in order.permutation(len(batches)):
        train, measured = self._update(self.state.train, batches[i])
        self.state = self.state.replace(train=train)
        metrics.append(measured | gap)
    return metrics

  def _batch(self, groups: list[Group]) -> ComparisonBatch:
    packed = pairs.pack_comparisons(groups, self.stage.rows, self.stage.row_length)
    return sharding.put(packed, sharding.batch_spec(1), self.context.mesh)

  def _with_reference(self, batch: ComparisonBatch) -> ComparisonBatch:
    """Its `reference_logprobs`, until here the sampler's, become the reference's."""
    if self.stage.objective.reference:
      logprobs = self._score(self._reference, batch)
    else:
      logprobs = jnp.zeros_like(batch.reference_logprobs)
    return dataclasses.replace(batch, reference_logprobs=logprobs)

  def _refresh(self, done: int) -> None:
    """Hands the policy to the engine, and makes it the reference, where that is due."""
    stage = self.stage
    copy = lambda: jax.tree.map(jnp.copy, self.state.params)
    if due(done, stage.reference_every):
      self.state = self.state.replace(reference=copy())
    if due(done, stage.refresh_every):
      if self.state.behaviour is not None:
        self.state = self.state.replace(behaviour=copy())
      self.version = done
      self.engine.update(self._behaviour, done)

  def _flush(self, progress: Progress) -> None:
    """Logs the step that is pending; its updates have long been dispatched."""
    if self.pending is None:
      return
    (step, updates, figures), self.pending = self.pending, None
    measured = jax.device_get(updates)
    metrics = {}
    for name in measured[0] if measured else ():
      values = np.array([m[name] for m in measured])
      metrics[name] = float(values.max() if name.endswith("_max") else values.mean())
    check_finite(metrics, step)
    self.context.stage.log(step, metrics | figures)
    shown = {k: metrics[f"preference/{k}"] for k in ("margin", "accuracy")
             if f"preference/{k}" in metrics}  # fmt: skip
    tokens = int(figures["length/mean"] * self.stage.prompts * self.stage.group_size)
    progress.update(step, tokens=tokens, reward=figures["reward"], **shown)

  def _evaluate(self, step: int) -> None:
    """Scores the policy, which need not be what samples."""
    stage = self.stage
    self.engine.update(self.state.params, step)
    self.results, _ = evaluate(
      self.engine, self.task, self.stack, stage.sampling, stage.evaluate_problems, self.context
    )
    self.engine.update(self._behaviour, self.version)
    self.context.stage.log(step, self.results)


def _gap(
  params: Params, batch: ComparisonBatch, *, config: Any, temperature: float
) -> dict[str, jax.Array]:
  """How far the sampler's log-probs, in `reference_logprobs`, are from those of the weights that
  sampled; completions of other prompts apart."""
  logprobs = policy.score(params, batch, config=config, temperature=temperature)
  mask = jnp.where(batch.labels >= 0, batch.mask, 0)
  gap = jax.vmap(logprob_gap)(logprobs, batch.reference_logprobs, mask)
  count = jnp.maximum(mask.sum(), 1)
  return {
    "rollout/logprob_gap_mean": gap["logprob_gap"].sum() / count,
    "rollout/logprob_gap_max": gap["logprob_gap"].max(),
    "rollout/logprob_gap_kl": gap["logprob_gap_kl"].sum() / count,
  }
