"""The exact KL and its gradients on split batches, sequences and vocabularies."""

import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.models.divergence import next_token_kl
from pt_jax.models.logprobs import next_token_mean_logit, next_token_statistics
from pt_jax.sharding import USE

pytestmark = pytest.mark.mesh

B, S, D, V = 8, 8, 8, 64
MESHES = ((1, 1, 1, 8), (2, 2, 1, 2), (1, 4, 2, 1))  # data, context, expert, tensor


def inputs():
  rng = np.random.default_rng(0)
  shapes = ((B, S, D), (V, D), (B, S, D), (V, D), (B, S))
  tokens = rng.integers(0, V, (B, S), dtype=np.int32)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes], tokens


@functools.partial(jax.jit, static_argnames="direction")
def value_and_gradients(data, tokens, direction):
  """Of a weighted sum of the KL and of the mean over the vocabulary of -log p."""
  hidden, matrix, ref_hidden, ref_matrix, weights = data

  def total(hidden, matrix):
    kl = next_token_kl(hidden, matrix, ref_hidden, ref_matrix, chunk=16, direction=direction)
    lse = next_token_statistics(hidden, matrix, tokens, chunk=16).logsumexp
    uniform = lse - next_token_mean_logit(hidden, matrix)
    return ((kl + uniform) * weights).sum(), (kl, uniform)

  return jax.grad(total, (0, 1), has_aux=True)(hidden, matrix)


@functools.cache
def on(shape, direction):
  count = int(np.prod(shape))
  with jax.set_mesh(sharding.make_mesh(*shape, devices=jax.devices()[:count])):
    row, states = USE.spec("batch", "seq"), USE.spec("batch", "seq", "embed")
    matrix = USE.spec("vocab", "embed")
    data, tokens = inputs()
    placed = [jax.device_put(x, s) for x, s in zip(data, (states, matrix, states, matrix, row))]
    gradients, values = value_and_gradients(placed, jax.device_put(tokens, row), direction)
    assert values[0].sharding.spec == row and gradients[1].sharding.spec == matrix
    return jax.device_get((gradients, values))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("direction", ["policy_reference", "reference_policy"])
def test_values_and_gradients_are_those_of_one_device(shape, direction):
  got, want = on(shape, direction), on((1, 1, 1, 1), direction)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
