"""The public call, and its backward pass: a grouped product and a product by group."""

import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from kernels import varying
from kernels.grouped_matmul import tpu

TILES = frozenset(("rows", "columns", "depth"))


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  transpose_rhs: bool = False,
  tiles: Mapping[str, int] | None = None,
  chip: str | None = None,
) -> jax.Array:
  """`reference.grouped_matmul` with gradients to lhs and rhs; those of an empty group are 0.

  Args:
    lhs: [M, K].
    rhs: [G, K, N], or [G, N, K] with `transpose_rhs`.
    group_sizes: [G] int32, their sum at most M.
    transpose_rhs: multiplies by the transposed matrices.
    tiles: of the TPU form, instead of those of `kernels/tiles.py`: "rows" of lhs, "columns" of the
      result, "depth" of the gradient by rhs (its part of K).
    chip: a name of `kernels.chip.CHIPS`; None for the XLA form.

  Returns:
    [M, N] in the dtype of lhs.

  Raises ValueError for unknown tiles.
  """
  chex.assert_rank([lhs, rhs, group_sizes], [2, 3, 1])
  chex.assert_equal_shape_prefix([rhs, group_sizes], 1)
  chex.assert_equal(lhs.shape[1], rhs.shape[2 if transpose_rhs else 1])
  if tiles is not None and (set(tiles) != TILES or min(tiles.values()) < 1):
    raise ValueError(f"grouped_matmul: tiles: expected {sorted(TILES)} >= 1, found {dict(tiles)}")
  rhs = rhs.astype(lhs.dtype)
  if chip is None:
    matrices = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    out = jax.lax.ragged_dot(lhs, matrices, group_sizes, preferred_element_type=jnp.float32)
    return out.astype(lhs.dtype)
  sizes = tuple(sorted(tiles.items())) if tiles else None
  return _product(transpose_rhs, sizes, chip, lhs, rhs, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(transpose_rhs, tiles, chip, lhs, rhs, group_sizes):
  return tpu.product(lhs, rhs, group_sizes, transpose_rhs, tpu.tiles_of(tiles, chip), chip)


def _forward(transpose_rhs, tiles, chip, lhs, rhs, group_sizes):
  return _product(transpose_rhs, tiles, chip, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(transpose_rhs, tiles, chip, saved, g):
  """By lhs: g @ rhs[group]^T, a grouped product. By rhs: lhs^T g of the rows of each group."""
  lhs, rhs, group_sizes = saved
  sizes = tpu.tiles_of(tiles, chip)
  by_lhs = tpu.product(g, rhs, group_sizes, not transpose_rhs, sizes, chip)
  left, right = (g, lhs) if transpose_rhs else (lhs, g)
  by_rhs = tpu.product_by_group(left, right, group_sizes, sizes, chip)
  return varying.like(by_lhs, lhs), varying.like(by_rhs, rhs), None


_product.defvjp(_forward, _backward)
