"""From per-token values to one number: `Sum` and the named reductions.

A loss hands out values [B, S]; a reduction turns them into a total and a weight, both sums. The
step adds totals and weights over microbatches and hosts and divides ONCE, so the objective does not
change with the number of microbatches, with padding or with what shares a row.

name            objective                                                as in
`token_mean`    sum(l m) / sum(m)                                        DAPO, BNPO, SFT
`segment_mean`  mean over segments of sum(l m) / sum(m) in the segment   GRPO, SFT per sample
`constant`      sum(l m) / (segments * constant_length)                  Dr. GRPO

There is no mean over rows: with one segment in a row it is `segment_mean`, with more it would
depend on the packing. A segment counts when it has a token (id >= 0), also when nothing in it is
trained (a truncated completion that is masked whole): it then adds 0 to the total and 1 to the
number of segments, as in TRL.

Segments may have weights w. Then each one's tokens weigh w as much and it counts as w segments:
sum(l m w) / sum(m w), the weighted mean over segments, sum(l m w) / (sum(w) * constant_length).
Kinds of token weigh differently through the mask.
"""

import typing
from typing import Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.losses import segments

Reduction = Literal["token_mean", "segment_mean", "constant"]
REDUCTIONS: tuple[str, ...] = typing.get_args(Reduction)


@flax.struct.dataclass
class Sum:
  """A weighted sum that is still to be divided; add those of all microbatches first."""

  total: jax.Array  # [] float32
  weight: jax.Array  # [] float32

  def __add__(self, other: "Sum") -> "Sum":
    return Sum(self.total + other.total, self.weight + other.weight)

  def mean(self) -> jax.Array:
    """total / weight, [] float32; 0 when nothing was weighed (a batch of padding)."""
    return jnp.where(
      self.weight == 0, 0.0, self.total / jnp.where(self.weight == 0, 1, self.weight)
    )


def check_reduction(reduction: str, constant_length: int | None) -> None:
  """Raises ValueError for an unknown name, and for a `constant_length` missing, unread or < 1."""
  if reduction not in REDUCTIONS:
    raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
  if reduction != "constant" and constant_length is not None:
    raise ValueError(f"constant_length: {reduction!r} does not read it, found {constant_length}")
  if reduction == "constant" and (constant_length is None or constant_length < 1):
    raise ValueError(f"constant_length: 'constant' needs a length >= 1, found {constant_length}")


def token_weights(
  reduction: Reduction,
  mask: jax.Array,
  segment_ids: jax.Array,
  *,
  constant_length: int | None = None,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Every reduction is linear in the values: the weight of each token, and what to divide by last.

  Args:
    reduction: one of `REDUCTIONS`.
    mask: [B, S] float32 >= 0, weight of the token; 0 where it is not trained.
    segment_ids: [B, S] int32, -1 on padding.
    constant_length: tokens that `constant` takes each segment for; None for the others.
    weights: [B, S] float32, of the segment at each of its tokens; None: all alike.

  Returns:
    weights [B, S] and denominator [], float32; the reduced value is
    sum(values * weights) / denominator, with both sums over the whole batch.

  Raises:
    ValueError: see `check_reduction`.
  """
  chex.assert_rank([mask, segment_ids], 2)
  chex.assert_equal_shape([mask, segment_ids])
  chex.assert_type([mask, segment_ids], [jnp.float32, jnp.int32])
  check_reduction(reduction, constant_length)
  weighed = mask if weights is None else mask * weights
  if reduction == "token_mean":
    return weighed, jnp.sum(weighed)
  count = segments.segment_count(segment_ids, weights)
  if constant_length is not None:
    return weighed, count * constant_length
  trained = segments.segment_sum(mask, segment_ids)
  return weighed / jnp.where(trained == 0, 1, trained), count


def reduce(
  reduction: Reduction,
  values: jax.Array,
  mask: jax.Array,
  segment_ids: jax.Array,
  *,
  constant_length: int | None = None,
  weights: jax.Array | None = None,
) -> Sum:
  """`values` [B, S] float32 under a named reduction, still to be divided; see `token_weights`."""
  chex.assert_equal_shape([values, mask])
  chex.assert_type(values, jnp.float32)
  factors, denominator = token_weights(
    reduction, mask, segment_ids, constant_length=constant_length, weights=weights
  )
  # Selected, not only multiplied: what stands on padding may be infinite.
  return Sum(jnp.sum(jnp.where(factors == 0, 0, values * factors)), denominator)
