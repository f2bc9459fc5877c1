"""The value loss against its formula in float64, with gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses.value import value_loss


def _truth(v, old, r, clip):
  """0.5 max((v - R)^2, (v_old + clip(v - v_old) - R)^2) and its derivative by v."""
  error, slope = (v - r) ** 2, v - r
  if clip is None:
    return 0.5 * error, slope
  near = old + np.clip(v - old, -clip, clip)
  other = (near - r) ** 2
  inside = np.abs(v - old) < clip
  return 0.5 * np.maximum(error, other), np.where(other > error, inside * (near - r), slope)


@pytest.mark.parametrize("clip", [None, 0.5, 0.1])
def test_equals_the_formula(clip):
  rng = np.random.default_rng(0)
  v, old, r = rng.normal(size=(3, 4, 6)).astype(np.float32)
  mask = (rng.uniform(size=v.shape) < 0.7).astype(np.float32)
  loss = lambda v: value_loss(v, r, old, mask, clip=clip)
  value, metrics = loss(jnp.asarray(v))
  slope = jax.grad(lambda v: loss(v)[0].sum())(jnp.asarray(v))
  wanted, wanted_slope = _truth(v.astype(np.float64), old, r, clip)
  np.testing.assert_allclose(value, wanted * mask, rtol=1e-5)
  np.testing.assert_allclose(slope, wanted_slope * mask, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(metrics["error"], (v - r) ** 2 * mask, rtol=1e-5)
  if clip is not None:  # beyond the bounds, and there nearer to R than the clipped value
    beyond = np.abs(v.astype(np.float64) - old) > clip
    counted = beyond & (wanted > 0.5 * (v.astype(np.float64) - r) ** 2 * (1 + 1e-9))
    np.testing.assert_array_equal(metrics["clip_fraction"], counted * mask)
    assert 0 < (counted * mask).sum() < mask.sum()


def test_the_clip_stops_a_value_that_runs_ahead():
  """From 0 towards R = 2: at 0.4 it still moves, at 0.6 (clip 0.5) not; away from R it does."""
  v = jnp.array([[0.4, 0.6, -0.6]])
  returns, old, mask = jnp.full((1, 3), 2.0), jnp.zeros((1, 3)), jnp.ones((1, 3))
  slope = jax.grad(lambda v: value_loss(v, returns, old, mask, clip=0.5)[0].sum())(v)
  np.testing.assert_allclose(slope, [[-1.6, 0, -2.6]], rtol=1e-6)


def test_nothing_outside_the_mask_is_read():
  row = lambda x: jnp.array([[0.5, x]])
  mask = jnp.array([[1.0, 0.0]])
  clean = value_loss(row(0.0), row(0.0), row(0.0), mask, clip=0.5)
  dirty = value_loss(row(jnp.nan), row(jnp.inf), row(jnp.nan), mask, clip=0.5)
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
