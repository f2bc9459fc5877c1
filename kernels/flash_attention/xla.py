"""Attention over packed segments in XLA: the reference, cut into query blocks that skip the future.

Letters: B batch, S query positions, T key positions, G key/value heads, R queries per key head, K
head width. H = G * R query heads.
"""

import chex
import jax
import jax.numpy as jnp

from kernels.flash_attention.reference import MASKED

# Seen on a 2-core CPU at B=16 S=256 H=4 K=64, forward and backward: 58 ms whole, 33 ms in blocks of
# 128, 20 ms in blocks of 64. More than 8 blocks only lengthen the compilation.
SMALLEST_BLOCK = 64
MOST_BLOCKS = 8


def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_positions: jax.Array,
  k_positions: jax.Array,
  q_segments: jax.Array,
  k_segments: jax.Array,
  scale: float,
  aligned: bool,
) -> jax.Array:
  """`reference.attention`, with one more promise that the caller may make.

  Args:
    q: [B, S, H, K].
    k, v: [B, T, G, K].
    q_positions, q_segments: [B, S] int32.
    k_positions, k_segments: [B, T] int32.
    scale: multiplies the scores.
    aligned: queries and keys are the same tokens in the same order (S == T), so that a query never
      attends to a key that stands behind it; what lies behind a block of queries is then skipped.

  Returns:
    [B, S, H, K] in the dtype of v.
  """
  chex.assert_rank([q, k, v], 4)
  chex.assert_equal_shape([k, v])
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, groups, heads // groups, width)
  q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS)) if aligned else length
  out = []
  for start in range(0, length, size):
    end = min(start + size, length)
    keys = end if aligned else k.shape[2]
    seen = q_segments[:, start:end, None] == k_segments[:, None, :keys]
    seen &= q_positions[:, start:end, None] >= k_positions[:, None, :keys]
    seen &= (q_segments >= 0)[:, start:end, None]
    out.append(_block(q[:, :, :, start:end], k[:, :, :keys], v[:, :, :keys], seen))
  out = jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4)
  return out.reshape(batch, length, heads, width)


def _block(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
  """q [B, G, R, S, K], k and v [B, G, T, K], seen [B, S, T] -> [B, G, R, S, K].

  The R query heads of a group are folded into the rows of one product with their common key head.
  """
  batch, groups, repeats, length, width = q.shape
  rows = q.reshape(batch, groups, repeats * length, width)
  scores = jnp.einsum("bgsk,bgtk->bgst", rows, k, preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, groups, repeats, length, -1)
  scores = jnp.where(seen[:, None, None], scores, MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  total = weights.sum(-1, keepdims=True)
  weights = weights.reshape(batch, groups, repeats * length, -1).astype(v.dtype)
  out = jnp.einsum("bgst,bgtk->bgsk", weights, v, preferred_element_type=jnp.float32)
  out = out.reshape(batch, groups, repeats, length, width) / total
  return jnp.where(seen.any(-1)[:, None, None, :, None], out, 0).astype(v.dtype)


def cached_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, *, scale: float
) -> jax.Array:
  """Attention of one query per sequence over its cached keys at positions 0..position.

  Args:
    q: [B, H, K].
    k, v: [B, G, T, K]; query head h reads key head h // (H / G).
    position: [B] int32, of the query; its own key is in the cache.
    scale: multiplies the scores.

  Returns:
    [B, H, K] in the dtype of v.
  """
  batch, groups, length, width = k.shape
  q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, groups, -1, width)
  scores = jnp.einsum("bgrk,bgtk->bgrt", q, k, preferred_element_type=jnp.float32)
  seen = jnp.arange(length) <= position[:, None]
  scores = jnp.where(seen[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum("bgrt,bgtk->bgrk", weights, v).reshape(batch, -1, width)
