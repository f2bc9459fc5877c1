"""The arithmetic of one tile of softmax attention, shared by training and rollout.

`flash_attention` and `ragged_paged_attention` both go over tiles of keys with these functions, so
that their outputs differ by the rounding of sums in another order only. Scores are in base 2,
because a TPU has exp2: logits x are x log2(e) here, and so are the running maximum and the sinks.

The online softmax (arXiv 1805.02867) of a query keeps the largest logit so far (top), the sum of
2^(logit - top) (total) and the sum of 2^(logit - top) v (out). `axis` is where the keys are: 0 for
tiles [keys, queries], where maxima and sums cross sublanes, 1 for [queries, keys].
"""

import math

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite, so that a query that sees nothing has no NaN


def query_factor(scale: float, soft_cap: float | None) -> float:
  """What queries are multiplied by before the product with the keys."""
  return scale * LOG2_E if soft_cap is None else scale / soft_cap


def logits(products: jax.Array, soft_cap: float | None) -> jax.Array:
  """Products of keys and multiplied queries, as base-2 logits: c tanh(x / c) under a soft cap."""
  return products if soft_cap is None else jnp.tanh(products) * (soft_cap * LOG2_E)


def update(
  x: jax.Array, top: jax.Array, total: jax.Array, *, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """One tile of logits joins the softmax.

  Args:
    x: [keys, queries] (axis 0) or [queries, keys] (axis 1) float32, `MASKED` where unseen.
    top, total: as x, along `axis` of size 1 or any number of copies; (`MASKED`, 0) before the first
      tile, or (sink, 1).
    axis: where the keys are.

  Returns:
    (weights like x, top, total, fade): the sum of weighted values so far is to be multiplied by
    fade before this tile's is added.
  """
  highest = jnp.maximum(top, x.max(axis, keepdims=True))
  fade = jnp.exp2(top - highest)
  weights = jnp.exp2(x - jax.lax.slice_in_dim(highest, 0, 1, axis=axis))
  return weights, highest, total * fade + weights.sum(axis, keepdims=True), fade


def finish(out: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(softmax-weighted values, natural lse) after the last tile; zeros and `MASKED` for a query that
  saw nothing and has no sink."""
  some = top > MASKED / 2
  share = jnp.where(some, 1 / total, 0)
  return out * share, jnp.where(some, (top + jnp.log2(total)) / LOG2_E, MASKED)
