"""Attention over packed segments in XLA: the reference, cut into query blocks that skip the future.

The backward pass computes the scores again, as flash attention (arXiv 2205.14135) does: what is
kept for it grows with S, not with S squared.

Letters: B batch, S query rows, T key rows, G key/value heads, R queries per key head, K head width,
V value width. H = G * R query heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.flash_attention.reference import MASKED, REMEMBERED, Features

# Two SFT steps of `launch.bench` on two CPU devices: 1.01 s in blocks of 32, 0.96 s in blocks of
# 64, 1.07 s in blocks of 128. More than 8 blocks only lengthen the compilation.
SMALLEST_BLOCK = 64
MOST_BLOCKS = 8

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Where(NamedTuple):
  """Which key a query may see."""

  q_ids: jax.Array  # [B, 1 to 3, S] int32, segment, prefix, position
  k_ids: jax.Array  # [B, 1 to 2, T] int32, segment, position
  q_offset: jax.Array  # [] int32, read where there is no static one


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
) -> tuple[jax.Array, jax.Array]:
  """`reference.attention`, as (out [B, S, H, V], lse [B, S, H]).

  What no query of a block can see by its row is skipped where `q_offset` is a Python int.
  """
  static = q_offset if isinstance(q_offset, int) else None
  where = Where(q_ids, k_ids, jnp.asarray(q_offset))
  return _attention(q, k, v, sinks, where, features, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, sinks, where, features, offset):
  return _forward(q, k, v, sinks, where, features, offset)[0]


def _blocks(
  length: int, keys: int, features: Features, offset: int | None
) -> list[tuple[slice, slice]]:
  """(queries, keys that they may see) of every block."""
  if not features.causal or offset is None:
    return [(slice(0, length), slice(0, keys))]
  size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
  ends = [min(start + size, length) for start in range(0, length, size)]
  blocks = []
  for start, end in zip([0, *ends], ends):
    near = None if features.by_position else features.window  # in rows
    first = 0 if near is None else max(0, offset + start - near + 1)
    last = min(keys, max(1, offset + end))  # at least one key, though nothing may see it
    blocks.append((slice(start, end), slice(min(first, last - 1), last)))
  return blocks


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


def _scores(rows, k, where: Where, own: slice, others: slice, features: Features, offset):
  """Scores [B, G, R s, t] of a block in float32, and which of them count."""
  q_ids, k_ids = where.q_ids[:, :, own, None], where.k_ids[:, :, None, others]
  segments = q_ids[:, :2]  # and prefixes
  seen = ((segments == k_ids[:, :1]) & (segments >= 0)).any(1)
  if features.causal:
    first = where.q_offset if offset is None else offset
    ago = first + jnp.arange(own.start, own.stop)[:, None] - jnp.arange(others.start, others.stop)
    seen &= ago >= 0
    if features.window is not None:
      seen &= (q_ids[:, 2] - k_ids[:, 1] if features.by_position else ago) < features.window
  seen = jnp.tile(seen[:, None], (1, 1, rows.shape[2] // seen.shape[1], 1))
  scores = _product("bgsk,bgtk->bgst", rows, k)
  if features.soft_cap is not None:
    scores = features.soft_cap * jnp.tanh(scores / features.soft_cap)
  return scores, seen


def _sink_rows(sinks: jax.Array, groups: int, length: int) -> jax.Array:
  """[H] -> [G, R s, 1]: the sink of every row of a block."""
  return jnp.repeat(sinks.astype(jnp.float32).reshape(groups, -1), length, axis=1)[..., None]


def _forward(q, k, v, sinks, where, features, offset):
  groups = k.shape[2]
  k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out, log_sums, lse = [], [], []
  for own, others in _blocks(q.shape[1], k.shape[1], features, offset):
    length = own.stop - own.start
    rows = _rows(q, own, groups, features.scale)
    scores, seen = _scores(rows, k_rows[:, :, others], where, own, others, features, offset)
    scores = jnp.where(seen, scores, MASKED)
    top = scores.max(-1, keepdims=True)
    sink = None if sinks is None else _sink_rows(sinks, groups, length)
    if sink is not None:
      top = jnp.maximum(top, sink)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
      total += jnp.exp(sink - top)
    some = _product("bgst,bgtk->bgsk", weights.astype(v.dtype), v_rows[:, :, others])
    some = jnp.where(top == MASKED, 0, some / total).astype(v.dtype)  # NaN stays NaN
    log_sum = jnp.where(top == MASKED, MASKED, top + jnp.log(total))
    out.append(_heads(some, length))
    log_sums.append(log_sum)
    lse.append(_heads(log_sum, length)[..., 0])
  out, lse = jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=1)
  out = checkpoint_name(out, REMEMBERED)
  log_sums = [checkpoint_name(x, REMEMBERED) for x in log_sums]
  return (out, lse), (q, k, v, sinks, where, out, log_sums)


def _backward(features, offset, saved, cotangents):
  """With P = exp(X - lse): dV = P' dO, dX = P (dO V' - rowsum(dO O) + dlse), then through the cap
  to dS, dQ = dS K, dK = dS' Q. A sink has P = exp(sink - lse) and no value."""
  q, k, v, sinks, where, out, log_sums = saved
  g, g_lse = cotangents
  groups = k.shape[2]
  k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  dq, dk, dv = [], jnp.zeros(k_rows.shape, jnp.float32), jnp.zeros(v_rows.shape, jnp.float32)
  d_sinks = []
  blocks = _blocks(q.shape[1], k.shape[1], features, offset)
  for (own, others), log_sum in reversed(list(zip(blocks, log_sums))):
    length = own.stop - own.start
    rows, g_rows = _rows(q, own, groups, features.scale), _rows(g, own, groups)
    dot = jnp.sum(g_rows.astype(jnp.float32) * _rows(out, own, groups), -1, keepdims=True)
    dot -= _rows(g_lse[..., None], own, groups)
    k_own, v_own = k_rows[:, :, others], v_rows[:, :, others]
    scores, seen = _scores(rows, k_own, where, own, others, features, offset)
    weights = jnp.where(seen, jnp.exp(scores - log_sum), 0)
    d_weights = _product("bgsk,bgtk->bgst", g_rows, v_own)
    d_scores = weights * (d_weights - dot)
    if features.soft_cap is not None:
      d_scores *= 1 - jnp.square(scores / features.soft_cap)
    d_scores = d_scores.astype(q.dtype)
    dq.append(_heads(_product("bgst,bgtk->bgsk", d_scores, k_own) * features.scale, length))
    dk = dk.at[:, :, others].set(dk[:, :, others] + _product("bgst,bgsk->bgtk", d_scores, rows))
    dv = dv.at[:, :, others].set(
      dv[:, :, others] + _product("bgst,bgsk->bgtk", weights.astype(v.dtype), g_rows)
    )
    if sinks is not None:
      share = jnp.exp(_sink_rows(sinks, groups, length) - log_sum) * dot
      d_sinks.append(-share.reshape(*share.shape[:2], -1, length).sum((0, 3)).reshape(-1))
  dq = jnp.concatenate(dq[::-1], axis=1)
  dk, dv = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
  d_sinks = None if sinks is None else jnp.stack(d_sinks).sum(0).astype(sinks.dtype)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


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
