"""The elementwise parts of a block: RMS norm, rotary positions and SwiGLU.

Shape letters: B batch, S positions, H heads, K head width. The last two have a backward pass of
their own, which reads less than autodiff's: it keeps inputs where autodiff keeps what it made of
them.
"""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
  """x / sqrt(mean(x^2) + epsilon) * gain over the last axis, in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon)
  return (y * gain.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding (arXiv 2104.09864), pairing i with i + K/2 (the HF convention).

  (a, b) -> (a cos - b sin, b cos + a sin) for x = (a, b). The gradient is turned back by the same
  angles; the angles get none.

  Args:
    x: [B, S, H, K].
    cos, sin: [B, S, 1, K/2] float32.
  """
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rotate_forward(x, cos, sin):
  return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(saved, g):
  cos, sin = saved
  return rotate(g, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up (arXiv 2002.05202), elementwise."""
  return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
  return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, g):
  gate, up = saved
  share = jax.nn.sigmoid(gate)
  return g * up * share * (1 + gate * (1 - share)), g * gate * share


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
