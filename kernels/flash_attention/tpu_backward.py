"""The backward kernel for TPU: gradients of queries, keys and values in one pass over live blocks.

With P = exp(X - lse): dV = P' dO, dX = P (dO V' - delta), dQ = dX K, dK = dX' Q, where
delta = rowsum(dO O) - dlse (arXiv 2307.08691). Tiles of scores are [keys, queries] as in the
forward kernel, and gradients are computed with tokens along lanes, so that all three products with
a tile of scores have whole tokens as their columns.

The grid walks along key heads, live blocks ordered by keys, several blocks of queries a turn, and
the query heads of a group. The gradients of a block of keys add up in VMEM; those of queries add up
in HBM in float32, by way of VMEM (`kernels.flash_attention.exchange`). What a row of keys begins
and ends with is done where its tiles are computed, whose cycles are those of the matrix units: the
first block's sums take nothing from what VMEM holds, and every block rounds the sums so far into
the block of results, of which the last one's are kept.

Letters: B batch, H query heads, G key heads, S queries, T keys, K head width, V value width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_tile
from kernels.flash_attention import cost, exchange
from kernels.flash_attention import tiles as tiling
from kernels.flash_attention.blocks import FIRST, batch_of, block_of, is_dead, live_blocks
from kernels.flash_attention.exchange import Turn
from kernels.flash_attention.reference import MASKED, Features
from kernels.flash_attention.tiles import Tiles


class Inputs(NamedTuple):
  """What the kernel reads: arrays, the specs of their blocks, or references to blocks."""

  q_ids: Any  # [B, 1 to 3, S] int32, see `tpu.Where`
  k_ids: Any  # [B, 1 to 2, T] int32
  q: Any  # [B, H, K, S], multiplied by `attention_tile.query_factor`
  d_out: Any  # [B, H, V, S]
  rows: Any  # [B, H, 2, S] float32: lse in base 2, -MASKED for a query that sees nothing; delta
  k: Any  # [B, G, T, K]
  k_columns: Any  # [B, G, K, T], the same
  v: Any  # [B, G, T, V]


class Gradients(NamedTuple):
  """What a block of keys adds to: shapes, or references."""

  dk: Any  # [K, k_block] float32
  dv: Any  # [V, k_block] float32
  fresh: Any  # [1] int32 in SMEM: whether nothing was added yet


@functools.partial(jax.jit, static_argnames=("features", "tiles"))
def backward(
  x: Inputs, q_offset: jax.Array, features: Features, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of the products' operands.

  Args:
    x: S is whole turns of the tiles, T whole blocks.
    q_offset: [] int32.
    features, tiles: those of the forward pass; tiles may be others.

  Returns:
    (dq [B, H, K, S] float32, dk [B, G, K, T], dv [B, G, V, T]): by the logits' natural products
    scale q k; the caller multiplies dq by the scale.
  """
  (batch, heads, width, _), (_, groups, keys, _) = x.q.shape, x.k.shape
  value_width, share = x.v.shape[3], heads // groups
  live = live_blocks(
    x.q_ids,
    x.k_ids,
    q_offset,
    features,
    tiles.q_block,
    tiles.k_block,
    by_keys=True,
    parts=tiles.parts,
  )
  queries = tiles.parts * tiles.q_block
  q_map = lambda g, i, r, row, other, *_: (batch_of(row[i]), g * share + r, 0, other[i])
  k_map = lambda g, i, r, row, *_: (batch_of(row[i]), g, block_of(row[i]), 0)
  k_column_map = lambda g, i, r, row, *_: (batch_of(row[i]), g, 0, block_of(row[i]))
  per_query = lambda size: pl.BlockSpec((None, None, size, queries), q_map)
  per_key = lambda size: pl.BlockSpec((None, None, tiles.k_block, size), k_map)
  columns = lambda size: pl.BlockSpec((None, None, size, tiles.k_block), k_column_map)
  ids = lambda x, block, where: pl.BlockSpec((None, x.shape[1], block), where)
  in_specs = Inputs(
    q_ids=ids(x.q_ids, queries, lambda g, i, r, row, other, *_: (batch_of(row[i]), 0, other[i])),
    k_ids=ids(
      x.k_ids, tiles.k_block, lambda g, i, r, row, *_: (batch_of(row[i]), 0, block_of(row[i]))
    ),
    q=per_query(width),
    d_out=per_query(value_width),
    rows=per_query(2),
    k=per_key(width),
    k_columns=columns(width),
    v=per_key(value_width),
  )
  where = {"manual_axis_type": jax.typeof(x.q).manual_axis_type}  # in a shard_map
  vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)
  scale = features.scale / attention_tile.query_factor(features.scale, features.soft_cap)
  zeros = jnp.zeros(x.q.shape, jnp.float32) + jnp.zeros_like(x.q)
  return pl.pallas_call(
    functools.partial(_kernel, features=features, tiles=tiles, share=share, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(groups, live.count, share),
      in_specs=[*in_specs, pl.BlockSpec(memory_space=pltpu.HBM)],
      out_specs=[pl.BlockSpec(memory_space=pltpu.HBM), columns(width), columns(value_width)],
      scratch_shapes=(
        Gradients(
          vmem(width, tiles.k_block), vmem(value_width, tiles.k_block), pltpu.SMEM((1,), jnp.int32)
        ),
        exchange.scratch(width, queries),
      ),
    ),
    out_shape=[
      jax.ShapeDtypeStruct(x.q.shape, jnp.float32, **where),
      jax.ShapeDtypeStruct((batch, groups, width, keys), x.k.dtype, **where),
      jax.ShapeDtypeStruct((batch, groups, value_width, keys), x.v.dtype, **where),
    ],
    input_output_aliases={4 + len(x): 0},
    compiler_params=tiling.compiler_params("parallel", "arbitrary", "arbitrary"),
    cost_estimate=cost.backward(x, features, tiles),
    name="flash_attention_backward",
  )(live.row, live.other, live.flags, q_offset.reshape(1), *map(tiling.in_hbm, (*x, zeros)))


