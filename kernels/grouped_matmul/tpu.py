"""Pallas kernels for TPU: a grouped product, and the product by group that is its gradient.

Both visit (group, tile of rows) pairs in the order of the rows. A tile that several groups share is
visited once for each, and every visit keeps to the rows of its group. Which pairs there are is
known at run time only; their number is bounded by tiles + groups, and visits past the last one do
nothing. K is not cut in the grouped product: a tile of rows and one of a matrix hold all of it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import chip as chips
from kernels import tiles as table
from kernels import varying

ROWS_MULTIPLE = 16  # of a bfloat16 tile
LANES = 128


def tiles_of(tiles: tuple[tuple[str, int], ...] | None, chip: str) -> dict[str, int]:
  """The caller's tiles, or those of the table."""
  return dict(tiles) if tiles else table.find("grouped_matmul", chip)


def visits(group_sizes: jax.Array, rows: int, tile: int, every: bool) -> tuple[jax.Array, ...]:
  """The pairs of groups and tiles that have rows in common, in order.

  Args:
    group_sizes: [G] int32.
    rows: of all groups, a multiple of `tile`.
    tile: rows of a tile.
    every: whether a group without rows is visited too, once.

  Returns:
    group and tile of each visit [rows / tile + G], starts and ends [G] of the groups' rows, and
    the number of visits [1]. Those past the last one repeat it.
  """
  count, groups = rows // tile, group_sizes.shape[0]
  ends = jnp.cumsum(group_sizes)
  starts = ends - group_sizes
  first = jnp.minimum(starts // tile, count - 1)
  each = jnp.where(group_sizes > 0, (ends + tile - 1) // tile - starts // tile, int(every))
  until = jnp.cumsum(each)
  visit = jnp.minimum(jnp.arange(count + groups), until[-1] - 1)
  group = jnp.searchsorted(until, visit, side="right").astype(jnp.int32)
  at = first[group] + visit - (until - each)[group]
  return group, at.astype(jnp.int32), starts, ends, until[-1:]


def product(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  transpose_rhs: bool,
  tiles: dict[str, int],
  chip: str,
) -> jax.Array:
  """lhs [M, K], rhs [G, K, N] (or [G, N, K]) -> [M, N] in the dtype of lhs."""
  count, depth = lhs.shape
  width = rhs.shape[1 if transpose_rhs else 2]
  rows = min(tiles["rows"], _round_up(count, ROWS_MULTIPLE))
  columns = _columns(width, tiles["columns"])
  lhs = _pad_rows(lhs, rows)
  # What is behind the last group is a group of its own, whose rows are 0.
  rest = lhs.shape[0] - group_sizes.sum(keepdims=True)
  prefetched = visits(jnp.concatenate([group_sizes, rest]), lhs.shape[0], rows, False)
  groups = rhs.shape[0]
  of = lambda group: jnp.minimum(group, groups - 1)
  matrix = (columns, depth) if transpose_rhs else (depth, columns)
  where = (lambda n: (n, 0)) if transpose_rhs else (lambda n: (0, n))
  out = pl.pallas_call(
    functools.partial(_product_kernel, groups=groups, transpose_rhs=transpose_rhs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetched),
      grid=(pl.cdiv(width, columns), prefetched[0].shape[0]),
      in_specs=[
        pl.BlockSpec((rows, depth), lambda n, v, group, tile, *_: (tile[v], 0)),
        pl.BlockSpec((None, *matrix), lambda n, v, group, *_: (of(group[v]), *where(n))),
      ],
      out_specs=pl.BlockSpec((rows, columns), lambda n, v, group, tile, *_: (tile[v], n)),
    ),
    out_shape=varying.out((lhs.shape[0], width), lhs.dtype, lhs, rhs, group_sizes),
    compiler_params=_parameters(chip, ("parallel", "arbitrary")),
    cost_estimate=_cost(lhs, rhs, (lhs.shape[0], width), pl.cdiv(width, columns), 1),
    name="grouped_matmul",
  )(*prefetched, lhs, rhs)
  return out[:count]


def product_by_group(
  lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, tiles: dict[str, int], chip: str
) -> jax.Array:
  """lhs [M, K], rhs [M, N] -> [G, K, N]: lhs^T rhs of a group's rows, 0 for an empty group."""
  rows = min(tiles["rows"], _round_up(lhs.shape[0], ROWS_MULTIPLE))
  depth = _columns(lhs.shape[1], tiles["depth"])
  columns = _columns(rhs.shape[1], tiles["columns"])
  lhs, rhs = _pad_rows(lhs, rows), _pad_rows(rhs, rows)
  prefetched = visits(group_sizes, lhs.shape[0], rows, True)
  shape = (group_sizes.shape[0], lhs.shape[1], rhs.shape[1])
  block = lambda k, n, v, group, *_: (group[v], k, n)
  return pl.pallas_call(
    _by_group_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetched),
      grid=(pl.cdiv(shape[1], depth), pl.cdiv(shape[2], columns), prefetched[0].shape[0]),
      in_specs=[
        pl.BlockSpec((rows, depth), lambda k, n, v, group, tile, *_: (tile[v], k)),
        pl.BlockSpec((rows, columns), lambda k, n, v, group, tile, *_: (tile[v], n)),
      ],
      out_specs=pl.BlockSpec((None, depth, columns), block),
      scratch_shapes=[pltpu.VMEM((depth, columns), jnp.float32)],
    ),
    out_shape=varying.out(shape, lhs.dtype, lhs, rhs, group_sizes),
    compiler_params=_parameters(chip, ("parallel", "parallel", "arbitrary")),
    cost_estimate=_cost(lhs, rhs, shape, pl.cdiv(shape[2], columns), pl.cdiv(shape[1], depth)),
    name="grouped_matmul_by_group",
  )(*prefetched, lhs, rhs)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _columns(size: int, most: int) -> int:
  """Columns of a tile: the most that divide them all into equal tiles of whole lanes, where that is
  possible; the last tile is not full otherwise."""
  whole = _round_up(size, LANES)
  tiles = -(-whole // max(most, LANES))
  return _round_up(-(-whole // tiles), LANES)


def _pad_rows(x: jax.Array, multiple: int) -> jax.Array:
  more = -x.shape[0] % multiple
  return jnp.pad(x, ((0, more), (0, 0))) if more else x


def _cost(lhs, rhs, out: tuple[int, ...], lhs_times: int, rhs_times: int) -> pl.CostEstimate:
  """2 M K N FLOPs: as if every row were in a group. Each operand is fetched so many times."""
  size = lambda x: x.size * x.dtype.itemsize
  return pl.CostEstimate(
    flops=2 * lhs.size * out[-1],
    transcendentals=0,
    bytes_accessed=lhs_times * size(lhs)
    + rhs_times * size(rhs)
    + math.prod(out) * lhs.dtype.itemsize,
  )


def _parameters(chip: str, semantics) -> pltpu.CompilerParams:
  limit = chips.get(chip).vmem_bytes * 15 // 16
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _mine(tile, start, end, shape: tuple[int, ...]) -> jax.Array:
  """Which rows of a tile are those of a group."""
  row = tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= start) & (row < end)


def _product_kernel(
  group_ref, tile_ref, start_ref, end_ref, count_ref, lhs_ref, rhs_ref, out_ref, *, groups,
  transpose_rhs
):  # fmt: skip
  v = pl.program_id(1)
  group, tile = group_ref[v], tile_ref[v]

  @pl.when((v == 0) | (tile_ref[jnp.maximum(v - 1, 0)] != tile))
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  @pl.when((v < count_ref[0]) & (group < groups))
  def _():
    found = _dot(lhs_ref[...], rhs_ref[...], (1, 1) if transpose_rhs else (1, 0))
    mine = _mine(tile, start_ref[group], end_ref[group], found.shape)
    out_ref[...] = jnp.where(mine, found, out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)


def _by_group_kernel(
  group_ref, tile_ref, start_ref, end_ref, count_ref, lhs_ref, rhs_ref, out_ref, sum_ref
):
  v, last = pl.program_id(2), pl.num_programs(2) - 1
  group, tile = group_ref[v], tile_ref[v]

  @pl.when((v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(v < count_ref[0])
  def _():
    start, end = start_ref[group], end_ref[group]
    own = lambda x: jnp.where(_mine(tile, start, end, x.shape), x, 0)  # 0 NaN would be NaN
    sum_ref[...] += _dot(own(lhs_ref[...]), own(rhs_ref[...]), (0, 0))

  @pl.when((v == last) | (group_ref[jnp.minimum(v + 1, last)] != group))
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)
