"""Attention over packed segments on TPU: layouts around the two Pallas kernels.

The kernels want rows of tokens along the lanes of queries, values and outputs, [B, H, K, S], and
whole turns of blocks; what is added to make them whole has segment -1.

Letters: B batch, H query heads, G key heads, S queries, T keys, K head width, V value width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import attention_tile
from kernels.flash_attention.reference import MASKED, REMEMBERED, Features
from kernels.flash_attention.tiles import Tiles
from kernels.flash_attention.tpu_backward import Inputs, backward
from kernels.flash_attention.tpu_forward import forward

SUBLANES = 16  # of a register of bfloat16


class Where(NamedTuple):
  """Which key a query may see."""

  q_ids: jax.Array  # [B, 1 to 3, S] int32, segment, prefix, position
  k_ids: jax.Array  # [B, 1 to 2, T] int32, segment, position
  q_offset: jax.Array  # [] int32


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_ids: jax.Array,
  k_ids: jax.Array,
  q_offset: int | jax.Array,
  features: Features,
  sinks: jax.Array | None,
  tiles: tuple[Tiles, Tiles],
) -> tuple[jax.Array, jax.Array]:
  """`reference.attention`, as (out [B, S, H, V], lse [B, S, H]); tiles of forward and backward."""
  where = Where(q_ids, k_ids, jnp.asarray(q_offset, jnp.int32))
  fitting = tuple(
    each.within(q.shape[1], k.shape[1], by_keys=i == 1) for i, each in enumerate(tiles)
  )
  return _attention(q, k, v, sinks, where, features, fitting)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, sinks, where, features, tiles):
  return _forward(q, k, v, sinks, where, features, tiles)[0]


def _whole(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
  """`x` made a multiple of `size` along an axis, by `value`s at its end."""
  more = -x.shape[axis] % size
  pads = [(0, more if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, pads, constant_values=value) if more else x


def _tokens_last(x: jax.Array, block: int) -> jax.Array:
  """[B, S, H, K] -> [B, H, K, S] in whole blocks and registers."""
  return _whole(_whole(x.transpose(0, 2, 3, 1), 3, block), 2, SUBLANES)


def _width_last(x: jax.Array, block: int) -> jax.Array:
  """[B, T, G, K] -> [B, G, T, K] in whole blocks and registers."""
  return _whole(_whole(x.transpose(0, 2, 1, 3), 2, block), 3, SUBLANES)


def _whole_rows(where: Where, q_rows: int, k_rows: int) -> Where:
  return Where(
    _whole(where.q_ids, 2, q_rows, -1),
    _whole(where.k_ids, 2, k_rows, -1),
    where.q_offset,
  )


def _queries(q: jax.Array, features: Features) -> jax.Array:
  factor = attention_tile.query_factor(features.scale, features.soft_cap)
  return (q.astype(jnp.float32) * factor).astype(q.dtype)


def _forward(q, k, v, sinks, where, features, both):
  tiles, _ = both
  q_rows, k_rows = tiles.q_block, tiles.k_block * tiles.parts
  out, lse = forward(
    _tokens_last(_queries(q, features), q_rows),
    _width_last(k, k_rows),
    _tokens_last(v, k_rows),
    *_whole_rows(where, q_rows, k_rows),
    None if sinks is None else sinks.astype(jnp.float32) * attention_tile.LOG2_E,
    features,
    tiles,
  )
  length, width = q.shape[1], v.shape[3]
  out = out[:, :, :width, :length].transpose(0, 3, 1, 2)
  lse = lse[:, :, 0, :length].transpose(0, 2, 1)
  out, lse = (checkpoint_name(x, REMEMBERED) for x in (out, lse))
  return (out, lse), (q, k, v, sinks, where, out, lse)


def _backward(features, both, saved, cotangents):
  _, tiles = both
  q, k, v, sinks, where, out, lse = saved
  g, g_lse = cotangents
  delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1) - g_lse  # [B, S, H]
  base_2 = jnp.where(lse > MASKED / 2, lse * attention_tile.LOG2_E, -MASKED)
  q_rows, k_rows = tiles.q_block * tiles.parts, tiles.k_block
  both_rows = jnp.stack([base_2, delta], 2).transpose(0, 3, 2, 1)  # [B, H, 2, S]
  whole = _whole_rows(where, q_rows, k_rows)
  inputs = Inputs(
    q_ids=whole.q_ids,
    k_ids=whole.k_ids,
    q=_tokens_last(_queries(q, features), q_rows),
    d_out=_tokens_last(g, q_rows),
    rows=_whole(both_rows, 3, q_rows),
    k=_width_last(k, k_rows),
    k_columns=_tokens_last(k, k_rows),
    v=_width_last(v, k_rows),
  )
  dq, dk, dv = backward(inputs, where.q_offset, features, tiles)
  tokens = lambda x, like: x[:, :, : like.shape[3], : like.shape[1]].transpose(0, 3, 1, 2)
  dq = (tokens(dq, q) * features.scale).astype(q.dtype)
  if sinks is None:
    d_sinks = None
  else:
    share = jnp.exp(sinks.astype(jnp.float32) - lse)
    d_sinks = -jnp.sum(share * delta, (0, 1)).astype(sinks.dtype)
  return dq, tokens(dk, k), tokens(dv, v), d_sinks, None


_attention.defvjp(_forward, _backward)
