"""How keys and values lie in pages, and how they are stored in 8 bits.

A row of a page holds the key and the value of one token and one key head, side by side: one copy
fetches both. The array of pages is [pages, G, rows, W], so a page is contiguous and the rows of one
head are a matrix that a TPU multiplies as it stands. W is `row_width`: a key and a value of 64
share the 128 lanes that each alone would take; from 128 on the value starts at a multiple of 128
lanes and W is one. What lies between and behind them is 0. Heads may be sharded (axis 1).

Rows per page: any on CPU; on a TPU a multiple of the rows of a tile (8 float32, 16 bfloat16, 32
int8 and float8), so 32 and more is good for all.

Letters: G key/value heads, K key width, V value width, W row width.
"""

import jax
import jax.numpy as jnp

LANES = 128


def value_offset(key_width: int, value_width: int) -> int:
  """Where the value starts in a row."""
  if key_width + value_width <= LANES:
    return key_width
  return -(-key_width // LANES) * LANES


def row_width(key_width: int, value_width: int) -> int:
  """W: entries of a row."""
  width = value_offset(key_width, value_width) + value_width
  return width if width <= LANES else -(-width // LANES) * LANES


def empty_pages(
  pages: int, rows: int, groups: int, key_width: int, value_width: int, dtype
) -> jax.Array:
  """[pages, G, rows, W] zeros in a dtype that `stored` knows."""
  return jnp.zeros((pages, groups, rows, row_width(key_width, value_width)), dtype)


def stored(x: jax.Array, inverse_scale: jax.Array, dtype) -> jax.Array:
  """x * inverse_scale as a page keeps it: int8 rounds half to even within +-127, floats of 8 bits
  are cut at their largest value, other floats are cast and ignore the scale."""
  dtype = jnp.dtype(dtype)
  if dtype.itemsize > 1:
    return x.astype(dtype)
  x = x.astype(jnp.float32) * inverse_scale
  largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
  x = jnp.clip(x, -largest, largest)
  return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)


def new_rows(
  k: jax.Array, v: jax.Array, kv_scales: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """k [T, G, K] and v [T, G, V] as rows [T, G, W] of pages."""
  scales = jnp.ones((2, k.shape[1])) if kv_scales is None else kv_scales
  inverse = 1 / scales.astype(jnp.float32)[..., None]
  offset, width = value_offset(k.shape[-1], v.shape[-1]), row_width(k.shape[-1], v.shape[-1])
  pad = lambda x, to: jnp.pad(x, ((0, 0), (0, 0), (0, to - x.shape[-1])))
  k, v = pad(stored(k, inverse[0], dtype), offset), stored(v, inverse[1], dtype)
  return jnp.concatenate([k, pad(v, width - offset)], axis=-1)
