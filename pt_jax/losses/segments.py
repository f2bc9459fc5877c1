"""Sums over packed segments, without a scatter and without an [S, S] matrix.

Shapes: B rows, S positions. A segment is a run of equal `segment_ids` >= 0 in a row; padding is -1.
"""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


def whole_rows(x: jax.Array) -> jax.Array:
  """`x` [B, S] with each row on one device: JAX does not scan along a sharded axis."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[1] is None:
    return x
  return jax.reshard(x, NamedSharding(sharding.mesh, jax.P(sharding.spec[0], None)))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
  """`x` [B, S] laid out over the mesh as `other` is."""
  wanted = jax.typeof(other).sharding
  return x if jax.typeof(x).sharding == wanted else jax.reshard(x, wanted)


def segment_count(segment_ids: jax.Array) -> jax.Array:
  """Number of segments in the batch, [] float32; padding is none."""
  chex.assert_rank(segment_ids, 2)
  ids = whole_rows(segment_ids)
  before = jnp.concatenate([jnp.full_like(ids[:, :1], -1), ids[:, :-1]], axis=1)
  return jnp.sum((ids >= 0) & (ids != before), dtype=jnp.float32)


@jax.jit  # traced and compiled once a shape, also where the caller is not jitted
def segment_sum(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Sum of `values` over the segment of each position, given to each of its positions.

  Sums of the 1, 2, 4... positions up to and since each one are doubled log2(S) times, inside its
  segment. The difference of cumulative sums would be one pass, but it loses the small segments of a
  long row to cancellation; `associative_scan` is as exact and takes 20 times as long to compile.

  Args:
    values: [B, S] float.
    segment_ids: [B, S] int, -1 on padding; the segments of a row have different numbers.

  Returns:
    [B, S], 0 on padding, laid out over the mesh as `values` is. Differentiable in `values`.
  """
  chex.assert_rank([values, segment_ids], 2)
  chex.assert_equal_shape([values, segment_ids])
  row_values, ids = whole_rows(values), whole_rows(segment_ids)
  length = ids.shape[1]
  position = jnp.arange(length)

  def double(sums, shift):
    until, since = sums
    earlier = (jnp.roll(ids, shift, 1) == ids) & (position >= shift)
    later = (jnp.roll(ids, -shift, 1) == ids) & (position < length - shift)
    until += jnp.where(earlier, jnp.roll(until, shift, 1), 0)
    since += jnp.where(later, jnp.roll(since, -shift, 1), 0)
    return (until, since), None

  shifts = 2 ** jnp.arange((length - 1).bit_length())
  (until, since), _ = jax.lax.scan(double, (row_values, row_values), shifts)
  return like(jnp.where(ids >= 0, until + since - row_values, 0), values)
