"""Log-probs of labels from hidden states and the output matrix, in plain JAX: the contract.

Letters: N rows (tokens), E width, V vocabulary, K label sets.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

IGNORE = -100


class Statistics(NamedTuple):
  """Of the softmax of each row's logits, float32 and in nats. Gradients flow through all but
  `top1`."""

  logprobs: jax.Array  # [N] or [N, K], of the labels; 0 at an ignored one
  entropy: jax.Array  # [N]
  top1: jax.Array  # [N] int32, the likeliest token, the first of equals
  lse: jax.Array  # [N], log of the sum of exp(logits)


def linear_logprob(
  hidden: jax.Array,
  matrix: jax.Array,
  labels: jax.Array,
  *,
  temperature: float = 1.0,
  soft_cap: float | None = None,
  ignore: int = IGNORE,
) -> Statistics:
  """Statistics of softmax(z) with z = cap(hidden @ matrix.T) / temperature, cap(x) = c tanh(x / c).

  Products and everything behind them in float32, whatever the dtype of the hidden states, to which
  the matrix is rounded.

  Args:
    hidden: [N, E].
    matrix: [V, E].
    labels: [N] or [N, K] int32: token ids, or `ignore`.
    temperature: divides the logits.
    soft_cap: c; None for no cap.
    ignore: the label that gives 0 and no gradient.
  """
  chex.assert_rank([hidden, matrix, labels], [2, 2, {1, 2}])
  chex.assert_equal(hidden.shape[1], matrix.shape[1])
  z = jnp.einsum(
    "ne,ve->nv", hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
  z = (soft_cap * jnp.tanh(z / soft_cap) if soft_cap else z) / temperature
  lse = jax.nn.logsumexp(z, -1)
  log_p = z - lse[:, None]
  entropy = -(jnp.exp(log_p) * log_p).sum(-1)
  each = labels[:, None] if labels.ndim == 1 else labels
  picked = jnp.take_along_axis(log_p, jnp.where(each == ignore, 0, each), axis=1)
  logprobs = jnp.where(each == ignore, 0, picked).reshape(labels.shape)
  return Statistics(logprobs, entropy, jnp.argmax(z, -1).astype(jnp.int32), lse)
