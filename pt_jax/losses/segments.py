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


def segment_starts(segment_ids: jax.Array) -> jax.Array:
  """[B, S] bool, the first position of each segment, laid out over the mesh as the ids are."""
  chex.assert_rank(segment_ids, 2)
  ids = whole_rows(segment_ids)
  before = jnp.concatenate([jnp.full_like(ids[:, :1], -1), ids[:, :-1]], axis=1)
  return like((ids >= 0) & (ids != before), segment_ids)


def segment_count(segment_ids: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Number of segments in the batch, [] float32; padding is none.

  With `weights` [B, S], constant within a segment, the sum of the segments' weights.
  """
  starts = segment_starts(segment_ids)
  if weights is None:
    return jnp.sum(starts, dtype=jnp.float32)
  return jnp.sum(jnp.where(starts, weights, 0))


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


def segment_ends(segment_ids: jax.Array) -> jax.Array:
  """[B, S] bool, the last position of every segment of `segment_ids` [B, S]; padding has none."""
  chex.assert_rank(segment_ids, 2)
  ids = whole_rows(segment_ids)
  behind = jnp.concatenate([ids[:, 1:], jnp.full_like(ids[:, :1], -1)], axis=1)
  return like((ids >= 0) & (ids != behind), segment_ids)


@jax.jit
def segment_suffix_logsumexp(
  values: jax.Array, held: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """log sum_{j >= t} exp(values_j) over the held positions j of the segment of each position t.

  The doubling of `segment_sum`, with a stable sum of exponentials: values may be of any size, and
  any distance apart.

  Args:
    values: [B, S] float; read where `held`.
    held: [B, S] bool.
    segment_ids: [B, S] int, -1 on padding; the segments of a row have different numbers.

  Returns:
    [B, S], 0 on padding and where nothing is held from there on, laid out over the mesh as `values`
    is. Differentiable in `values`.
  """
  chex.assert_rank([values, held, segment_ids], 2)
  chex.assert_equal_shape([values, held, segment_ids])
  nothing = jnp.asarray(-1e30, values.dtype)  # -inf has no gradient in a sum with another -inf
  ids = whole_rows(segment_ids)
  kept = whole_rows(held) & (ids >= 0)
  length = ids.shape[1]
  position = jnp.arange(length)

  def double(since, shift):
    later = (jnp.roll(ids, -shift, 1) == ids) & (position < length - shift)
    ahead = jnp.where(later, jnp.roll(since, -shift, 1), nothing)
    return jnp.logaddexp(since, ahead), None

  shifts = 2 ** jnp.arange((length - 1).bit_length())
  since, _ = jax.lax.scan(double, jnp.where(kept, whole_rows(values), nothing), shifts)
  return like(jnp.where(since > nothing / 2, since, 0), values)
