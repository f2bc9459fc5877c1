"""The output matrix visited in chunks of the vocabulary, forward and backward; inside shard_map.

N is B * S on one device, D the width, V/t the part of the vocabulary on one device of `tensor`, C a
chunk of that part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pt_jax.sharding import USE

TENSOR = "tensor"
BATCH_AXES = ("data", "expert", "context")  # the mesh axes that positions are split over
Part = tuple[tuple[jax.Array, ...], jax.Array]  # rows [C, D] of each matrix, id of the first row


def divisor(size: int, most: int) -> int:
  """The largest divisor of size that is at most `most`."""
  return next(d for d in range(min(size, most), 0, -1) if size % d == 0)


def shift(x: jax.Array, by: int) -> jax.Array:
  """x [B, S] rolled along S, which is whole meanwhile (JAX does not roll a split axis)."""
  whole = jax.reshard(x, USE.spec("batch", None))
  return jax.reshard(jnp.roll(whole, by, axis=1), USE.spec("batch", "seq"))


def at_next_token(tree: Any) -> Any:
  """Statistics [B, S] of what follows a position, moved to the token that follows; entry 0 is 0."""

  def move(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[1]) == 0, 0, shift(x, 1))

  return jax.tree.map(move, tree)


def logits(h: jax.Array, rows: jax.Array, temperature: float) -> jax.Array:
  """h [N, D], rows [C, D] -> [N, C] float32, divided by the temperature."""
  z = jnp.einsum("nd,cd->nc", h, rows.astype(h.dtype), preferred_element_type=jnp.float32)
  return z / temperature


def _chunks(matrices: tuple[jax.Array, ...], chunk: int) -> tuple[Part, Part]:
  """Matrices [V/t, D] cut into parts: the first, and the others stacked. A scan that starts from a
  real chunk needs no neutral element."""
  size = matrices[0].shape[0]
  start = jax.lax.axis_index(TENSOR) * size
  cut = tuple(w.reshape(-1, chunk, w.shape[1]) for w in matrices)
  parts = cut, start + jnp.arange(size // chunk) * chunk
  return jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)


def fold(
  measure: Callable[[Part], Any],
  merge: Callable[[Any, Any], Any],
  matrices: tuple[jax.Array, ...],
  chunk: int,
) -> Any:
  """What `measure` finds in each chunk of this device, merged into one."""
  first, rest = _chunks(matrices, chunk)
  seen = measure(first)
  if matrices[0].shape[0] > chunk:
    step = lambda seen, part: (merge(seen, measure(part)), None)
    seen, _ = jax.lax.scan(step, seen, rest)
  return seen


def gradients(
  by_logits: Callable[[jax.Array, Part], jax.Array],
  h: jax.Array,
  matrices: tuple[jax.Array, ...],
  temperature: float,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of a function of logits(h, matrices[0]) by h and by that matrix, over all devices.

  Args:
    by_logits: (logits [N, C], part) -> the function's gradient by these logits.
    h: [N, D].
    matrices: [V/t, D] each, the first of them differentiated; parts hold rows of all.
    temperature, chunk: as in the forward pass.
  """
  w = matrices[0]

  def visit(part: Part) -> tuple[jax.Array, jax.Array]:
    rows = part[0][0]
    dz = by_logits(logits(h, rows, temperature), part)
    dz = (dz / temperature).astype(h.dtype)
    dh = jnp.einsum("nc,cd->nd", dz, rows.astype(h.dtype), preferred_element_type=jnp.float32)
    return dh, jnp.einsum("nc,nd->cd", dz, h, preferred_element_type=jnp.float32)

  def step(dh: jax.Array, part: Part) -> tuple[jax.Array, jax.Array]:
    more, dw = visit(part)
    return dh + more, dw

  first, rest = _chunks(matrices, chunk)
  dh, dw = visit(first)
  if w.shape[0] > chunk:
    dh, more = jax.lax.scan(step, dh, rest)
    dw = jnp.concatenate([dw[None], more])
  dh = jax.lax.psum(dh, TENSOR).astype(h.dtype)
  whole = BATCH_AXES if jax.lax.axis_size(TENSOR) > 1 else (*BATCH_AXES, TENSOR)
  for axis in whole:  # one at a time: JAX refuses a mix of axes that dw varies over and does not
    dw = jax.lax.psum(dw, axis)
  return dh, dw.reshape(w.shape).astype(w.dtype)
