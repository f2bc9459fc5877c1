"""What a stage of an experiment is given to work with."""

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pt_jax import sharding, weights
from pt_jax.checkpoint import Restored
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.loops.progress import Progress
from pt_jax.loops.run import Stage
from pt_jax.models.config import ModelConfig
from pt_jax.steps.state import Creator
from pt_jax.weights import Params, Table


@dataclasses.dataclass(frozen=True)
class Context:
  """Everything that stages share, and what the one before left."""

  mesh: jax.sharding.Mesh  # also the one in context (`jax.set_mesh`)
  stage: Stage  # the logs, samples and checkpoints of this stage
  tokenizer: Tokenizer
  config: ModelConfig
  table: Table  # of the parameters
  layout: sharding.Layout  # where parameters, gradients and optimizer state live between steps
  seed: int
  params: Params  # where layout.params says; not to be donated
  saved: Callable[[str, Params], Params]  # (finished stage, abstract tree) -> what it left
  quiet: bool = False  # no progress on the terminal

  def left_by(self, stage: str, table: Table) -> Params:
    """What a finished stage left, a tree of `table`, where layout.params says."""
    return self.saved(stage, abstract_params(dataclasses.replace(self, table=table)))

  def key(self, purpose: str, step: int) -> jax.Array:
    """The PRNG key of one use at one step: the seed folded with stage, purpose and step."""
    key = jax.random.key(self.seed)
    for name in (self.stage.name, purpose):
      key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)

  def start(self, updater: Creator) -> tuple[Any, Restored | None]:
    """The train state of the newest checkpoint, with the checkpoint; without one, a fresh state.

    The state shares no buffer with `params`, so a step may donate it.
    """
    create = jax.jit(updater.create)
    restored = self.stage.restore(abstract_state(updater, self))
    if restored is not None:
      return restored.state, restored
    return create(jax.tree.map(jnp.copy, self.params)), None

  def progress(self, total: int, start: int = 0) -> Progress:
    """The progress of this stage, over `total` steps of which `start` are done. It also shows what
    the stage's logs newly show of a failure."""
    stream = open(os.devnull, "w") if self.quiet else None  # noqa: SIM115 (as long as the process)
    progress = Progress(self.stage.name, total, start=start, stream=stream)
    self.stage.tell = progress.tell
    return progress


@contextlib.contextmanager
def in_stage(name: str) -> Iterator[None]:
  """Makes the message of a ValueError one line that begins with the stage.

  Grain adds lines on its own to those that come out of a pipeline.
  """
  try:
    yield
  except ValueError as error:
    line = str(error).splitlines()[0]
    where = f"stage {name}: "
    raise ValueError(where + line.removeprefix(where)) from error


def initial_params(context: Context) -> Params:
  """Random parameters, drawn from the seed alone; each device makes its own part."""
  c = context
  make = lambda key: weights.init(key, c.table, c.layout.params, jnp.dtype(c.config.param_dtype))
  return jax.jit(make)(jax.random.key(c.seed))


def abstract_params(context: Context) -> Params:
  """Shapes, dtypes and shardings of the parameters."""
  c = context
  return weights.abstract(c.table, c.layout.params, c.mesh, jnp.dtype(c.config.param_dtype))


def abstract_state(updater: Creator, context: Context) -> Any:
  """Shapes, dtypes and shardings of a train state: what a checkpoint is restored onto."""
  return abstract_created(updater, abstract_params(context), context.mesh)


def abstract_created(updater: Creator, params: Params, mesh: jax.sharding.Mesh) -> Any:
  """Shapes, dtypes and shardings of what `updater` makes of such parameters, on `mesh`, the one in
  context."""

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = (
      x.sharding.spec if x.sharding else jax.P()
    )  # eval_shape gives none where nothing is split
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  return jax.tree.map(place, jax.eval_shape(updater.create, params))
