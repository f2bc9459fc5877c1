"""Ratios of the probabilities that two policies give to the same tokens."""

import typing
from typing import Literal

import jax
import jax.numpy as jnp

from pt_jax.losses import segments

Ratio = Literal["token", "sequence", "sequence_token", "product"]
RATIOS: tuple[str, ...] = typing.get_args(Ratio)

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
  return _limited(jnp.where(mask > 0, logprobs - other_logprobs, 0))


def sequence_log_ratio(
  log_r: jax.Array, mask: jax.Array, segment_ids: jax.Array, *, mean: bool
) -> jax.Array:
  """Sum, or mean, of the tokens' log-ratios over the trained tokens of each segment.

  Args:
    log_r: [B, S] from `log_ratio`.
    mask: [B, S], the trained tokens.
    segment_ids: [B, S] int32, -1 on padding.
    mean: divide by the number of trained tokens.

  Returns:
    [B, S], the same at every position of a segment, clipped to +-`LOG_RATIO_LIMIT`.
  """
  total = segments.segment_sum(log_r, segment_ids)
  if mean:
    count = segments.segment_sum((mask > 0).astype(log_r.dtype), segment_ids)
    total = total / jnp.maximum(count, 1)
  return _limited(total)


def importance_ratio(
  log_r: jax.Array, mask: jax.Array, segment_ids: jax.Array, *, kind: Ratio
) -> jax.Array:
  """The ratio that a surrogate is made of, at every token.

  token           r_t = p_t / q_t (PPO)
  sequence        s = exp(mean_t log r_t) (GSPO): the same for all tokens of a completion
  sequence_token  sg(s) p_t / sg(p_t) (GSPO-token): the value of s, the gradient of token t alone
  product         prod_t r_t (RLOO): the ratio of whole completions

  Source: arXiv 2507.18071, eq. 7 and 14.
  """
  if kind == "token":
    return jnp.exp(log_r)
  whole = jnp.exp(sequence_log_ratio(log_r, mask, segment_ids, mean=kind != "product"))
  if kind == "sequence_token":
    own = jnp.exp(log_r - jax.lax.stop_gradient(log_r))
    return jax.lax.stop_gradient(whole) * own
  return whole


def _limited(log_r: jax.Array) -> jax.Array:
  return jnp.clip(log_r, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
