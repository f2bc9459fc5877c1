"""KL(policy || reference), estimated on tokens that the policy sampled.

`exact` is no estimate: the sum over the vocabulary, `models.divergence`, which needs both models in
the step.
"""

import chex
import jax
import jax.numpy as jnp

from pt_jax.losses.options import Estimator, KlController
from pt_jax.losses.ratio import log_ratio


def kl_estimate(
  logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array, *, estimator: Estimator
) -> jax.Array:
  """Schulman's estimators, with d = log(reference / policy) of the sampled token.

             value                            expected gradient as a loss, on policy
  k1  -d                unbiased, any sign    0: useless there without importance weights
  k2  d^2 / 2           biased, >= 0          that of KL(policy || reference)
  k3  exp(d) - d - 1    unbiased, >= 0        that of KL(reference || policy)

  Args:
    logprobs: [B, S] float32, under the policy that is trained.
    reference_logprobs: [B, S] float32, under the reference.
    mask: [B, S], 0 where the token is not trained.
    estimator: k1, k2 or k3.

  Returns:
    [B, S] nats, 0 outside the mask.

  Source: http://joschu.net/blog/kl-approx.html
  """
  if estimator == "exact":
    raise ValueError(
      "kl_estimate: expected k1, k2 or k3, found 'exact', which needs the vocabulary"
    )
  chex.assert_rank([logprobs, reference_logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, reference_logprobs, mask])
  difference = log_ratio(reference_logprobs, logprobs, mask)
  if estimator == "k1":
    return -difference
  if estimator == "k2":
    return 0.5 * jnp.square(difference)
  return jnp.expm1(difference) - difference


def adapted(coefficient: float, kl: float, controller: KlController) -> float:
  """The coefficient for the next step, after a step that measured `kl` nats per token.

  See `KlController` for both rules.
  """
  if controller.rule == "proportional":
    error = min(max(kl / controller.target - 1, -0.2), 0.2)
    return coefficient * (1 + controller.gain * error)
  if kl > 1.5 * controller.target:
    return 2 * coefficient
  return coefficient / 2 if kl < controller.target / 1.5 else coefficient
