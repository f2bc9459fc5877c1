"""Attention over packed segments in XLA: the reference, cut into query blocks that skip the future.

The backward pass computes the scores again, as flash attention (arXiv 2205.14135) does: what is
kept for it grows with S, not with S squared.

Letters: B batch, S query positions, T key positions, G key/value heads, R queries per key head, K
head width. H = G * R query heads.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from kernels.flash_attention.reference import MASKED

# Two SFT steps of `launch.bench` on two CPU devices: 1.01 s in blocks of 32, 0.96 s in blocks of
# 64, 1.07 s in blocks of 128. More than 8 blocks only lengthen the compilation.
SMALLEST_BLOCK = 64
MOST_BLOCKS = 8

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


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
  queries, keys = (q_positions, q_segments), (k_positions, k_segments)
  return _attention(q, k, v, queries, keys, scale, aligned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, queries, keys, scale, aligned):
  return _forward(q, k, v, queries, keys, scale, aligned)[0]


def _blocks(length: int, keys: int, aligned: bool) -> list[tuple[slice, slice]]:
  """(queries, keys that they may see) of every block."""
  if not aligned:
    return [(slice(0, length), slice(0, keys))]
  size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
  ends = [min(start + size, length) for start in range(0, length, size)]
  return [(slice(start, end), slice(0, end)) for start, end in zip([0, *ends], ends)]


def _rows(x: jax.Array, block: slice, groups: int, scale: float = 1.0) -> jax.Array:
  """[B, S, H, K] -> [B, G, R s, K]: a block of queries, those of a group with their common key head
  as the rows of one matrix."""
  x = x[:, block] * jnp.asarray(scale, x.dtype)
  batch, length, _, width = x.shape
  x = x.reshape(batch, length, groups, -1, width).transpose(0, 2, 3, 1, 4)
  return x.reshape(batch, groups, -1, width)


def _heads(rows: jax.Array, length: int) -> jax.Array:
  """[B, G, R s, K] -> [B, s, H, K], the way back."""
  batch, groups, _, width = rows.shape
  x = rows.reshape(batch, groups, -1, length, width).transpose(0, 3, 1, 2, 4)
  return x.reshape(batch, length, -1, width)


def _scores(rows, k, queries, keys, own, others):
  """Scores [B, G, R s, T] of a block in float32, and which of them count."""
  (q_positions, q_segments), (k_positions, k_segments) = queries, keys
  segments = q_segments[:, own, None]
  seen = (segments == k_segments[:, None, others]) & (segments >= 0)
  seen &= q_positions[:, own, None] >= k_positions[:, None, others]
  seen = jnp.tile(seen[:, None], (1, 1, rows.shape[2] // seen.shape[1], 1))
  return _product("bgsk,bgtk->bgst", rows, k), seen


def _forward(q, k, v, queries, keys, scale, aligned):
  groups = k.shape[2]
  k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out, log_sums = [], []
  for own, others in _blocks(q.shape[1], k.shape[1], aligned):
    rows = _rows(q, own, groups, scale)
    scores, seen = _scores(rows, k_rows[:, :, others], queries, keys, own, others)
    scores = jnp.where(seen, scores, MASKED)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    some = _product("bgst,bgtk->bgsk", weights.astype(v.dtype), v_rows[:, :, others])
    some = jnp.where(top == MASKED, 0, some / total).astype(v.dtype)  # NaN stays NaN
    out.append(_heads(some, own.stop - own.start))
    log_sums.append(top + jnp.log(total))
  out = jnp.concatenate(out, axis=1)
  return out, (q, k, v, queries, keys, out, log_sums)


def _backward(scale, aligned, saved, g):
  """With P = softmax(S): dV = P' dO, dS = P (dO V' - rowsum(dO O)), dQ = dS K, dK = dS' Q."""
  q, k, v, queries, keys, out, log_sums = saved
  groups = k.shape[2]
  k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  dq, dk, dv = [], jnp.zeros(k_rows.shape, jnp.float32), jnp.zeros(v_rows.shape, jnp.float32)
  blocks = _blocks(q.shape[1], k.shape[1], aligned)
  for (own, others), log_sum in reversed(list(zip(blocks, log_sums))):
    rows, g_rows = _rows(q, own, groups, scale), _rows(g, own, groups)
    dot = jnp.sum(g_rows.astype(jnp.float32) * _rows(out, own, groups), -1, keepdims=True)
    k_own, v_own = k_rows[:, :, others], v_rows[:, :, others]
    scores, seen = _scores(rows, k_own, queries, keys, own, others)
    weights = jnp.where(seen, jnp.exp(scores - log_sum), 0)
    d_weights = _product("bgsk,bgtk->bgst", g_rows, v_own)
    d_scores = (weights * (d_weights - dot)).astype(q.dtype)
    dq.append(_heads(_product("bgst,bgtk->bgsk", d_scores, k_own) * scale, own.stop - own.start))
    dk = dk.at[:, :, others].set(dk[:, :, others] + _product("bgst,bgsk->bgtk", d_scores, rows))
    dv = dv.at[:, :, others].set(
      dv[:, :, others] + _product("bgst,bgsk->bgtk", weights.astype(v.dtype), g_rows)
    )
  dq = jnp.concatenate(dq[::-1], axis=1)
  dk, dv = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def cached_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, *, scale: float
) -> jax.Array:
  """Attention of one query per sequence over its cached keys at positions 0..position.

  Args:
    q: [B, H, K].
    k: [B, G, K, T]; query head h reads key head h // (H / G). XLA on CPU would otherwise transpose
      every key matrix for every query.
    v: [B, G, T, K].
    position: [B] int32, of the query; its own key is in the cache.
    scale: multiplies the scores.

  Returns:
    [B, H, K] in the dtype of v.
  """
  batch, groups, length, width = v.shape
  q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, groups, -1, width)
  scores = _product("bgrk,bgkt->bgrt", q, k)
  seen = jnp.arange(length) <= position[:, None]
  scores = jnp.where(seen[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum("bgrt,bgtk->bgrk", weights, v).reshape(batch, -1, width)
