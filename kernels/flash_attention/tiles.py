"""The blocks that the TPU kernels work in, and what both kernels do within one.

A turn of the grid fetches one block of its row and several of the other side, its parts, so that
what a turn has around its work is shared by them. A block of scores is gone through in tiles, of
which one's scores are computed while the softmax of another is taken. Tiles are [keys, queries].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention.blocks import DIAGONAL, FULL, MOST_PARTS, PARTIAL, kind_of
from kernels.flash_attention.reference import Features

LANES = 128
VMEM_LIMIT = 48 << 20  # the smallest chips have 64 MiB


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes in rows, and blocks of a turn.

  Raises ValueError when a tile does not divide its block or is no whole lanes, and for a number of
  parts that is none.
  """

  q_block: int
  k_block: int
  q_tile: int
  k_tile: int
  parts: int = 1  # blocks of keys (forward) or of queries (backward) of a turn

  def __post_init__(self):
    if not 1 <= self.parts <= MOST_PARTS:
      raise ValueError(f"flash_attention tiles: expected 1 to {MOST_PARTS} parts, found {self}")
    for block, tile in ((self.q_block, self.q_tile), (self.k_block, self.k_tile)):
      if tile < 1 or block % tile or tile % LANES:
        raise ValueError(
          f"flash_attention tiles: expected blocks of whole tiles, tiles of whole {LANES} rows, "
          f"found {self}"
        )

  def within(self, queries: int, keys: int, *, by_keys: bool) -> "Tiles":
    """The same, no larger than that many rows need; `by_keys` for the backward kernel."""
    q_block, q_tile = _fit(self.q_block, self.q_tile, queries)
    k_block, k_tile = _fit(self.k_block, self.k_tile, keys)
    blocks = -(-queries // q_block) if by_keys else -(-keys // k_block)
    turns = -(-blocks // self.parts)
    return Tiles(q_block, k_block, q_tile, k_tile, -(-blocks // turns))


def _fit(block: int, tile: int, rows: int) -> tuple[int, int]:
  rows = -(-rows // LANES) * LANES
  tile = min(tile, rows)
  return min(block, -(-rows // tile) * tile), tile


def walk_parts(
  walk: Callable[[Any, Any], None],
  flag: jax.Array,
  features: Features,
  tiles: Tiles,
  starts: Callable[[Any], Any],
) -> None:
  """Calls walk(part, start) for the live parts of a turn, a loop around code for each kind.

  Args:
    walk: start is None for a whole block, 0 for one cut from corner to corner, or else
      `starts(part)`: rows that the first query stands behind the first key.
    flag: of the entry.
    features, tiles: of the kernel.
    starts: see `walk`.
  """

  def one(part: Any) -> None:
    kind = kind_of(flag, part)
    for found, start in ((FULL, None), (PARTIAL, starts(part)), (DIAGONAL, 0)):
      if found != DIAGONAL or (features.causal and tiles.q_block == tiles.k_block):
        pl.when(kind == found)(functools.partial(walk, part, start))

  if tiles.parts == 1:
    one(0)
  else:
    pl.loop(0, tiles.parts)(one)


class Tile(NamedTuple):
  """A part of a block, or of what a turn fetched."""

  queries: Any  # pl.Slice
  keys: Any


def within_turn(rows: Any, part: int | jax.Array, block: int) -> Any:
  """Rows of a block as rows of what a turn fetched, of which the block is a part."""
  first = part * block + rows.start
  return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, LANES), rows.size)


def steps(features: Features, tiles: Tiles, start: int | jax.Array | None) -> list[Tile]:
  """The tiles of a block, without those that a mask leaves nothing of.

  Args:
    start: rows that the first query stands behind the first key, if it is known when compiled.
  """
  found = []
  for a in range(0, tiles.q_block, tiles.q_tile):
    for c in range(0, tiles.k_block, tiles.k_tile):
      if isinstance(start, int):
        nearest, farthest = start + a - c - tiles.k_tile + 1, start + a - c + tiles.q_tile - 1
        near = None if features.by_position else features.window  # in rows
        if farthest < 0 or (near is not None and nearest >= near):
          continue
      found.append(Tile(pl.ds(a, tiles.q_tile), pl.ds(c, tiles.k_tile)))
  return found


def seen(
  q_ids: jax.Array, k_ids: jax.Array, features: Features, start: int | jax.Array
) -> jax.Array:
  """[keys, queries] of a tile, which of them see each other.

  Args:
    q_ids, k_ids: [1 to 3, queries] and [1 to 2, keys] int32, see `tpu.Where`.
    features: causal and window are read.
    start: rows that the first query of the tile stands behind its first key.
  """
  shape = (k_ids.shape[1], q_ids.shape[1])
  column = lambda row: jnp.broadcast_to(row, (8, shape[0])).T[:, :1]
  keys = column(jnp.where(k_ids[:1] < 0, -2, k_ids[:1]))
  queries = jnp.where(q_ids < 0, -1, q_ids)
  found = keys == queries[:1]
  if q_ids.shape[0] > 1:
    found |= keys == queries[1:2]
  if features.causal:
    iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    ago = iota(1) - iota(0)
    found &= ago >= -start
    if features.window is not None and features.by_position:
      found &= q_ids[2:] - column(k_ids[1:]) < features.window
    elif features.window is not None:
      found &= ago < features.window - start
  return found


def dot(a: jax.Array, b: jax.Array, contract: Sequence[int]) -> jax.Array:
  """Product of two matrices over the named axis of each, in float32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def in_hbm(x: jax.Array) -> jax.Array:
  """An input of a kernel that XLA may not put into VMEM. It does so with small arrays, and what
  copies of their blocks were DMAs beside the work are then loads and stores before it."""
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def compiler_params(*dimensions: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
  """Of both kernels. The scheduler by linear programming spills half as many registers: 4,914
  instead of 5,524 cycles of a block of 1024 on v5e, 2,854 instead of 3,124 on v6e (static)."""
  return pltpu.CompilerParams(
    dimension_semantics=dimensions,
    vmem_limit_bytes=VMEM_LIMIT,
    flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True},
    disable_bounds_checks=True,
    disable_semaphore_checks=True,
  )
