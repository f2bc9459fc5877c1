"""Surrogates of the policy gradient: what a ratio and an advantage make of a token's loss.

All of them have the gradient -A at ratio 1, by the log-prob of the token; what differs is how it
changes as the policy moves away from the one that acted.
"""

import jax
import jax.numpy as jnp

from pt_jax.losses.options import Cispo, Clip, Sapo, Surrogate

Metrics = dict[str, jax.Array]


def surrogate_loss(
  ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array, *, surrogate: Surrogate
) -> tuple[jax.Array, Metrics]:
  """The loss of each token, [B, S], and which of them the surrogate holds back.

  Args:
    ratio: [B, S] float32, of the policy to the one that acted; see `ratio.importance_ratio`.
    logprobs: [B, S] float32, under the policy; only `Cispo` reads it.
    advantages: [B, S] float32.
    surrogate: which one, and its bounds.

  Returns:
    loss [B, S], and metrics [B, S]: `clip_fraction_low`, `clip_fraction_high`, `clip_fraction_dual`
    and their sum `clip_fraction`. A token counted there has no gradient under `Clip`, and a capped
    weight under `Cispo`; `Sapo` has no bound, so its are 0.
  """
  if isinstance(surrogate, Clip):
    return _clip(ratio, advantages, surrogate)
  if isinstance(surrogate, Cispo):
    return _cispo(ratio, logprobs, advantages, surrogate)
  return _sapo(ratio, advantages, surrogate)


def _clip(ratio: jax.Array, advantages: jax.Array, option: Clip) -> tuple[jax.Array, Metrics]:
  """The pessimistic one of the clipped and the unclipped term; for A < 0 not above dual * |A|."""
  clipped = jnp.clip(ratio, 1 - option.low, 1 + option.high)
  loss = -jnp.minimum(ratio * advantages, clipped * advantages)
  low = (ratio < 1 - option.low) & (advantages < 0)
  high = (ratio > 1 + option.high) & (advantages > 0)
  dual = jnp.zeros_like(low)
  if option.dual is not None:
    dual = (ratio > option.dual) & (advantages < 0)
    loss = jnp.where(dual, -option.dual * advantages, loss)
  return loss, _fractions(low, high, dual)


def _cispo(
  ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array, option: Cispo
) -> tuple[jax.Array, Metrics]:
  """-sg(clip(r)) A log p. Without the stop-gradient its sign would turn where log p < -1."""
  weight = jax.lax.stop_gradient(jnp.clip(ratio, option.low, option.high))
  low, high = ratio < option.low, ratio > option.high
  return -weight * advantages * logprobs, _fractions(low, high, jnp.zeros_like(low))


def _sapo(ratio: jax.Array, advantages: jax.Array, option: Sapo) -> tuple[jax.Array, Metrics]:
  tau = jnp.where(advantages > 0, option.positive, option.negative)
  none = jnp.zeros_like(ratio, bool)
  loss = -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages
  return loss, _fractions(none, none, none)


def _fractions(low: jax.Array, high: jax.Array, dual: jax.Array) -> Metrics:
  low, high, dual = (x.astype(jnp.float32) for x in (low, high, dual))
  return {
    "clip_fraction": low + high + dual,
    "clip_fraction_low": low,
    "clip_fraction_high": high,
    "clip_fraction_dual": dual,
  }
