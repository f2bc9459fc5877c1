"""The programs that a stage of an experiment runs, with abstract arguments.

The jitted functions are those of the loops. Nothing is allocated, and no row, token or weight read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from pt_jax import sharding, weights
from pt_jax.data.batch import Batch, ComparisonBatch, PolicyBatch
from pt_jax.data.packing import microbatches_for
from pt_jax.experiment import Experiment, Online, Preference, Stage, Supervised
from pt_jax.loops import online, preference, supervised
from pt_jax.loops.context import abstract_created
from pt_jax.models import decoder, hf
from pt_jax.models.config import ModelConfig
from pt_jax.plan import engine, estimate
from pt_jax.plan.program import Program
from pt_jax.steps.preference import PreferenceUpdater
from pt_jax.steps.state import TrainState, Updater
from pt_jax.steps.supervised import RefreshedUpdater
from pt_jax.weights import Params

# Of a batch; the others are float32.
INTEGERS = ("tokens", "positions", "segment_ids", "prefix_ids", "group_ids")


@dataclasses.dataclass(frozen=True)
class Work:
  """Rows of one update."""

  microbatches: int  # A
  rows: int  # B, of one microbatch
  length: int  # S

  @property
  def tokens(self) -> int:
    """Positions, filled or not."""
    return self.microbatches * self.rows * self.length


def model_of(experiment: Experiment) -> ModelConfig:
  """The model that the experiment trains; where it gives none, config.json of its checkpoint is
  read."""
  return experiment.model or hf.read_config(cast(str, experiment.checkpoint))


def work_of(stage: Stage) -> Work:
  """What one update of a stage computes when every row is full.

  The completions of an online stage are taken to be as long as they may be, one to a row (where
  sharing a prompt saves nothing).

  Raises ValueError for a stage that trains nothing that a plan knows.
  """
  if isinstance(stage, Supervised | Preference):
    count = stage.microbatches
    return Work(count, stage.layout.batch_size // count, stage.layout.row_length)
  if isinstance(stage, Online):
    completions = stage.prompts * stage.group_size // stage.minibatches
    return Work(microbatches_for(completions, stage.rows), stage.rows, stage.row_length)
  raise ValueError(
    f"stage {stage.name}: a plan knows Supervised, Preference and Online, found "
    f"{type(stage).__name__}"
  )


def train_programs(experiment: Experiment, stage: Stage, mesh: jax.sharding.Mesh) -> list[Program]:
  """The programs of an update of `stage`, the step last. Call it inside `jax.set_mesh(mesh)`.

  Raises ValueError when the mesh does not divide the model or the rows.
  """
  config, work = model_of(experiment), work_of(stage)
  assert isinstance(stage, Supervised | Preference | Online)  # see `work_of`
  layout, table = sharding.zero(experiment.zero), decoder.table(config)
  check_mesh(experiment, stage, mesh)
  params = weights.abstract(table, layout.params, mesh, jnp.dtype(config.param_dtype))
  made = _Made(config, work, mesh, Updater(stage.optimizer, table, layout), params)
  if isinstance(stage, Supervised):
    return [_supervised(stage, made)]
  if isinstance(stage, Preference):
    return [_preference(stage, made)]
  return _online(stage, made)


def check_mesh(experiment: Experiment, stage: Stage, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError when the mesh does not divide the model, the rows or the engine's slots."""
  table, work = decoder.table(model_of(experiment)), work_of(stage)
  for rules in (sharding.USE, *sharding.zero(experiment.zero)):
    weights.check_mesh(table, rules, mesh)
  where = f"stage {stage.name}: a microbatch"
  axes = ("batch", "seq")
  sharding.check_divides(where, (work.rows, work.length), axes, sharding.USE, mesh)
  if isinstance(stage, Online):
    where = f"stage {stage.name}: slots"
    sharding.check_divides(where, (stage.slots,), ("batch",), sharding.USE, mesh)


