"""The programs of the rollout engine of an online stage, with abstract arguments: taking weights,
prefill and decode.

Assumed is the fullest round: every slot is taken, prompts are as long as the row leaves room for
beside a completion, completions as long as they may be, so a token that is drawn reads the keys
and values of a prompt and of half a completion on average. A group's prompt is computed once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pt_jax.experiment import Online
from pt_jax.models.config import ModelConfig
from pt_jax.plan import estimate
from pt_jax.plan.program import Program
from pt_jax.rollout import batches, cache, programs
from pt_jax.rollout.engine import CHUNK, LAUNCH, shapes_of
from pt_jax.rollout.sampling import Needs
from pt_jax.weights import Params

WEIGHTS, PAGES = "engine weights", "KV cache pages"
KEY = 2  # uint32 words of a PRNG key


@dataclasses.dataclass(frozen=True)
class Round:
  """What the engine does for one step of a stage, at most."""

  config: ModelConfig
  stage: Online
  shapes: batches.Shapes

  @property
  def prompt(self) -> int:
    """Tokens of a prompt."""
    return max(1, self.stage.row_length - self.stage.sampling.max_tokens)

  @property
  def completion(self) -> int:
    """Tokens of a completion."""
    return self.stage.row_length - self.prompt

  @property
  def cached(self) -> int:
    """Tokens that a drawn one attends to, on average."""
    return self.prompt + self.completion // 2

  @property
  def launches(self) -> int:
    """Calls of the decode program: completions that find no slot wait for the next wave."""
    samples = self.stage.prompts * self.stage.group_size
    return math.ceil(samples / self.stage.slots) * math.ceil(self.completion / LAUNCH)

  @property
  def chunks(self) -> int:
    """Calls of the prefill program."""
    return math.ceil(self.stage.prompts * self.prompt / (self.shapes.parts * CHUNK))


def round_of(config: ModelConfig, stage: Online, sizes: Mapping[str, int]) -> Round:
  """The engine that the stage makes on a mesh of these sizes.

  Raises ValueError when the mesh does not divide its slots.
  """
  parts = sizes["data"] * sizes["expert"]
  return Round(config, stage, shapes_of(config, stage.slots, stage.row_length, parts))


def residents(config: ModelConfig, stage: Online, params: Params, mesh: jax.sharding.Mesh):
  """Name -> abstract tree of what the engine keeps in memory, while the stage trains too."""
  shapes = round_of(config, stage, mesh.shape).shapes
  take = functools.partial(programs.use_layout, config=config)
  # The last page of each part is no sequence's.
  pages = functools.partial(cache.empty, config, shapes.parts * (shapes.pages + 1), shapes.rows)
  return {WEIGHTS: _placed(mesh, take, params), PAGES: _placed(mesh, pages)}


def _placed(mesh: jax.sharding.Mesh, function: Callable[..., Any], *args: Any) -> Any:
  """What a function returns, abstract, with shardings on `mesh`."""
  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
  )
  return jax.tree.map(place, jax.eval_shape(function, *args))


def engine_programs(
  config: ModelConfig, stage: Online, held: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> list[Program]:
  """Taking new weights, prefill and decode. Call it inside `jax.set_mesh(mesh)`.

  Args:
    config: the model.
    stage: its engine is that of `loops.evaluation.new_engine`.
    held: what is in memory, `residents` and the parameters among it, by name.
    mesh: over the devices that are planned for.
  """
  work = round_of(config, stage, mesh.shape)
  made = _Made(work, held)
  return [made.take(), made.prefill(mesh.shape["tensor"]), made.decode(mesh.shape["tensor"])]


@dataclasses.dataclass(frozen=True)
class _Made:
  """What the programs of an engine are made of."""

  work: Round
  held: Mapping[str, Any]

  def take(self) -> Program:
    """The old weights are gone before the new ones come."""
    function = jax.jit(functools.partial(programs.use_layout, config=self.work.config))
    held = {name: tree for name, tree in self.held.items() if name != WEIGHTS}
    return Program("weights to the engine", "transfer", function, (held["parameters"],), {}, held)

  def prefill(self, tensor: int) -> Program:
    work, c, shapes = self.work, self.work.config, self.work.shapes
    tokens = shapes.parts * CHUNK

    def whole(*shape: int) -> Any:
      return jax.ShapeDtypeStruct((shapes.parts, *shape), jnp.int32)

    chunk = programs.Chunk(
      tokens=whole(CHUNK),
      positions=whole(CHUNK),
      lengths=whole(shapes.slots),
      table=whole(shapes.slots, shapes.pages_per_sample),
      starts=whole(shapes.slots + 1),
    )
    return Program(
      name="prefill",
      kind="prefill",
      function=programs.prefill,
      args=(self.held[WEIGHTS], self.held[PAGES], chunk),
      given={"config": c, "limit": shapes.max_length},
      held=self.held,
      tokens=tokens,
      model_flops=tokens * estimate.prefill_flops(c, work.prompt),
      calls=work.chunks,
      kernel=estimate.prefill_attention(c, CHUNK, work.prompt, tensor),
      note=f"{CHUNK} tokens of prompts of {work.prompt:,} in each of {shapes.parts} parts",
    )

  def decode(self, tensor: int) -> Program:
    work, c, shapes = self.work, self.work.config, self.work.shapes
    rows = shapes.parts * shapes.slots
    sampling = work.stage.sampling
    return Program(
      name="decode",
      kind="decode",
      function=programs.launch,
      args=(
        *(self.held[WEIGHTS], self.held[PAGES], _rows(rows, shapes, len(sampling.stop_tokens))),
        *(jax.ShapeDtypeStruct((), jnp.int32),) * 3,
      ),
      given={
        "config": c,
        "needs": Needs.of(sampling),
        "tokens": LAUNCH,
        "limit": shapes.max_length,
      },
      held=self.held,
      tokens=rows * LAUNCH,
      trips=LAUNCH,
      model_flops=rows * LAUNCH * estimate.decode_flops(c, work.cached),
      calls=work.launches,
      kernel=estimate.decode_attention(c, shapes.slots, work.cached, tensor),
      note=f"{LAUNCH} tokens of each of {rows:,} samples, {work.cached:,} of each cached",
    )


def _rows(count: int, shapes: batches.Shapes, stops: int) -> programs.Rows:
  """Abstract rows of a launch on pages, none of them under a mask."""

  def leaf(dtype: Any, *more: int) -> Any:
    return jax.ShapeDtypeStruct((count, *more), dtype)

  numbers = ("token", "position", "end", "number", "top_k")
  return programs.Rows(
    **{name: leaf(jnp.int32) for name in numbers},
    **{name: leaf(jnp.float32) for name in ("temperature", "top_p", "min_p")},
    active=leaf(jnp.bool),
    key=leaf(jnp.uint32, KEY),
    stop_tokens=leaf(jnp.int32, batches.stop_room(stops)),
    table=leaf(jnp.int32, shapes.pages_per_sample),
    allowed=None,
  )
