"""The elementwise parts of a block: RMS norm and rotary positions, each with its own backward pass.

What autodiff would keep for the backward pass of these is larger than their inputs, and reading it
again is most of what they cost on CPU. Shape letters: B batch, S positions, H heads, K head width.
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
