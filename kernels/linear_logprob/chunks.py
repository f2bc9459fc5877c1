"""An output matrix visited in chunks of the vocabulary, forward and backward.

N rows, E width, V vocabulary (or the part of it on one device), C a chunk of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Part = tuple[tuple[jax.Array, ...], jax.Array]  # rows [C, E] of each matrix, id of the first row


def divisor(size: int, most: int) -> int:
  """The largest divisor of size that is at most `most`."""
  return next(d for d in range(min(size, most), 0, -1) if size % d == 0)


def products(h: jax.Array, rows: jax.Array) -> jax.Array:
  """h [N, E], rows [C, E] -> [N, C] float32."""
  return jnp.einsum("ne,ce->nc", h, rows.astype(h.dtype), preferred_element_type=jnp.float32)


def _chunks(matrices: tuple[jax.Array, ...], chunk: int) -> tuple[Part, Part]:
  """Matrices [V, E] cut into parts: the first, and the others stacked. A scan that starts from a
  real chunk needs no neutral element."""
  cut = tuple(w.reshape(-1, chunk, w.shape[1]) for w in matrices)
  parts = cut, jnp.arange(matrices[0].shape[0] // chunk) * chunk
  return jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)


def fold(
  measure: Callable[[Part], Any],
  merge: Callable[[Any, Any], Any],
  matrices: tuple[jax.Array, ...],
  chunk: int,
) -> Any:
  """What `measure` finds in each chunk, merged into one. `chunk` divides V."""
  first, rest = _chunks(matrices, chunk)
  seen = measure(first)
  if matrices[0].shape[0] > chunk:
    step = lambda seen, part: (merge(seen, measure(part)), None)
    seen, _ = jax.lax.scan(step, seen, rest)
  return seen


def gradients(
  by_products: Callable[[jax.Array, Part], jax.Array],
  h: jax.Array,
  matrices: tuple[jax.Array, ...],
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of a function of products(h, matrices[0]) by h and by that matrix.

  Args:
    by_products: (products [N, C], part) -> the function's gradient by these products.
    h: [N, E].
    matrices: [V, E] each, the first of them differentiated; parts hold rows of all.
    chunk: divides V.

  Returns:
    [N, E] and [V, E] in float32, of this device's rows and part of the vocabulary.
  """
  w = matrices[0]

  def visit(part: Part) -> tuple[jax.Array, jax.Array]:
    rows = part[0][0]
    dz = by_products(products(h, rows), part).astype(h.dtype)
    dh = jnp.einsum("nc,ce->ne", dz, rows.astype(h.dtype), preferred_element_type=jnp.float32)
    return dh, jnp.einsum("nc,ne->ce", dz, h, preferred_element_type=jnp.float32)

  def step(dh: jax.Array, part: Part) -> tuple[jax.Array, jax.Array]:
    more, dw = visit(part)
    return dh + more, dw

  first, rest = _chunks(matrices, chunk)
  dh, dw = visit(first)
  if w.shape[0] > chunk:
    dh, more = jax.lax.scan(step, dh, rest)
    dw = jnp.concatenate([dw[None], more])
  return dh, dw.reshape(w.shape)
