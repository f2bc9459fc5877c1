"""Attention of new tokens over keys in pages, for CPU and GPU: blocks of queries against tiles of
keys, with the running softmax of flash attention (arXiv 2205.14135).

The work is that of the live queries and of the keys that they may see: blocks and tiles are counted
when the program runs. Letters as in the reference; B queries of a block, S keys of a tile.
"""

import jax
import jax.numpy as jnp

from kernels.ragged_paged_attention import pages, reference
from kernels.ragged_paged_attention.reference import MASKED, Features

BLOCK = 32  # queries that share the loads of their keys
TILE = 128  # keys at once, in whole pages


def attention(
  q: jax.Array,
  k_new: jax.Array,
  v_new: jax.Array,
  kv_pages: jax.Array,
  *,
  kv_lengths: jax.Array,
  page_table: jax.Array,
  q_starts: jax.Array,
  scale: float,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  kv_scales: jax.Array | None = None,
  return_lse: bool = False,
) -> tuple[jax.Array, ...]:
  """`reference.attention`: see there."""
  reference.check(q, k_new, v_new, kv_pages, kv_lengths, page_table, q_starts, sinks, kv_scales)
  features = Features(scale, window, soft_cap)
  places = {"kv_lengths": kv_lengths, "page_table": page_table, "q_starts": q_starts}
  kv_pages = reference.write(k_new, v_new, kv_pages, kv_scales=kv_scales, **places)
  if kv_scales is None:
    kv_scales = jnp.ones((2, k_new.shape[1]))
  logits = jnp.full(q.shape[1], -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
  out, lse = _blocks(
    q, kv_pages, v_new.shape[2], features, logits, kv_scales.astype(jnp.float32), **places
  )
  return (out, kv_pages, lse) if return_lse else (out, kv_pages)


def _blocks(
  q, kv_pages, value_width, features, logits, kv_scales, *, kv_lengths, page_table, q_starts
):
  """Blocks of at most `BLOCK` queries of one sequence, one after the other."""
  tokens, heads, width = q.shape
  size = min(BLOCK, tokens)
  blocks = -(-(q_starts[1:] - q_starts[:-1]) // size)
  ends = jnp.cumsum(blocks)
  rows = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
  out = jnp.zeros((tokens + size, heads, value_width), q.dtype)
  lse = jnp.full((tokens + size, heads), MASKED, jnp.float32)

  def block(i, carry):
    out, lse = carry
    n = jnp.sum(i >= ends, dtype=jnp.int32)
    start = q_starts[n] + (i - ends[n] + blocks[n]) * size
    live = start + jnp.arange(size) < q_starts[n + 1]
    position = kv_lengths[n] - q_starts[n + 1] + start + jnp.arange(size)
    some, log_sum = _block(
      jax.lax.dynamic_slice_in_dim(rows, start, size),
      jnp.where(live, position, -1),
      kv_pages,
      page_table[n],
      (width, value_width),
      features,
      logits,
      kv_scales,
    )
    # Rows behind the sequence are those of the next one, whose blocks come later.
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)
    some, log_sum = (
      jnp.where(live[:, None, None], some, 0),
      jnp.where(live[:, None], log_sum, MASKED),
    )
    return put(out, some), put(lse, log_sum)

  out, lse = jax.lax.fori_loop(0, ends[-1], block, (out, lse))
  return out[:tokens], lse[:tokens]


def _block(q, position, kv_pages, table, widths, features, logits, kv_scales):
  """Queries [B, H, K] of one sequence at `position` [B], -1 for none: out [B, H, V], lse [B, H]."""
  width, value_width = widths
  groups, rows = kv_pages.shape[1:3]
  count = max(1, TILE // rows)  # pages of a tile
  length = count * rows
  table = jnp.pad(table, (0, -len(table) % count), mode="edge")
  own = q.reshape(len(q), groups, -1, width).transpose(1, 2, 0, 3)
  own = own.reshape(groups, -1, width)  # [G, r B, K]
  stands = jnp.tile(position, own.shape[1] // len(position))[:, None]
  start = (groups, own.shape[1], 1)
  sink = jnp.repeat(logits.reshape(groups, -1), len(q), 1)[..., None]
  first = jnp.min(jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position))
  lowest = 0 if features.window is None else jnp.maximum(first - features.window + 1, 0) // length

  def tile(i, carry):
    top, total, out = carry
    part = kv_pages[jax.lax.dynamic_slice_in_dim(table, i * count, count)]
    part = part.transpose(1, 0, 2, 3).reshape(groups, length, -1)
    index = i * length + jnp.arange(length)
    seen = index <= stands
    if features.window is not None:
      seen &= index > stands - features.window
    part = jnp.where((index <= position.max())[:, None], part, jnp.zeros((), part.dtype))
    k, v = part[..., :width], part[..., pages.value_offset(width, value_width) :]
    x = jnp.einsum("gqk,gtk->gqt", own, k.astype(q.dtype), preferred_element_type=jnp.float32)
    x = x * (features.scale * kv_scales[0])[:, None, None]
    if features.soft_cap is not None:
      x = features.soft_cap * jnp.tanh(x / features.soft_cap)
    new = jnp.maximum(top, jnp.where(seen, x, MASKED).max(-1, keepdims=True))
    weights, shrink = jnp.where(seen, jnp.exp(x - new), 0), jnp.exp(top - new)
    total = total * shrink + weights.sum(-1, keepdims=True)
    more = jnp.einsum(
      "gqt,gtv->gqv",
      weights.astype(q.dtype),
      v.astype(q.dtype),
      preferred_element_type=jnp.float32,
    )
    return new, total, out * shrink + more

  top = jnp.maximum(jnp.full(start, MASKED), sink)
  begin = (top, jnp.exp(sink - top), jnp.zeros((*start[:2], value_width)))
  top, total, out = jax.lax.fori_loop(lowest, position.max() // length + 1, tile, begin)
  total = jnp.where(stands < 0, 1, total)
  out = out / total * kv_scales[1][:, None, None]
  back = lambda x: x.reshape(groups, -1, len(q), x.shape[-1]).transpose(2, 0, 1, 3)
  merge = lambda x: back(x).reshape(len(q), -1, x.shape[-1])
  return merge(out).astype(q.dtype), merge(top + jnp.log(total))[..., 0]
