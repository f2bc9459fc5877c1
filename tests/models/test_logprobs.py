"""Log-prob, entropy and top-1 in chunks, against float64 NumPy and the dense form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models.logprobs import (
  next_token_mean_logit,
  next_token_statistics,
  token_statistics,
)

B, S, D, V = 2, 5, 8, 48

pytestmark = pytest.mark.usefixtures("one_device")


def inputs(scale=1.0):
  rng = np.random.default_rng(0)
  hidden = (scale * rng.normal(size=(B, S, D))).astype(np.float32)
  unembedding = rng.normal(size=(V, D)).astype(np.float32)
  return hidden, unembedding, rng.integers(0, V, (B, S), dtype=np.int32)


def numpy_statistics(hidden, unembedding, labels, temperature):
  """log softmax, -sum p log p, argmax and logsumexp in float64."""
  z = hidden.astype(np.float64) @ unembedding.astype(np.float64).T / temperature
  log_p = z - z.max(-1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
  return picked, -(np.exp(log_p) * log_p).sum(-1), z.argmax(-1), (z - log_p)[..., 0]


@functools.partial(jax.jit, static_argnames=("temperature", "chunk"))
def values_and_gradients(hidden, unembedding, labels, weights, *, temperature, chunk):
  """The statistics, and the gradients of a weighted sum of those that have one."""

  def total(hidden, unembedding):
    stats = token_statistics(hidden, unembedding, labels, temperature=temperature, chunk=chunk)
    parts = jnp.stack([stats.logprobs, stats.entropy, stats.logsumexp])
    return (parts * weights).sum(), stats

  gradients, stats = jax.grad(total, (0, 1), has_aux=True)(hidden, unembedding)
  return stats, gradients


@functools.partial(jax.jit, static_argnames="temperature")
def dense_gradients(hidden, unembedding, labels, weights, *, temperature):
  """The same by autodiff of the textbook formula."""

  def total(hidden, unembedding):
    z = jnp.einsum("bsd,vd->bsv", hidden, unembedding) / temperature
    log_p = jax.nn.log_softmax(z)
    picked = jnp.sum(jax.nn.one_hot(labels, V) * log_p, -1)
    entropy, lse = -(jnp.exp(log_p) * log_p).sum(-1), jax.nn.logsumexp(z, -1)
    return (jnp.stack([picked, entropy, lse]) * weights).sum()

  return jax.grad(total, (0, 1))(hidden, unembedding)


@pytest.mark.parametrize("chunk", [48, 16, 7, 1000])  # 7 is rounded down to 6, 1000 to 48
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(chunk, temperature):
  data = inputs()
  weights = np.random.default_rng(1).normal(size=(3, B, S)).astype(np.float32)
  stats, gradients = values_and_gradients(*data, weights, temperature=temperature, chunk=chunk)
  logprobs, entropy, top1, lse = numpy_statistics(*data, temperature)
  np.testing.assert_allclose(stats.logprobs, logprobs, atol=2e-5)
  np.testing.assert_allclose(stats.entropy, entropy, atol=2e-5)
  np.testing.assert_array_equal(stats.top1, top1)
  np.testing.assert_allclose(stats.logsumexp, lse, rtol=1e-5)
  want = dense_gradients(*data, weights, temperature=temperature)
  for a, b in zip(gradients, want):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_first_of_equally_likely_tokens_is_the_top_one():
  _, unembedding, labels = inputs()
  zeros = np.zeros((B, S, D), np.float32)
  stats = token_statistics(zeros, unembedding, labels, chunk=16)
  np.testing.assert_array_equal(stats.top1, 0)
  np.testing.assert_allclose(stats.entropy, np.log(V), rtol=1e-6)
  np.testing.assert_allclose(stats.logprobs, -np.log(V), rtol=1e-6)


def test_huge_logits_stay_finite():
  """Logits of about 1e4, whose exponential is no float32, in every chunk."""
  data = inputs(scale=3e3)
  weights = np.ones((3, B, S), np.float32)
  stats, gradients = values_and_gradients(*data, weights, temperature=1.0, chunk=16)
  logprobs, entropy, top1, lse = numpy_statistics(*data, 1.0)
  assert logprobs.min() < -1e4
  np.testing.assert_allclose(stats.logprobs, logprobs, rtol=1e-5, atol=2e-2)
  np.testing.assert_allclose(stats.entropy, entropy, atol=2e-2)
  np.testing.assert_array_equal(stats.top1, top1)
  np.testing.assert_allclose(stats.logsumexp, lse, rtol=1e-5)
  assert all(np.isfinite(g).all() for g in gradients)


def test_entries_speak_of_the_token_at_their_place():
  hidden, unembedding, tokens = inputs()
  stats = next_token_statistics(hidden, unembedding, tokens, chunk=16)
  logprobs, entropy, top1, lse = numpy_statistics(hidden[:, :-1], unembedding, tokens[:, 1:], 1.0)
  np.testing.assert_allclose(stats.logprobs[:, 1:], logprobs, atol=2e-5)
  np.testing.assert_allclose(stats.entropy[:, 1:], entropy, atol=2e-5)
  np.testing.assert_array_equal(stats.top1[:, 1:], top1)
  np.testing.assert_allclose(stats.logsumexp[:, 1:], lse, atol=2e-5)
  for field in jax.tree.leaves(stats):
    assert not np.asarray(field[:, 0]).any()


def test_mean_logit():
  """With the logsumexp it gives the mean over the vocabulary of log p, as label smoothing reads."""
  hidden, unembedding, tokens = inputs()
  mean = next_token_mean_logit(hidden, unembedding, temperature=0.7)
  stats = next_token_statistics(hidden, unembedding, tokens, temperature=0.7, chunk=16)
  z = hidden.astype(np.float64) @ unembedding.astype(np.float64).T / 0.7
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  got = np.asarray(mean - stats.logsumexp)
  np.testing.assert_allclose(got[:, 1:], log_p[:, :-1].mean(-1), rtol=1e-5)
  np.testing.assert_array_equal(got[:, 0], 0)


def test_bfloat16_hidden_states_give_float32_statistics():
  hidden, unembedding, labels = inputs()
  half = jnp.asarray(hidden, jnp.bfloat16)
  stats = token_statistics(half, unembedding, labels, chunk=16)
  assert stats.logprobs.dtype == stats.entropy.dtype == jnp.float32
  rounded = np.asarray(jnp.asarray(unembedding, jnp.bfloat16), np.float32)
  want, *_ = numpy_statistics(np.asarray(half, np.float32), rounded, labels, 1.0)
  np.testing.assert_allclose(stats.logprobs, want, atol=2e-4)


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of every value that a program makes, those of inner programs too."""
  shapes = set()
  for equation in jaxpr.eqns:
    shapes |= {getattr(var.aval, "shape", ()) for var in equation.outvars}
    for inner in jax.core.jaxprs_in_params(equation.params):
      shapes |= shapes_of(inner)
  return shapes


@pytest.mark.parametrize(("chunk", "whole"), [(16, False), (48, True)])
def test_logits_of_the_whole_vocabulary_never_exist(chunk, whole):
  """Forward and backward hold B S logits of a chunk; with one chunk they do hold all of them."""
  weights = np.ones((3, B, S), np.float32)
  jaxpr = jax.make_jaxpr(functools.partial(values_and_gradients, temperature=1.0, chunk=chunk))(
    *inputs(), weights
  )
  large = {shape for shape in shapes_of(jaxpr.jaxpr) if np.prod(shape, dtype=int) >= B * S * V}
  assert bool(large) == whole, large
  assert any(np.prod(shape, dtype=int) == B * S * chunk for shape in shapes_of(jaxpr.jaxpr))
