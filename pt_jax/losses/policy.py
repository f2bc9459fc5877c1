"""The clipped policy-gradient surrogate with its KL term."""

import chex
import jax
import jax.numpy as jnp

from pt_jax.losses.kl import kl_estimate
from pt_jax.losses.objective import Clip, Objective
from pt_jax.losses.ratio import log_ratio

Metrics = dict[str, jax.Array]


def policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  objective: Objective,
  reference_logprobs: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """-min(r A, clip(r, 1 - low, 1 + high) A) + coefficient * KL of each token, r = p / p_old.

  The gradient by the log-prob, before the reduction: -A r, but 0 where A > 0 and r > 1 + high or
  A < 0 and r < 1 - low; plus the KL's, for k3 coefficient * (1 - reference / p).

  Args:
    logprobs: [B, S] float32, of the token at the same position under the policy that is trained.
    old_logprobs: [B, S] float32, under the policy before the first update on this batch.
    advantages: [B, S] float32.
    mask: [B, S] float32, 0 where the token is not trained; nothing there is read.
    objective: reads `clip` and `kl`.
    reference_logprobs: [B, S] float32, read if `objective.kl` is given.

  Returns:
    loss [B, S], 0 outside the mask and not weighted by it, and metrics of the same shape, to be
    reduced by `token_mean`: `surrogate` (the loss without KL), `ratio`, `approx_kl` (k3 of
    KL(old || policy)), `clip_fraction` and its parts `clip_fraction_low` and `clip_fraction_high`
    (tokens that the clip silenced), and with `objective.kl` also `kl` (the estimate, without
    coefficient or importance weight).

  Raises:
    ValueError: when the objective has a KL and `reference_logprobs` is None.

  Source: arXiv 1707.06347 eq. 7; arXiv 2402.03300 eq. 3; clip-higher arXiv 2503.14476 eq. 8.
  """
  inputs = [logprobs, old_logprobs, advantages, mask]
  chex.assert_rank(inputs, 2)
  chex.assert_equal_shape(inputs)
  chex.assert_type(inputs, jnp.float32)
  advantages = jnp.where(mask > 0, advantages, 0)
  log_r = log_ratio(logprobs, old_logprobs, mask)
  ratio = jnp.exp(log_r)
  surrogate, metrics = _clipped_surrogate(ratio, advantages, objective.clip)
  loss = surrogate
  if (option := objective.kl) is not None:
    if reference_logprobs is None:
      raise ValueError("reference_logprobs: objective.kl needs them, found None")
    kl = kl_estimate(logprobs, reference_logprobs, mask, estimator=option.estimator)
    loss += option.coefficient * (kl * ratio if option.importance_weighted else kl)
    metrics["kl"] = kl
  metrics |= {"ratio": ratio, "approx_kl": jnp.expm1(log_r) - log_r}
  trained = mask > 0
  metrics = {k: jax.lax.stop_gradient(jnp.where(trained, v, 0)) for k, v in metrics.items()}
  return loss, metrics


def _clipped_surrogate(
  ratio: jax.Array, advantages: jax.Array, clip: Clip
) -> tuple[jax.Array, Metrics]:
  """The pessimistic one of the clipped and the unclipped term, and which side of the clip bit."""
  clipped = jnp.clip(ratio, 1 - clip.low, 1 + clip.high)
  surrogate = -jnp.minimum(ratio * advantages, clipped * advantages)
  low = ((ratio < 1 - clip.low) & (advantages < 0)).astype(jnp.float32)
  high = ((ratio > 1 + clip.high) & (advantages > 0)).astype(jnp.float32)
  return surrogate, {
    "surrogate": surrogate,
    "clip_fraction": low + high,
    "clip_fraction_low": low,
    "clip_fraction_high": high,
  }
