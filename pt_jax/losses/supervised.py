"""Supervised objectives."""

import chex
import jax
import jax.numpy as jnp


def nll(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """Negative log-likelihood, -log p(token | what stands before it in its segment), in nats.

  Args:
    logprobs: [B, S] float32, of the token at the same position.
    mask: [B, S] float32, 0 where the token is not trained.

  Returns:
    [B, S], 0 outside the mask and not weighted by it. It is its own metric: the exponential of its
    `token_mean` is the perplexity.
  """
  chex.assert_rank([logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, mask])
  chex.assert_type([logprobs, mask], jnp.float32)
  return jnp.where(mask > 0, -logprobs, 0)
