"""Log-probs without logits: the reference against NumPy, and both forms against the reference.

The TPU form runs in interpret mode, where memory that was never written is NaN and races are found.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_logprob import IGNORE, linear_logprob, reference
from tests.models.test_logprobs import shapes_of

TILES = {"rows": 16, "tokens": 128, "backward_rows": 32, "backward_tokens": 128}


def inputs(n, e, v, k=1, dtype=jnp.float32, seed=0):
  """Hidden states, matrix, labels with two ignored ones, and weights of every output."""
  rng = np.random.default_rng(seed)
  hidden, matrix = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((n, e), (v, e)))
  labels = rng.integers(0, v, (n, k)).astype(np.int32)
  labels[0, 0] = labels[-1, -1] = IGNORE
  weights = [rng.normal(size=shape).astype(np.float32) for shape in ((n, k), (n,), (n,))]
  return hidden, matrix, labels, weights


def interpreted(form):
  """Interpret mode for the TPU form."""
  if form != "tpu":
    return contextlib.nullcontext()
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  return pltpu.force_tpu_interpret_mode(params)


def run(form, data, **options):
  """Statistics, and the gradients of a weighted sum of log-probs, entropy and lse."""
  hidden, matrix, labels, weights = data
  own = {"xla": {"chunk": 100}, "tpu": {"chip": "v5e", "tiles": TILES}, "reference": {}}[form]
  function = reference.linear_logprob if form == "reference" else linear_logprob
  function = functools.partial(function, **options, **own)

  @jax.jit
  def both(hidden, matrix):
    def total(hidden, matrix):
      stats = function(hidden, matrix, labels)
      parts = (stats.logprobs, stats.entropy, stats.lse)
      return sum((part * weight).sum() for part, weight in zip(parts, weights)), stats

    gradients, stats = jax.grad(total, (0, 1), has_aux=True)(hidden, matrix)
    return stats, gradients

  with interpreted(form):
    return jax.tree.map(np.asarray, both(hidden, matrix))


def assert_near(got, want, *, rtol=2e-5):
  """Within rtol of the largest entry."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(a, b, atol=rtol * max(1.0, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (0.7, 4.0)])
def test_reference_is_the_textbook_formula(temperature, soft_cap):
  hidden, matrix, labels, _ = inputs(7, 12, 50, 2)
  z = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T
  z = (soft_cap * np.tanh(z / soft_cap) if soft_cap else z) / temperature
  lse = np.log(np.exp(z).sum(-1))
  log_p = z - lse[:, None]
  want = np.where(labels == IGNORE, 0, np.take_along_axis(log_p, np.maximum(labels, 0), 1))
  stats = reference.linear_logprob(
    hidden, matrix, labels, temperature=temperature, soft_cap=soft_cap
  )
  np.testing.assert_allclose(stats.logprobs, want, atol=1e-5)
  np.testing.assert_allclose(stats.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)
  np.testing.assert_allclose(stats.lse, lse, atol=1e-5)
  np.testing.assert_array_equal(stats.top1, z.argmax(-1))


# Rows and tokens that tiles do not divide, and ones that they do; one row; fewer tokens than lanes.
@pytest.mark.parametrize(
  ("shape", "options"),
  [
    ((40, 64, 300, 3), {"temperature": 0.7, "soft_cap": 5.0}),
    ((32, 40, 256, 1), {}),
    ((1, 16, 90, 2), {"temperature": 2.0}),
  ],
)
@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_values_and_gradients_are_the_references(form, shape, options):
  data = inputs(*shape)
  got, gradients = run(form, data, **options)
  want, want_gradients = run("reference", data, **options)
  np.testing.assert_array_equal(got.top1, want.top1)
  assert_near(got, want)
  assert_near(gradients, want_gradients)


