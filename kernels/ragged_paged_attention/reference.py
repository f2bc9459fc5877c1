"""Attention of new tokens over keys in pages, in plain JAX: the contract of the kernels.

Letters: T rows of new tokens, H query heads, G key/value heads, K key width, V value width, N
sequences, P pages of a sequence at most, W row width (see `pages`).
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from kernels.ragged_paged_attention import pages

MASKED = -1e30  # finite, so that a row that sees nothing has no NaN


@dataclasses.dataclass(frozen=True)
class Features:
  """What the scores go through. Raises ValueError for values that mean nothing."""

  scale: float  # multiplies q k
  window: int | None = None  # the query at position i sees positions i - window + 1 .. i
  soft_cap: float | None = None  # scores -> c tanh(scores / c), before masking (arXiv 2408.00118)

  def __post_init__(self):
    if self.window is not None and self.window < 1:
      raise ValueError(f"ragged_paged_attention: expected window >= 1, found {self.window}")
    if self.soft_cap is not None and self.soft_cap <= 0:
      raise ValueError(f"ragged_paged_attention: expected soft_cap > 0, found {self.soft_cap}")


def check(q, k_new, v_new, kv_pages, kv_lengths, page_table, q_starts, sinks, kv_scales) -> None:
  """Raises AssertionError or ValueError when the arguments of `attention` do not fit."""
  where = "ragged_paged_attention"
  chex.assert_rank([q, k_new, v_new], 3)
  chex.assert_rank(kv_pages, 4)
  (tokens, heads, width), groups, value_width = q.shape, k_new.shape[1], v_new.shape[2]
  chex.assert_shape(k_new, (tokens, groups, width))
  chex.assert_shape(v_new, (tokens, groups, None))
  if heads % groups:
    raise ValueError(f"{where}: {heads} query heads do not divide by {groups} key heads")
  row = pages.row_width(width, value_width)
  if kv_pages.shape[1] != groups or kv_pages.shape[3] != row:
    raise ValueError(
      f"{where}: expected pages of shape [pages, {groups}, rows, {row}] for {groups} key heads, "
      f"keys of {width} and values of {value_width}, found {kv_pages.shape}"
    )
  count = kv_lengths.shape[0]
  chex.assert_shape([kv_lengths, q_starts, page_table], [(count,), (count + 1,), (count, None)])
  for name, x in (("kv_lengths", kv_lengths), ("page_table", page_table), ("q_starts", q_starts)):
    if x.dtype != jnp.int32:
      raise ValueError(f"{where}: expected {name} in int32, found {x.dtype}")
  if kv_pages.dtype == jnp.int8 and kv_scales is None:
    raise ValueError(f"{where}: pages of int8 need kv_scales, found none")
  if jnp.dtype(kv_pages.dtype).itemsize > 1 and kv_scales is not None:
    raise ValueError(f"{where}: kv_scales are for pages of 8 bits, found {kv_pages.dtype}")
  if sinks is not None:
    chex.assert_shape(sinks, (heads,))
  if kv_scales is not None:
    chex.assert_shape(kv_scales, (2, groups))


def rows_of_sequences(
  q_starts: jax.Array, kv_lengths: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(sequence [T], position [T], is one [T] bool) of every row of new tokens."""
  row = jnp.arange(tokens, dtype=jnp.int32)
  sequence = jnp.sum(row[:, None] >= q_starts[None, 1:], axis=1, dtype=jnp.int32)
  sequence = jnp.minimum(sequence, kv_lengths.shape[0] - 1)
  position = kv_lengths[sequence] - q_starts[sequence + 1] + row
  return sequence, position, row < q_starts[-1]


