"""SwiGLU and the rotary embedding: values and gradients against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import layers


def numeric_gradient(f, x, step=1e-6):
  """Central differences of the scalar f at x, in float64."""
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[index] += step
    down[index] -= step
    gradient[index] = (f(up) - f(down)) / (2 * step)
  return gradient


def swiglu(gate, up):
  return gate / (1 + np.exp(-gate)) * up


def rotated(x, cos, sin):
  """(a + ib) times exp(i angle)."""
  half = x.shape[-1] // 2
  z = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
  return np.concatenate([z.real, z.imag], -1)


def test_swiglu_and_its_gradients():
  rng = np.random.default_rng(0)
  gate, up, cotangent = 3 * rng.normal(size=(3, 2, 5))
  got, pull = jax.vjp(layers.swiglu, jnp.float32(gate), jnp.float32(up))
  np.testing.assert_allclose(got, swiglu(gate, up), rtol=1e-5, atol=1e-6)
  want = [
    numeric_gradient(lambda x: (cotangent * swiglu(x, up)).sum(), gate),
    numeric_gradient(lambda x: (cotangent * swiglu(gate, x)).sum(), up),
  ]
  for g, w in zip(pull(jnp.float32(cotangent)), want):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extreme", [-200.0, 200.0])
def test_swiglu_is_finite_where_the_sigmoid_is_flat(extreme):
  got, pull = jax.vjp(layers.swiglu, jnp.float32([extreme]), jnp.float32([2.0]))
  gate, up = pull(jnp.float32([1.0]))
  on = extreme > 0
  np.testing.assert_allclose([got[0], gate[0], up[0]], [2 * extreme * on, 2.0 * on, extreme * on])


def test_rotation_and_its_gradient():
  rng = np.random.default_rng(1)
  x, cotangent = rng.normal(size=(2, 2, 3, 2, 6))
  angles = rng.uniform(0, 6, (2, 3, 1, 3))
  cos, sin = np.cos(angles), np.sin(angles)
  turn = lambda x: layers.rotate(x, jnp.float32(cos), jnp.float32(sin))
  got, pull = jax.vjp(turn, jnp.float32(x))
  np.testing.assert_allclose(got, rotated(x, cos, sin), atol=1e-5)
  want = numeric_gradient(lambda x: (cotangent * rotated(x, cos, sin)).sum(), x)
  np.testing.assert_allclose(pull(jnp.float32(cotangent))[0], want, atol=1e-5)
