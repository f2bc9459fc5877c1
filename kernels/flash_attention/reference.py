"""Attention over packed segments, in plain JAX: the contract that a kernel has to meet.

Letters: B batch, S query positions, T key positions, G key/value heads, R queries per key head, K
head width. H = G * R query heads.
"""

import chex
import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that sees nothing has no NaN


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_positions: jax.Array,
  k_positions: jax.Array,
  q_segments: jax.Array,
  k_segments: jax.Array,
  scale: float,
) -> jax.Array:
  """Causal softmax attention within segments; scores and softmax in float32.

  Query (segment s, position i) attends to the keys of segment s at positions <= i. Segment ids
  below 0 are padding: such a query gets zeros, such a key is never attended to.

  Args:
    q: [B, S, H, K].
    k, v: [B, T, G, K]; query head h reads key head h // (H / G).
    q_positions, q_segments: [B, S] int32.
    k_positions, k_segments: [B, T] int32.
    scale: multiplies the scores, usually K ** -0.5.

  Returns:
    [B, S, H, K] in the dtype of v.
  """
  chex.assert_rank([q, k, v], 4)
  chex.assert_equal_shape([k, v])
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, groups, heads // groups, width)
  scores = jnp.einsum("bsgrk,btgk->bgrst", q, k, preferred_element_type=jnp.float32)
  seen = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments >= 0)[:, :, None]
  seen &= q_positions[:, :, None] >= k_positions[:, None, :]
  scores = jnp.where(seen[:, None, None], scores, MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  weights = weights / weights.sum(-1, keepdims=True)
  out = jnp.einsum("bgrst,btgk->bsgrk", weights.astype(v.dtype), v)
  out = jnp.where((q_segments >= 0)[:, :, None, None, None], out, 0)
  return out.reshape(batch, length, heads, width)
