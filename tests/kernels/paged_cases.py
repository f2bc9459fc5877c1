"""Launches of ragged paged attention for tests: arguments, and the answer of a plain NumPy loop."""

import math

import jax.numpy as jnp
import numpy as np

from kernels.ragged_paged_attention import pages
from kernels.ragged_paged_attention.shapes import Shape

SPARE_ROWS = 3  # of q, at the end, of no sequence


def scales(shape: Shape, rng) -> np.ndarray | None:
  """Of pages of 8 bits: entries of 3 are within what is stored."""
  if jnp.dtype(shape.kv_dtype).itemsize > 1:
    return None
  largest = 127 if shape.kv_dtype == "int8" else 448
  return (rng.uniform(3, 4, (2, shape.groups)) / largest).astype(np.float32)


def launch(shape: Shape, seed: int = 0, spare_pages: int = 2) -> tuple[tuple, dict]:
  """(positional, keyword) arguments of `ragged_paged_attention`, pages in shuffled order.

  NaN stands wherever nothing may be read: behind each sequence's length in its last page, in pages
  of nobody, in the rows of new tokens behind the last sequence, and in the places of the new keys.
  """
  rng = np.random.default_rng(seed)
  rows, tokens, count = shape.page_rows, shape.tokens + SPARE_ROWS, len(shape.sequences)
  normal = lambda *size: rng.normal(size=size).astype(np.float32)
  q = normal(tokens, shape.heads, shape.width)
  k_new = normal(tokens, shape.groups, shape.width)
  v_new = normal(tokens, shape.groups, shape.value_width)
  for x in (q, k_new, v_new):
    x[shape.tokens :] = np.nan
  needed = [-(-length // rows) for _, length in shape.sequences]
  order = rng.permutation(sum(needed) + spare_pages)
  table = np.full((count, shape.pages_per_sequence + 1), spare_pages and order[-1], np.int32)
  kv_scales = scales(shape, rng)
  width = pages.row_width(shape.width, shape.value_width)
  nothing = 0 if shape.kv_dtype == "int8" else np.nan
  store = np.full((len(order), shape.groups, rows, width), nothing, np.float32)
  start = 0
  for n, (new, length) in enumerate(shape.sequences):
    table[n, : needed[n]] = order[start : start + needed[n]]
    start += needed[n]
    old = normal(length - new, shape.groups, shape.width + shape.value_width)
    k, v = np.split(old, [shape.width], axis=2)
    lines = pages.new_rows(jnp.asarray(k), jnp.asarray(v), kv_scales, shape.kv_dtype)
    for t, line in enumerate(np.asarray(lines, np.float32)):
      store[table[n, t // rows], :, t % rows] = line
  starts = np.cumsum([0] + [new for new, _ in shape.sequences]).astype(np.int32)
  options = {
    "kv_lengths": np.asarray([length for _, length in shape.sequences], np.int32),
    "page_table": table,
    "q_starts": starts,
    "scale": shape.width**-0.5,
    "window": shape.window,
    "soft_cap": shape.soft_cap,
    "sinks": normal(shape.heads) if shape.sinks else None,
    "kv_scales": kv_scales,
  }
  given = [jnp.asarray(x, shape.dtype) for x in (q, k_new, v_new)]
  return (*given, jnp.asarray(store, shape.kv_dtype)), options


def numpy_attention(q, k_new, v_new, kv_pages, **o):
  """(out, pages, lse) in float64, one token and one head at a time. Pages hold floats as stored."""
  q, k_new, v_new = (np.asarray(x, np.float64) for x in (q, k_new, v_new))
  kept, dtype = np.asarray(kv_pages, np.float64), kv_pages.dtype
  groups, width, value_width = k_new.shape[1], q.shape[2], v_new.shape[2]
  offset = pages.value_offset(width, value_width)
  factor = np.ones((2, groups)) if o["kv_scales"] is None else o["kv_scales"]
  rows = np.asarray(pages.new_rows(jnp.asarray(k_new), jnp.asarray(v_new), factor, dtype))
  out, lse = np.zeros(q.shape[:2] + v_new.shape[2:]), np.full(q.shape[:2], -1e30)
  size = kept.shape[2]
  for n, length in enumerate(o["kv_lengths"]):
    start, end = o["q_starts"][n : n + 2]
    at = lambda t, n=n: (o["page_table"][n, t // size], slice(None), t % size)
    for row in range(start, end):
      kept[at(length - end + row)] = rows[row].astype(np.float64)
    for row in range(start, end):
      here = length - end + row
      first = 0 if o["window"] is None else max(0, here - o["window"] + 1)
      seen = np.stack([kept[at(t)] for t in range(first, here + 1)])
      for head in range(q.shape[1]):
        g = head // (q.shape[1] // groups)
        x = seen[:, g, :width] @ q[row, head] * o["scale"] * factor[0, g]
        if o["soft_cap"] is not None:
          x = o["soft_cap"] * np.tanh(x / o["soft_cap"])
        sink = -math.inf if o["sinks"] is None else o["sinks"][head]
        top = max(x.max(), sink)
        lse[row, head] = top + math.log(np.exp(x - top).sum() + math.exp(sink - top))
        weights = np.exp(x - lse[row, head])
        out[row, head] = weights @ seen[:, g, offset : offset + value_width] * factor[1, g]
  return out, kept, lse