@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_bfloat16(form):
  """Values in float32 from the same rounded inputs; gradients within a rounding of their size."""
  data = inputs(40, 64, 300, 2, jnp.bfloat16)
  got, gradients = run(form, data)
  want, want_gradients = run("reference", data)
  assert gradients[0].dtype == gradients[1].dtype == jnp.bfloat16
  assert_near(got, want)
  assert_near(gradients, want_gradients, rtol=2**-7)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
  n=st.integers(1, 50),
  v=st.integers(2, 400),
  k=st.integers(1, 4),
  temperature=st.sampled_from([1.0, 0.5]),
  soft_cap=st.sampled_from([None, 3.0]),
  seed=st.integers(0, 99),
)
def test_any_shape(n, v, k, temperature, soft_cap, seed):
  data = inputs(n, 24, v, k, seed=seed)
  options = {"temperature": temperature, "soft_cap": soft_cap}
  got, gradients = run("tpu", data, **options)
  want, want_gradients = run("reference", data, **options)
  assert_near(got, want)
  assert_near(gradients, want_gradients)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), v=st.integers(2, 700), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_any_shape_at_length(n, v, k, seed):
  data = inputs(n, 24, v, k, seed=seed)
  for form in ("xla", "tpu"):
    assert_near(run(form, data), run("reference", data))


@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_an_ignored_label_gives_nothing(form):
  """With only ignored labels, log-probs are 0 and have no gradient; NaN weights are not read."""
  hidden, matrix, labels, weights = inputs(20, 16, 140)
  nothing = [np.full_like(weights[0], np.nan), *(np.zeros_like(w) for w in weights[1:])]
  stats, gradients = run(form, (hidden, matrix, np.full_like(labels, IGNORE), nothing))
  assert not stats.logprobs.any()
  assert not any(g.any() for g in gradients)
  assert np.isfinite(stats.entropy).all()


@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_large_logits_keep_the_digits_of_the_entropy(form):
  """Logits near 1e4 that are close to each other: entropy from sums relative to the highest."""
  hidden = jnp.full((16, 8), 50.0)
  matrix = jnp.asarray(25 + 1e-3 * np.random.default_rng(0).normal(size=(130, 8)), jnp.float32)
  z = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  labels = np.zeros((16, 1), np.int32)
  weights = [np.ones((16, 1), np.float32), *np.ones((2, 16), np.float32)]
  stats, _ = run(form, (hidden, matrix, labels, weights))
  assert z.min() > 9e3
  np.testing.assert_allclose(stats.entropy, -(p * np.log(p)).sum(-1), atol=2e-3)


def test_logits_never_exist():
  """No value of the TPU form, forward and backward, is as large as the logits."""
  hidden, matrix, labels, _ = inputs(512, 16, 2048)
  tiles = {"rows": 64, "tokens": 256, "backward_rows": 64, "backward_tokens": 256}

  def largest(function):
    total = lambda hidden, matrix: sum(x.sum() for x in function(hidden, matrix, labels)[:2])
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, matrix)
    return max(np.prod(shape, dtype=int) for shape in shapes_of(jaxpr.jaxpr))

  kernel = functools.partial(linear_logprob, chip="v6e", tiles=tiles)
  assert largest(kernel) < 512 * 2048 / 4
  assert largest(reference.linear_logprob) >= 512 * 2048


def test_what_is_wrong_is_said():
  hidden, matrix, labels, _ = inputs(4, 8, 16)
  with pytest.raises(ValueError, match=r"expected temperature and soft_cap > 0, found 0, None"):
    linear_logprob(hidden, matrix, labels, temperature=0)
  with pytest.raises(ValueError, match=r"tiles: expected \['backward_rows'.* found \{'rows': 8\}"):
    linear_logprob(hidden, matrix, labels, tiles={"rows": 8})
  with pytest.raises(ValueError, match="at most 124 label sets, found 125"):
    linear_logprob(hidden, matrix, np.zeros((4, 125), np.int32), chip="v5e")
  with pytest.raises(ValueError, match="chip: expected one of"):
    linear_logprob(hidden, matrix, labels, chip="v9")