def write(
  k_new: jax.Array,
  v_new: jax.Array,
  kv_pages: jax.Array,
  *,
  kv_lengths: jax.Array,
  page_table: jax.Array,
  q_starts: jax.Array,
  kv_scales: jax.Array | None = None,
) -> jax.Array:
  """The pages with the new tokens' keys and values in their places, and nothing else changed."""
  sequence, position, live = rows_of_sequences(q_starts, kv_lengths, k_new.shape[0])
  rows = pages.new_rows(k_new, v_new, kv_scales, kv_pages.dtype)
  size = kv_pages.shape[2]
  page = page_table[sequence, jnp.clip(position // size, 0, page_table.shape[1] - 1)]
  page = jnp.where(live, page, kv_pages.shape[0])  # out of bounds: dropped
  return kv_pages.at[page, :, position % size].set(rows, mode="drop")


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
  """Writes the new tokens' keys and values into the pages, then attends to what the pages hold.

  Sequence n has kv_lengths[n] tokens, the new ones included; the new ones are its last, and stand
  in the rows q_starts[n] : q_starts[n + 1]. One call serves prompts, chunks of prompts and single
  tokens. The query at position i of a sequence attends to the positions <= i of it, with a `window`
  to i - window + 1 .. i:

    out = sum_t exp(x_t - lse) v_t,  lse = log(sum_t exp(x_t) + exp(sink)),  x = cap(scale q k)

  Scores and softmax are float32. Keys and values of 8 bits are worth what is stored times their
  scale; what a query reads of the new tokens is what was stored, too. What lies in a page behind a
  sequence's length, and in the rows behind q_starts[N], is never read and may be NaN.

  Args:
    q: [T, H, K].
    k_new: [T, G, K]; query head h reads key head h // (H / G).
    v_new: [T, G, V].
    kv_pages: [pages, G, rows, W], see `pages`; float32, bfloat16, int8 or float8.
    kv_lengths: [N] int32, tokens of each sequence, the new ones included.
    page_table: [N, P] int32; entry j is the page of positions j * rows to (j + 1) * rows. Entries
      behind the length are never read. No two sequences write to one page.
    q_starts: [N + 1] int32, not falling, q_starts[0] = 0. A sequence without new rows is skipped.
    scale, window, soft_cap: see `Features`.
    sinks: [H] float32, a logit of each head that joins the denominator only.
    kv_scales: [2, G] float32, of keys and values; needed for int8, 1 where absent for float8.
    return_lse: also return the lse.

  Returns:
    out [T, H, V] in the dtype of q, 0 in rows of no sequence; the pages; with `return_lse` the lse
    [T, H] float32, `MASKED` in rows of no sequence.

  Raises:
    ValueError, AssertionError: shapes, dtypes or options that do not fit.
  """
  check(q, k_new, v_new, kv_pages, kv_lengths, page_table, q_starts, sinks, kv_scales)
  features = Features(scale, window, soft_cap)
  places = {"kv_lengths": kv_lengths, "page_table": page_table, "q_starts": q_starts}
  kv_pages = write(k_new, v_new, kv_pages, kv_scales=kv_scales, **places)
  groups, width, value_width = k_new.shape[1], q.shape[2], v_new.shape[2]
  if kv_scales is None:
    kv_scales = jnp.ones((2, groups))
  k_scale, v_scale = kv_scales.astype(jnp.float32)
  logits = jnp.full(q.shape[1], -jnp.inf) if sinks is None else sinks.astype(jnp.float32)

  def row(q, sequence, position, live):
    own = kv_pages[page_table[sequence]].transpose(1, 0, 2, 3)  # [G, P, rows, W]
    own = own.reshape(groups, -1, own.shape[-1])
    index = jnp.arange(own.shape[1])
    seen = live & (index <= position)
    if features.window is not None:
      seen &= index > position - features.window
    own = jnp.where(seen[None, :, None], own, jnp.zeros((), own.dtype))  # NaN may stand there
    offset = pages.value_offset(width, value_width)
    k, v = own[..., :width], own[..., offset : offset + value_width]
    q = q.reshape(groups, -1, width)
    x = jnp.einsum("grk,gtk->grt", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    x = x * (features.scale * k_scale)[:, None, None]
    if features.soft_cap is not None:
      x = features.soft_cap * jnp.tanh(x / features.soft_cap)
    x = jnp.where(seen, x, MASKED)
    sink = logits.reshape(groups, -1, 1)
    top = jnp.maximum(x.max(-1, keepdims=True), sink)
    weights = jnp.where(seen, jnp.exp(x - top), 0)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - top)
    total = jnp.where(live, total, 1)
    weights = (weights / total).astype(q.dtype)
    out = jnp.einsum("grt,gtv->grv", weights, v.astype(q.dtype), preferred_element_type=jnp.float32)
    out = jnp.where(live, out * v_scale[:, None, None], 0).astype(q.dtype)
    lse = jnp.where(live, top + jnp.log(total), MASKED)
    return out.reshape(-1, value_width), lse.reshape(-1)

  out, lse = jax.lax.map(lambda x: row(*x), (q, *rows_of_sequences(q_starts, kv_lengths, len(q))))
  return (out, kv_pages, lse) if return_lse else (out, kv_pages)