@dataclasses.dataclass(frozen=True)
class _Made:
  """What the programs of a stage are made of."""

  config: ModelConfig
  work: Work
  mesh: jax.sharding.Mesh
  updater: Updater
  params: Params  # abstract

  def state(self, creator: Any) -> Any:
    return abstract_created(creator, self.params, self.mesh)

  def batch(self, kind: type) -> Any:
    """An abstract batch with leaves [A, B, S]."""
    work, where = self.work, jax.NamedSharding(self.mesh, sharding.batch_spec(1))
    shape = (work.microbatches, work.rows, work.length)
    leaf = lambda name: jax.ShapeDtypeStruct(
      shape, jnp.int32 if name in INTEGERS else jnp.float32, sharding=where
    )
    return kind(**{field.name: leaf(field.name) for field in dataclasses.fields(kind)})

  def step(
    self, function: Any, args: tuple[Any, ...], held: Mapping[str, Any], passes: int, **given
  ):
    """A train step; `passes` forward passes without gradients come with it."""
    layout = self.updater.layout
    grads = weights.abstract(self.updater.table, layout.grads, self.mesh, jnp.dtype("float32"))
    flops = estimate.forward_flops(self.config, self.work.length) * self.work.tokens
    return Program(
      name="train step",
      kind="train",
      function=function,
      args=args,
      given=given,
      held=held,
      gradients=grads,
      tokens=self.work.tokens,
      trips=self.work.microbatches,
      model_flops=(3 + passes) * flops,
    )


def _train_state(state: TrainState) -> dict[str, Any]:
  return {"parameters": state.params, "optimizer": state.optimizer}


def _supervised(stage: Supervised, made: _Made) -> Program:
  objective, updater = stage.objective, made.updater
  layout = updater.layout
  step = supervised.compiled_step(made.config, stage.optimizer, layout, objective)
  batch = made.batch(Batch)
  if objective.refresh_every:
    state = made.state(RefreshedUpdater(updater))
    held = _train_state(state.train) | {"reference": state.reference, "batch": batch}
    return made.step(step, (state, batch), held, 1)
  state = made.state(updater)
  held = _train_state(state) | {"batch": batch}
  if not objective.needs_reference:
    return made.step(step, (state, batch), held, 0)
  return made.step(step, (state, batch, made.params), held | {"reference": made.params}, 1)


def _preference(stage: Preference, made: _Made) -> Program:
  layout = made.updater.layout
  step = preference.compiled_step(made.config, stage.optimizer, layout, stage.objective)
  state, batch = made.state(PreferenceUpdater(made.updater)), made.batch(ComparisonBatch)
  held = _train_state(state.train) | {"batch": batch}
  online_reference = stage.objective.reference and stage.reference == "online"
  reference = made.params if online_reference else None
  if reference is not None:
    held |= {"reference": reference}
  passes = int(reference is not None) + int(stage.objective.loss == "kto")
  return made.step(step, (state, batch, reference), held, passes)


def _online(stage: Online, made: _Made) -> list[Program]:
  if stage.critic is not None or stage.mix is not None:
    raise ValueError(
      f"stage {stage.name}: critic and mix: a plan of an Online stage knows neither, found "
      f"{stage.critic or stage.mix}"
    )
  state, batch = made.state(made.updater), made.batch(PolicyBatch)
  if not stage.share_prompts:
    batch = batch.replace(prefix_ids=None)
  kept, given, passes = _train_state(state), {}, 0
  kl = stage.objective.kl
  if kl is not None:
    kept |= {"reference": made.params}
    if kl.estimator == "exact":
      given["reference"], passes = made.params, 1
    if kl.controller is not None:
      given["kl_coefficient"] = jax.ShapeDtypeStruct((), jnp.float32)
  kept |= engine.residents(made.config, stage, made.params, made.mesh)
  update = online.compiled_update(stage, made.config, made.updater)
  step = made.step(update, (state, batch), kept | {"batch": batch}, passes, **given)
  step = dataclasses.replace(step, calls=stage.epochs * stage.minibatches)
  programs = engine.engine_programs(made.config, stage, kept, made.mesh)
  if scores := scores_of(stage):
    programs.append(
      Program(
        name="score (reference or old log-probs)",
        kind="score",
        function=online.compiled_score(stage, made.config),
        args=(made.params, batch),
        given={},
        held=step.held,
        tokens=step.tokens,
        trips=step.trips,
        model_flops=step.model_flops / (3 + passes),
        calls=scores * stage.minibatches,
      )
    )
  return [*programs, step]


def scores_of(stage: Online) -> int:
  """How often the rows of an update are scored before it."""
  kl = stage.objective.kl
  old = not online.one_update(stage) or (kl is not None and kl.where == "reward")
  return int(old) + int(kl is not None and kl.estimator != "exact")
