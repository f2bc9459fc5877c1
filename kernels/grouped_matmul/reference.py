"""Products of groups of rows with a matrix each, group by group: the contract.

Letters: M rows, K what is summed over, N columns, G groups.
"""

import chex
import jax
import jax.numpy as jnp


def grouped_matmul(
  lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool = False
) -> jax.Array:
  """Row m of group g gives lhs[m] @ rhs[g]; summed in float32.

  Group g owns the group_sizes[g] rows behind those of the groups before it. Rows behind the last
  group give 0, and a group may be empty.

  Args:
    lhs: [M, K].
    rhs: [G, K, N], or [G, N, K] with `transpose_rhs`.
    group_sizes: [G] int32, their sum at most M.
    transpose_rhs: multiplies by the transposed matrices.

  Returns:
    [M, N] in the dtype of lhs.
  """
  chex.assert_rank([lhs, rhs, group_sizes], [2, 3, 1])
  chex.assert_equal_shape_prefix([rhs, group_sizes], 1)
  matrices = rhs.swapaxes(1, 2) if transpose_rhs else rhs
  chex.assert_equal(lhs.shape[1], matrices.shape[1])
  out = jnp.zeros((lhs.shape[0], matrices.shape[2]), jnp.float32)
  ends = jnp.cumsum(group_sizes)
  row = jnp.arange(lhs.shape[0])
  for matrix, size, end in zip(matrices, group_sizes, ends):
    mine = (row >= end - size) & (row < end)
    product = jnp.dot(lhs, matrix, preferred_element_type=jnp.float32)
    out = jnp.where(mine[:, None], product, out)
  return out.astype(lhs.dtype)
