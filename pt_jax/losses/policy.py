"""The loss of a token under an `Objective`: surrogate, KL, entropy bonus."""

import chex
import jax
import jax.numpy as jnp

from pt_jax.losses.kl import kl_estimate
from pt_jax.losses.objective import Objective
from pt_jax.losses.options import Correction, Kl
from pt_jax.losses.ratio import importance_ratio, log_ratio, sequence_log_ratio
from pt_jax.losses.surrogate import surrogate_loss

Metrics = dict[str, jax.Array]


def policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  segment_ids: jax.Array,
  *,
  objective: Objective,
  reference_logprobs: jax.Array | None = None,
  exact_kl: jax.Array | None = None,
  sampler_logprobs: jax.Array | None = None,
  entropy: jax.Array | None = None,
  kl_coefficient: jax.Array | float | None = None,
) -> tuple[jax.Array, Metrics]:
  """w * surrogate(r, A) + coefficient * KL - bonus * entropy of each token.

  r is the ratio to the policy before the first update on this batch (`importance_ratio`), w the
  correction for another sampler (`correction_weight`, 1 without one), KL(policy || reference) of
  the token (`kl_estimate`, or exact), times r when importance weighted. The KL of an objective that
  has it in the reward is only measured here.

  Args:
    logprobs: [B, S] float32, of the token at the same position under the policy that is trained.
    old_logprobs: [B, S] float32, under the policy before the first update on this batch.
    advantages: [B, S] float32.
    mask: [B, S] float32, 0 where the token is not trained; nothing there is read.
    segment_ids: [B, S] int32, -1 on padding; a ratio or correction of sequences sums over them.
    objective: reads `ratio`, `surrogate`, `kl`, `entropy` and `correction`.
    reference_logprobs: [B, S] float32, read if `objective.kl` is estimated from them.
    exact_kl: [B, S] float32, over the vocabulary, read if `objective.kl` is exact.
    sampler_logprobs: [B, S] float32, of the rollout engine, read if there is a correction.
    entropy: [B, S] float32, of the policy, read if `objective.entropy` is not 0.
    kl_coefficient: where a controller moves it; None: the objective's.

  Returns:
    loss [B, S], 0 outside the mask and not weighted by it, and metrics of the same shape, to be
    reduced by `token_mean`: `surrogate` (after the correction), `ratio`, `approx_kl` (k3 of KL(old
    || policy)), the fractions of `surrogate_loss`, with `objective.kl` also `kl` (without
    coefficient or importance weight), with a correction `correction_weight`.

  Raises:
    ValueError: when the objective needs an argument that is None.

  Source: arXiv 1707.06347 eq. 7; arXiv 2402.03300 eq. 3; those of `objective.py`.
  """
  inputs = [logprobs, old_logprobs, advantages, mask]
  chex.assert_rank([*inputs, segment_ids], 2)
  chex.assert_equal_shape([*inputs, segment_ids])
  chex.assert_type(inputs, jnp.float32)
  trained = mask > 0
  logprobs, advantages = (jnp.where(trained, x, 0) for x in (logprobs, advantages))
  log_r = log_ratio(logprobs, old_logprobs, mask)
  ratio = importance_ratio(log_r, mask, segment_ids, kind=objective.ratio)
  surrogate, metrics = surrogate_loss(ratio, logprobs, advantages, surrogate=objective.surrogate)
  if (option := objective.correction) is not None:
    sampler = _given("sampler_logprobs", "objective.correction", sampler_logprobs)
    weight = correction_weight(old_logprobs, sampler, mask, segment_ids, correction=option)
    surrogate *= weight
    metrics["correction_weight"] = weight
  loss = surrogate
  if (kl_option := objective.kl) is not None:
    kl = _kl(kl_option, logprobs, reference_logprobs, exact_kl, mask)
    metrics["kl"] = kl
    if kl_option.where == "loss":
      coefficient = kl_option.coefficient if kl_coefficient is None else kl_coefficient
      loss += coefficient * (kl * ratio if kl_option.importance_weighted else kl)
  if objective.entropy:
    loss -= objective.entropy * _given("entropy", "objective.entropy", entropy)
  metrics |= {"surrogate": surrogate, "ratio": ratio, "approx_kl": jnp.expm1(log_r) - log_r}
  metrics = {k: jax.lax.stop_gradient(jnp.where(trained, v, 0)) for k, v in metrics.items()}
  return jnp.where(trained, loss, 0), metrics


def correction_weight(
  trainer_logprobs: jax.Array,
  sampler_logprobs: jax.Array,
  mask: jax.Array,
  segment_ids: jax.Array,
  *,
  correction: Correction,
) -> jax.Array:
  """w = trainer / sampler probability, of a token or of a completion (the product), within bounds.

  `truncate` clips w to them; `mask` gives 0 to what lies outside.

  Args:
    trainer_logprobs: [B, S] float32, before the first update.
    sampler_logprobs: [B, S] float32, as the rollout engine reported them.
    mask: [B, S], 0 where the token is not trained; nothing there is read.
    segment_ids: [B, S] int32, -1 on padding.
    correction: level, mode and bounds.

  Returns:
    [B, S] float32, without gradient.

  Source: https://fengyao.notion.site/off-policy-rl (TIS); arXiv 2510.18855 (IcePop, `mask`).
  """
  log_w = log_ratio(trainer_logprobs, sampler_logprobs, mask)
  if correction.level == "sequence":
    log_w = sequence_log_ratio(log_w, mask, segment_ids, mean=False)
  weight = jnp.exp(log_w)
  if correction.mode == "truncate":
    weight = jnp.clip(weight, correction.low, correction.high)
  else:
    inside = (weight >= correction.low) & (weight <= correction.high)
    weight = jnp.where(inside, weight, 0)
  return jax.lax.stop_gradient(weight)


def _kl(
  option: Kl,
  logprobs: jax.Array,
  reference_logprobs: jax.Array | None,
  exact_kl: jax.Array | None,
  mask: jax.Array,
) -> jax.Array:
  if option.estimator == "exact":
    return jnp.where(mask > 0, _given("exact_kl", "objective.kl", exact_kl), 0)
  reference = _given("reference_logprobs", "objective.kl", reference_logprobs)
  return kl_estimate(logprobs, reference, mask, estimator=option.estimator)


def _given(name: str, reader: str, value: jax.Array | None) -> jax.Array:
  if value is None:
    raise ValueError(f"{name}: {reader} needs them, found None")
  return value