def _kernel(row, other, flags, offset, *refs, features, tiles, share, scale):
  x, (_, dq_hbm, dk, dv, sums, state) = Inputs(*refs[:8]), refs[8:]
  g, i, r = (pl.program_id(axis) for axis in range(3))
  flag = flags[i]
  fresh = (flag & FIRST != 0) & (r == 0)
  sums.fresh[0] = jnp.where(fresh, 1, sums.fresh[0])

  @pl.when(fresh & is_dead(flag))
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  queries = tiles.parts * tiles.q_block

  def sums_of(i, r):
    rows = pl.ds(pl.multiple_of(other[i] * queries, queries), queries)
    return dq_hbm.at[batch_of(row[i]), g * share + r, :, rows]

  here, there = (i, r), _next_turn(i, r, share)
  turn = _turn(row, other, here, there, share)
  place = exchange.begin(state, turn, lambda: sums_of(*here), lambda: sums_of(*there))
  first = offset[0] + other[i] * queries - block_of(row[i]) * tiles.k_block
  walk = functools.partial(_walk, x, sums, (dk, dv), state.sums.at[place], features, tiles, scale)
  starts = lambda part: first + part * tiles.q_block
  tiling.walk_parts(walk, flag, features, tiles, starts)
  exchange.end(state, turn, lambda: sums_of(*here))


def _next_turn(i, r, share: int) -> tuple[jax.Array, jax.Array]:
  """Entry and query head of the next turn; of this one where there is none."""
  last = pl.num_programs(1) - 1
  if share == 1:
    return jnp.minimum(i + 1, last), r
  wraps = r + 1 == share
  return jnp.where(wraps, jnp.minimum(i + 1, last), i), jnp.where(wraps, 0, r + 1)


def _turn(row, other, here, there, share: int) -> Turn:
  """What `exchange` asks of a turn."""
  (i, r), (after, r_after) = here, there
  before = jnp.maximum(i - 1, 0)
  same = lambda a, b: (batch_of(row[a]) == batch_of(row[b])) & (other[a] == other[b])
  first = (i == 0) & (r == 0)
  last = (i == pl.num_programs(1) - 1) & (r == share - 1)
  return Turn(
    first=first,
    last=last,
    again=(share == 1) & same(i, before) & ~first,
    keeps=(share == 1) & same(i, after) & ~last,
    block=other[i] * share + r,
    following=other[after] * share + r_after,
  )


def _walk(x: Inputs, sums: Gradients, results, dq, features, tiles: Tiles, scale, part, start):
  """All tiles of a block that may hold something, masked unless `start` is None; the products of
  the next are computed one turn ahead."""
  steps = tiling.steps(features, tiles, start)
  queries = lambda tile: tiling.within_turn(tile.queries, part, tiles.q_block)
  fresh = sums.fresh[0] != 0
  ahead = _products(x, queries(steps[0]), steps[0].keys)
  for n, tile in enumerate(steps):
    product, d_weights = ahead
    if n + 1 < len(steps):
      ahead = _products(x, queries(steps[n + 1]), steps[n + 1].keys)
    a, c = queries(tile), tile.keys
    here = None if start is None else start + tile.queries.start - c.start
    weights, d_logits = _scores(x, a, c, product, d_weights, features, here)
    first = all(before.keys.start != c.start for before in steps[:n])
    last = all(behind.keys.start != c.start for behind in steps[n + 1 :])
    by_keys = (tiling.dot(x.q[:, a], d_logits, (1, 1)), tiling.dot(x.d_out[:, a], weights, (1, 1)))
    for total, result, more, factor in zip(sums, results, by_keys, (scale, 1.0)):
      so_far = jnp.where(fresh, 0.0, total[:, c]) if first else total[:, c]
      total[:, c] = so_far + more
      if last:
        result[:, c] = (total[:, c] * factor).astype(result.dtype)
    dq[:, a] += tiling.dot(x.k_columns[:, c], d_logits, (1, 0))
  sums.fresh[0] = 0


def _products(x: Inputs, queries, keys) -> tuple[jax.Array, jax.Array]:
  """q k and dO v of a tile, [keys, queries]."""
  dot = functools.partial(tiling.dot, contract=(1, 0))
  return dot(x.k[keys, :], x.q[:, queries]), dot(x.v[keys, :], x.d_out[:, queries])


def _scores(x: Inputs, a, c, product, d_weights, features: Features, start):
  """The weights of a tile and the gradients of its logits, of queries `a` and keys `c`; masked
  unless `start` is None."""
  logits = attention_tile.logits(product, features.soft_cap)
  if start is not None:
    seen = tiling.seen(x.q_ids[:, a], x.k_ids[:, c], features, start)
    logits = jnp.where(seen, logits, MASKED)
  weights = jnp.exp2(logits - x.rows[:1, a])
  d_logits = weights * (d_weights - x.rows[1:, a])
  if features.soft_cap is not None:
    d_logits *= 1 - jnp.square(jnp.tanh(product))
  return weights.astype(x.v.dtype), d_logits.astype(x.q.dtype)
