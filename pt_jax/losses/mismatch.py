"""How far the rollout engine's log-probs are from the trainer's on the same weights."""

import chex
import jax
import jax.numpy as jnp

from pt_jax.losses.ratio import log_ratio


def logprob_gap(
  trainer_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """What g = trainer - sampler says of each trained token.

  Both are meant for the same weights, before the update; g is then numerics, and anything that is
  not small means that the gradient belongs to another policy than the one that acted.

  Args:
    trainer_logprobs: [B, S] float32, the trainer's forward pass.
    sampler_logprobs: [B, S] float32, as the rollout engine reported them.
    mask: [B, S], 0 where the token is not trained; nothing there is read.

  Returns:
    metrics [B, S], without gradient, 0 outside the mask: `logprob_gap` = |g| in nats, to be reduced
    by `token_mean` and by the largest, and `logprob_gap_kl` = exp(g) - g - 1, whose `token_mean`
    estimates KL(sampler || trainer) (k3).
  """
  inputs = [trainer_logprobs, sampler_logprobs, mask]
  chex.assert_rank(inputs, 2)
  chex.assert_equal_shape(inputs)
  gap = jnp.where(mask > 0, trainer_logprobs - sampler_logprobs, 0)
  log_r = log_ratio(trainer_logprobs, sampler_logprobs, mask)
  metrics = {"logprob_gap": jnp.abs(gap), "logprob_gap_kl": jnp.expm1(log_r) - log_r}
  return jax.lax.stop_gradient(metrics)
