"""The programs that a stage of an experiment runs, with abstract arguments.

The jitted functions are those of the loops. Nothing is allocated, and no row, token or weight read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from pt_jax import sharding, weights
from pt_jax.data.batch import Batch, ComparisonBatch, PolicyBatch
from pt_jax.experiment import Experiment, Online, Preference, Stage, Supervised
from pt_jax.loops import online, preference, supervised
from pt_jax.loops.context import abstract_created
from pt_jax.models import decoder, hf
from pt_jax.models.config import ModelConfig
from pt_jax.plan import estimate
from pt_jax.steps.preference import PreferenceUpdater
from pt_jax.steps.state import TrainState, Updater
from pt_jax.steps.supervised import RefreshedUpdater
from pt_jax.weights import Params

# Of a batch; the others are float32.
INTEGERS = ("tokens", "positions", "segment_ids", "prefix_ids", "group_ids")


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function, and what it is called with."""

  name: str
  function: Any
  args: tuple[Any, ...]
  given: Mapping[str, Any]
  held: Mapping[
    str, Any
  ]  # what is in memory while it runs, its arguments included -> abstract tree
  gradients: Any  # abstract tree of the accumulator, None without one
  tokens: int  # of one call, padding included
  microbatches: int  # of one call
  model_flops: float  # of one call on all chips, without what is computed twice

  def lower(self) -> Any:
    """The program as XLA is given it."""
    return self.function.lower(*self.args, **self.given)


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

  The completions of an online stage are taken to be as long as they may be, one to a row.

  Raises ValueError for a stage that trains nothing that a plan knows.
  """
  if isinstance(stage, Supervised | Preference):
    count = stage.microbatches
    return Work(count, stage.layout.batch_size // count, stage.layout.row_length)
  if isinstance(stage, Online):
    rows = stage.prompts * stage.group_size // stage.minibatches
    return Work(1 << (math.ceil(rows / stage.rows) - 1).bit_length(), stage.rows, stage.row_length)
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
  for rules in (sharding.USE, *layout):
    weights.check_mesh(table, rules, mesh)
  sharding.check_divides(
    f"stage {stage.name}: a microbatch",
    (work.rows, work.length),
    ("batch", "seq"),
    sharding.USE,
    mesh,
  )
  params = weights.abstract(table, layout.params, mesh, jnp.dtype(config.param_dtype))
  made = _Made(config, work, mesh, Updater(stage.optimizer, table, layout), params)
  if isinstance(stage, Supervised):
    return [_supervised(stage, made)]
  if isinstance(stage, Preference):
    return [_preference(stage, made)]
  return _online(stage, made)


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
      function=function,
      args=args,
      given=given,
      held=held,
      gradients=grads,
      tokens=self.work.tokens,
      microbatches=self.work.microbatches,
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
  held, given, passes = _train_state(state) | {"batch": batch}, {}, 0
  kl = stage.objective.kl
  if kl is not None:
    held |= {"reference": made.params}
    if kl.estimator == "exact":
      given["reference"], passes = made.params, 1
    if kl.controller is not None:
      given["kl_coefficient"] = jax.ShapeDtypeStruct((), jnp.float32)
  update = online.compiled_update(stage, made.config, made.updater)
  step = made.step(update, (state, batch), held, passes, **given)
  if online.one_update(stage) and (kl is None or kl.estimator == "exact"):
    return [step]
  score = Program(
    name="score (reference or old log-probs)",
    function=online.compiled_score(stage, made.config),
    args=(made.params, batch),
    given={},
    held=held,
    gradients=None,
    tokens=made.work.tokens,
    microbatches=made.work.microbatches,
    model_flops=step.model_flops / (3 + passes),
  )
  return [score, step]
