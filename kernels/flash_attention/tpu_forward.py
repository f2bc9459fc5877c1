"""The forward kernel for TPU.

Tiles of scores are [keys, queries]: maxima and sums over keys are element-wise over registers, what
belongs to a query is a row of lanes, and the product with the values has whole queries as its
columns, so that a head of 128 fills a matrix unit of 256 (which [queries, keys] tiles leave half
empty). The grid walks along heads and live blocks, several blocks of keys a turn.

Letters: B batch, H query heads, G key heads, S queries, T keys, K head width, V value width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_tile
from kernels.flash_attention import cost
from kernels.flash_attention import tiles as tiling
from kernels.flash_attention.blocks import FIRST, LAST, batch_of, block_of, live_blocks
from kernels.flash_attention.reference import MASKED, Features
from kernels.flash_attention.tiles import Tiles


@functools.partial(jax.jit, static_argnames=("features", "tiles"))
def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_ids: jax.Array,
  k_ids: jax.Array,
  q_offset: jax.Array,
  sinks: jax.Array | None,
  features: Features,
  tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
  """Attention of whole blocks.

  Args:
    q: [B, H, K, S], multiplied by `attention_tile.query_factor`.
    k: [B, G, T, K].
    v: [B, G, V, T].
    q_ids, k_ids: [B, 1 to 3, S] and [B, 1 to 2, T] int32, see `tpu.Where`.
    q_offset: [] int32.
    sinks: [H] float32, in base 2.
    features, tiles: S is whole blocks of the tiles, T whole turns of them.

  Returns:
    (out [B, H, V, S], lse [B, H, 1, S] float32).
  """
  (batch, heads, width, queries), groups = q.shape, k.shape[1]
  value_width, share = v.shape[2], heads // groups
  sizes = (tiles.q_block, tiles.k_block)
  live = live_blocks(q_ids, k_ids, q_offset, features, *sizes, by_keys=False, parts=tiles.parts)
  fetched = tiles.parts * tiles.k_block
  q_map = lambda h, i, row, other, *_: (batch_of(row[i]), h, 0, block_of(row[i]))
  per_query = lambda size: pl.BlockSpec((None, None, size, tiles.q_block), q_map)
  k_map = lambda h, i, row, other, *_: (batch_of(row[i]), jax.lax.div(h, share), other[i], 0)
  v_map = lambda h, i, row, other, *_: (batch_of(row[i]), jax.lax.div(h, share), 0, other[i])
  in_specs = [
    pl.BlockSpec(
      (None, q_ids.shape[1], tiles.q_block),
      lambda h, i, row, *_: (batch_of(row[i]), 0, block_of(row[i])),
    ),
    pl.BlockSpec(
      (None, k_ids.shape[1], fetched),
      lambda h, i, row, other, *_: (batch_of(row[i]), 0, other[i]),
    ),
    per_query(width),
    pl.BlockSpec((None, None, fetched, width), k_map),
    pl.BlockSpec((None, None, value_width, fetched), v_map),
  ]
  inputs = [tiling.in_hbm(x) for x in (q_ids, k_ids, q, k, v)]
  if sinks is not None:
    in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    inputs.append(sinks)
  where = {"manual_axis_type": jax.typeof(q).manual_axis_type}  # in a shard_map
  return pl.pallas_call(
    functools.partial(_kernel, features=features, tiles=tiles, sinks=sinks is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(heads, live.count),
      in_specs=in_specs,
      out_specs=[per_query(value_width), per_query(1)],
      scratch_shapes=[
        pltpu.VMEM((1, tiles.q_block), jnp.float32),
        pltpu.VMEM((1, tiles.q_block), jnp.float32),
        pltpu.VMEM((value_width, tiles.q_block), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, heads, value_width, queries), v.dtype, **where),
      jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32, **where),
    ],
    compiler_params=tiling.compiler_params("parallel", "arbitrary"),
    cost_estimate=cost.forward(q, k, v, features, tiles),
    name="flash_attention_forward",
  )(live.row, live.other, live.flags, q_offset.reshape(1), *inputs)


def _kernel(row, other, flags, offset, q_ids, k_ids, q, k, v, *refs, features, tiles, sinks):
  sink, (out, lse, top, total, acc) = (refs[0], refs[1:]) if sinks else (None, refs)
  i = pl.program_id(1)
  flag = flags[i]

  @pl.when(flag & FIRST != 0)
  def _():
    start = MASKED if sink is None else sink[pl.program_id(0)]
    top[...] = jnp.full(top.shape, start, jnp.float32)
    total[...] = jnp.full(total.shape, 0.0 if sink is None else 1.0, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)

  first = offset[0] + block_of(row[i]) * tiles.q_block - other[i] * tiles.parts * tiles.k_block
  walk = functools.partial(_walk, q_ids, k_ids, q, k, v, top, total, acc, features, tiles)
  starts = lambda part: first - part * tiles.k_block
  tiling.walk_parts(walk, flag, features, tiles, starts)

  @pl.when(flag & LAST != 0)
  def _():
    values, log_sum = attention_tile.finish(acc[...], top[...], total[...])
    out[...] = values.astype(out.dtype)
    lse[...] = log_sum


def _walk(q_ids, k_ids, q, k, v, top, total, acc, features: Features, tiles: Tiles, part, start):
  """All tiles of a block that may hold something, masked unless `start` is None. While a tile's
  softmax is taken, the matrix units have the scores of the next and the values of the last."""
  dot = functools.partial(tiling.dot, contract=(1, 0))
  steps = tiling.steps(features, tiles, start)
  keys = lambda tile: tiling.within_turn(tile.keys, part, tiles.k_block)
  product = lambda tile: dot(k[keys(tile), :], q[:, tile.queries])
  ahead = product(steps[0])
  behind: tuple[Any, ...] = ()  # queries and keys of the tile before, its weights and fade
  for n, tile in enumerate(steps):
    a, c = tile
    x = attention_tile.logits(ahead, features.soft_cap)
    if start is not None:
      here = start + a.start - c.start
      x = jnp.where(tiling.seen(q_ids[:, a], k_ids[:, keys(tile)], features, here), x, MASKED)
    if n + 1 < len(steps):
      ahead = product(steps[n + 1])
    if behind:
      _collect(v, acc, *behind)
    weights, top[:, a], total[:, a], fade = attention_tile.update(x, top[:, a], total[:, a], axis=0)
    behind = (a, keys(tile), weights.astype(v.dtype), fade)
  _collect(v, acc, *behind)


def _collect(v, acc, queries, keys, weights: jax.Array, fade: jax.Array) -> None:
  """The values of a tile join the sum."""
  acc[:, queries] = acc[:, queries] * fade + tiling.dot(v[:, keys], weights, (1, 0))
