"""Ratios of the probabilities that two policies give to the same token."""

import jax
import jax.numpy as jnp

# exp(40) = 2.4e17, and the product of two such ratios is still a float32. A token on which two
# policies differ by a factor of 1e17 is broken, not informative: past the limit it has a value and
# no gradient.
LOG_RATIO_LIMIT = 40.0


def log_ratio(logprobs: jax.Array, other_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """log(p / q) of each token, clipped to +-`LOG_RATIO_LIMIT`, 0 outside the mask.

  Args:
    logprobs: [B, S] float32, log p.
    other_logprobs: [B, S] float32, log q.
    mask: [B, S], 0 where the token is not trained; nothing there reaches the value or the gradient.

  Returns:
    [B, S] float32.
  """
  difference = jnp.where(mask > 0, logprobs - other_logprobs, 0)
  return jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
