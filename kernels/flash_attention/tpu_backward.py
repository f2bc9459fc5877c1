"""The backward kernel for TPU: gradients of queries, keys and values in one pass over live blocks.

With P = exp(X - lse): dV = P' dO, dX = P (dO V' - delta), dQ = dX K, dK = dX' Q, where
delta = rowsum(dO O) - dlse (arXiv 2307.08691). Tiles of scores are [keys, queries] as in the
forward kernel, and gradients are computed with tokens along lanes, so that all three products with
a tile of scores have whole tokens as their columns.

The grid walks along key heads, live blocks ordered by keys, and the query heads of a group. The
gradients of a block of keys add up in VMEM; those of queries add up in HBM in float32: a turn
fetches its block of them while it computes, adds, and sends the sum back during the next turn.

Letters: B batch, H query heads, G key heads, S queries, T keys, K head width, V value width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_tile
from kernels.flash_attention import cost
from kernels.flash_attention import tiles as tiling
from kernels.flash_attention.blocks import (
  DIAGONAL,
  FIRST,
  FULL,
  LAST,
  PARTIAL,
  batch_of,
  block_of,
  live_blocks,
)
from kernels.flash_attention.reference import MASKED, Features
from kernels.flash_attention.tiles import Tiles


class Inputs(NamedTuple):
  """What the kernel reads: arrays, the specs of their blocks, or references to blocks."""

  q_ids: Any  # [B, 1 to 3, S] int32, see `tpu.Where`
  k_ids: Any  # [B, 1 to 2, T] int32
  q: Any  # [B, H, K, S], multiplied by `attention_tile.query_factor`
  d_out: Any  # [B, H, V, S]
  lse: Any  # [B, H, 1, S] float32, in base 2, -MASKED for a query that sees nothing
  delta: Any  # [B, H, 1, S] float32
  k: Any  # [B, G, T, K]
  k_columns: Any  # [B, G, K, T], the same
  v: Any  # [B, G, T, V]


class Sums(NamedTuple):
  """What a turn adds to in VMEM: shapes or references."""

  dq: Any  # [K, q_block] float32, of this turn
  dk: Any  # [K, k_block] float32
  dv: Any  # [V, k_block] float32


class Exchange(NamedTuple):
  """The way of the queries' gradients between HBM and VMEM: shapes or references."""

  fetched: Any  # [K, q_block] float32
  sent: Any  # [K, q_block] float32
  fetching: Any  # semaphores
  sending: Any
  pending: Any  # [1] int32 in SMEM: whether a sum is on its way


def backward(
  x: Inputs, q_offset: jax.Array, features: Features, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of the products' operands.

  Args:
    x: S and T are whole blocks of the tiles.
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
  )
  q_map = lambda g, i, r, row, other, *_: (batch_of(row[i]), g * share + r, 0, other[i])
  k_map = lambda g, i, r, row, *_: (batch_of(row[i]), g, block_of(row[i]), 0)
  k_column_map = lambda g, i, r, row, *_: (batch_of(row[i]), g, 0, block_of(row[i]))
  per_query = lambda size: pl.BlockSpec((None, None, size, tiles.q_block), q_map)
  per_key = lambda size: pl.BlockSpec((None, None, tiles.k_block, size), k_map)
  columns = lambda size: pl.BlockSpec((None, None, size, tiles.k_block), k_column_map)
  ids = lambda x, block, where: pl.BlockSpec((None, x.shape[1], block), where)
  in_specs = Inputs(
    q_ids=ids(
      x.q_ids, tiles.q_block, lambda g, i, r, row, other, *_: (batch_of(row[i]), 0, other[i])
    ),
    k_ids=ids(
      x.k_ids, tiles.k_block, lambda g, i, r, row, *_: (batch_of(row[i]), 0, block_of(row[i]))
    ),
    q=per_query(width),
    d_out=per_query(value_width),
    lse=per_query(1),
    delta=per_query(1),
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
        Sums(
          vmem(width, tiles.q_block), vmem(width, tiles.k_block), vmem(value_width, tiles.k_block)
        ),
        Exchange(
          vmem(width, tiles.q_block),
          vmem(width, tiles.q_block),
          pltpu.SemaphoreType.DMA,
          pltpu.SemaphoreType.DMA,
          pltpu.SMEM((1,), jnp.int32),
        ),
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
  )(live.row, live.other, live.flags, q_offset.reshape(1), *x, zeros)


