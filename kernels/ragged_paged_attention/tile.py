"""One tile of attention with a running softmax (arXiv 2205.14135), in base 2.

State of a row: the largest logit so far m, the sum of weights l, and the weighted sum of values acc.
A tile of which a row sees nothing leaves its state as it was, to the last bit, or, before the first
key that it does see, in a state that this key wipes out.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30
LOG2E = 1.4426950408889634
LANES = 128


def start(m: jax.Ref, l: jax.Ref, acc: jax.Ref, sinks: jax.Array | None) -> None:
  """Sets the state to that of no key; `sinks` [rows, 1] are logits times log2(e)."""
  m[...] = jnp.full(m.shape, MASKED) if sinks is None else jnp.broadcast_to(sinks, m.shape)
  l[...] = jnp.full(l.shape, 0.0 if sinks is None else 1.0)
  acc[...] = jnp.zeros(acc.shape)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  m_ref: jax.Ref,
  l_ref: jax.Ref,
  acc_ref: jax.Ref,
  *,
  factor: jax.Array | float,
  soft_cap: float | None,
  seen: jax.Array | None,
) -> None:
  """Takes a tile of keys into the state.

  Args:
    q: [rows, K]. k: [keys, K]. v: [keys, V].
    m_ref, l_ref: [rows, 128] float32, all lanes alike. acc_ref: [rows, V] float32.
    factor: of q k, such that logits come out times log2(e); with a soft cap c, of q k / c.
    soft_cap: c of c tanh(x / c).
    seen: [rows, keys], which keys a row sees; None for all.
  """
  x = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  x = x * factor
  if soft_cap is not None:
    x = jnp.tanh(x) * (soft_cap * LOG2E)
  if seen is not None:
    x = jnp.where(seen, x, MASKED)
  before = m_ref[...]
  m = jnp.maximum(before, x.max(-1, keepdims=True))
  p = jnp.exp2(x - m[:, :1])
  alpha = jnp.exp2(before - m)
  m_ref[...] = m
  l_ref[...] = alpha * l_ref[...] + p.sum(-1, keepdims=True)
  some = jax.lax.dot_general(
    p.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
  acc_ref[...] = acc_ref[...] * alpha[:, :1] + some


def log_sum(m: jax.Array, l: jax.Array) -> jax.Array:
  """The natural logarithm of the sum of exp of all logits that the state has taken in."""
  return (m + jnp.log2(l)) / LOG2E