def _kernel(row, other, flags, offset, *refs, features, tiles, share, scale):
  x, (_, dq_hbm, dk, dv, sums, exchange) = Inputs(*refs[:9]), refs[9:]
  g, i, r = (pl.program_id(axis) for axis in range(3))
  flag = flags[i]

  @pl.when((i == 0) & (r == 0))
  def _():
    exchange.pending[0] = 0

  @pl.when((flag & FIRST != 0) & (r == 0))
  def _():
    sums.dk[...] = jnp.zeros(sums.dk.shape, jnp.float32)
    sums.dv[...] = jnp.zeros(sums.dv.shape, jnp.float32)

  @pl.when(flag & (FULL | PARTIAL | DIAGONAL) != 0)
  def _():
    queries = pl.ds(pl.multiple_of(other[i] * tiles.q_block, tiles.q_block), tiles.q_block)
    block = dq_hbm.at[batch_of(row[i]), g * share + r, :, queries]
    before = jnp.maximum(i - 1, 0)
    again = (batch_of(row[before]) == batch_of(row[i])) & (other[before] == other[i]) & (share == 1)
    _fetch(exchange, block, again)
    first = offset[0] + other[i] * tiles.q_block - (block_of(row[i])) * tiles.k_block
    for kind, start in ((FULL, None), (PARTIAL, first), (DIAGONAL, 0)):
      if kind != DIAGONAL or tiling.has_diagonal(features, tiles):
        pl.when(flag & kind != 0)(functools.partial(_walk, x, sums, features, tiles, start))
    _send(exchange, block, sums.dq)

  @pl.when((flag & LAST != 0) & (r == share - 1))
  def _():
    dk[...] = (sums.dk[...] * scale).astype(dk.dtype)
    dv[...] = sums.dv[...].astype(dv.dtype)

  @pl.when((i == pl.num_programs(1) - 1) & (r == share - 1))
  def _():
    _sent(exchange, dq_hbm.at[0, 0, :, pl.ds(0, tiles.q_block)])


def _fetch(x: Exchange, block: jax.Ref, again: jax.Array) -> None:
  """Starts to fetch a block of sums; `again`: the turn before wrote to the same."""
  pl.when(again)(functools.partial(_sent, x, block))
  pltpu.make_async_copy(block, x.fetched, x.fetching).start()


def _sent(x: Exchange, block: jax.Ref) -> None:
  """Waits until what was sent last (of the size of `block`) has arrived."""

  @pl.when(x.pending[0] == 1)
  def _():
    pltpu.make_async_copy(x.sent, block, x.sending).wait()
    x.pending[0] = 0


def _send(x: Exchange, block: jax.Ref, more: jax.Ref) -> None:
  """Adds `more` to what was fetched and starts to send it back."""
  pltpu.make_async_copy(block, x.fetched, x.fetching).wait()
  _sent(x, block)
  x.sent[...] = x.fetched[...] + more[...]
  pltpu.make_async_copy(x.sent, block, x.sending).start()
  x.pending[0] = 1


def _walk(x: Inputs, sums: Sums, features: Features, tiles: Tiles, start) -> None:
  """All tiles of a block that may hold something, masked unless `start` is None; the products of
  the next are computed one turn ahead."""
  steps = tiling.steps(features, tiles, start)
  for a in range(0, tiles.q_block, tiles.q_tile):
    if all(tile.queries.start != a for tile in steps):
      queries = pl.ds(a, tiles.q_tile)
      sums.dq[:, queries] = jnp.zeros_like(sums.dq[:, queries])
  ahead = _products(x, steps[0])
  for n, tile in enumerate(steps):
    product, d_weights = ahead
    if n + 1 < len(steps):
      ahead = _products(x, steps[n + 1])
    first = all(before.queries.start != tile.queries.start for before in steps[:n])
    _add(x, sums, tile, product, d_weights, features, start, first)


def _products(x: Inputs, tile: tiling.Tile) -> tuple[jax.Array, jax.Array]:
  """q k and dO v of a tile, [keys, queries]."""
  dot = functools.partial(tiling.dot, contract=(1, 0))
  return (
    dot(x.k[tile.keys, :], x.q[:, tile.queries]),
    dot(x.v[tile.keys, :], x.d_out[:, tile.queries]),
  )


def _add(x, sums, tile, product, d_weights, features: Features, start, first: bool) -> None:
  """One tile's part of the gradients; `first` of its queries in this turn."""
  a, c = tile
  logits = attention_tile.logits(product, features.soft_cap)
  if start is not None:
    here = start + a.start - c.start
    seen = tiling.seen(x.q_ids[:, a], x.k_ids[:, c], features, here)
    logits = jnp.where(seen, logits, MASKED)
  weights = jnp.exp2(logits - x.lse[:, a])
  d_logits = weights * (d_weights - x.delta[:, a])
  if features.soft_cap is not None:
    d_logits *= 1 - jnp.square(jnp.tanh(product))
  weights, d_logits = weights.astype(x.v.dtype), d_logits.astype(x.q.dtype)
  sums.dv[:, c] += tiling.dot(x.d_out[:, a], weights, (1, 1))
  sums.dk[:, c] += tiling.dot(x.q[:, a], d_logits, (1, 1))
  dq = tiling.dot(x.k_columns[:, c], d_logits, (1, 0))
  sums.dq[:, a] = dq if first else sums.dq[:, a] + dq
