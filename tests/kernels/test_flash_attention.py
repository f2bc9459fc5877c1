"""Attention in XLA blocks against the reference, and the reference against NumPy, loop by loop."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.flash_attention import flash_attention, reference

B, H, G, K = 2, 4, 2, 8


def inputs(length, seed=0):
  """q, k, v, cotangent, positions, segments; row 0 holds three segments, row 1 is padding."""
  rng = np.random.default_rng(seed)
  q, cotangent = rng.normal(size=(2, B, length, H, K)).astype(np.float32)
  k, v = rng.normal(size=(2, B, length, G, K)).astype(np.float32)
  positions = np.zeros((B, length), np.int32)
  segments = np.full((B, length), -1, np.int32)
  cuts = [0, length // 5, length // 2, length - length // 10]
  for segment, (start, end) in enumerate(itertools.pairwise(cuts)):
    positions[0, start:end] = np.arange(end - start)
    segments[0, start:end] = segment
  return q, k, v, cotangent, positions, segments


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(attend, q, k, v, cotangent):
  total = lambda q, k, v: (lambda out: (jnp.sum(out * cotangent), out))(attend(q, k, v))
  gradient, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
  return out, gradient


def run(attend, data, **options):
  q, k, v, cotangent, positions, segments = data
  rows = {"q_positions": positions, "k_positions": positions}
  rows |= {"q_segments": segments, "k_segments": segments}
  return value_and_gradient(
    functools.partial(attend, **rows, scale=K**-0.5, **options), q, k, v, cotangent
  )


def numpy_attention(q, k, v, positions, segments):
  """softmax(q k / sqrt(K)) v over what a query may see, one query and head at a time."""
  out = np.zeros_like(q, dtype=np.float64)
  for b, s, h in np.ndindex(q.shape[:3]):
    if segments[b, s] < 0:
      continue
    seen = (segments[b] == segments[b, s]) & (positions[b] <= positions[b, s])
    scores = k[b, seen, h // (H // G)].astype(np.float64) @ q[b, s, h] / math.sqrt(K)
    weights = np.exp(scores - scores.max())
    out[b, s, h] = weights / weights.sum() @ v[b, seen, h // (H // G)]
  return out


def test_reference_is_the_textbook_formula():
  data = inputs(20)
  out, _ = run(reference.attention, data)
  np.testing.assert_allclose(out, numpy_attention(*data[:3], *data[4:]), atol=1e-5)


# 200: blocks of 64 and a last one of 8. 600: eight blocks of 75. 64 and 30: a single block.
@pytest.mark.parametrize(
  ("length", "aligned"), [(200, True), (600, True), (64, True), (30, True), (200, False)]
)
def test_values_and_gradients_are_the_references(length, aligned):
  data = inputs(length)
  want, want_gradient = run(reference.attention, data)
  got, gradient = run(flash_attention, data, aligned=aligned)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for a, b in zip(gradient, want_gradient):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_is_near_float32():
  """Each gradient within a few roundings (2^-8) of its largest entry, in its input's dtype."""
  data = inputs(200)
  want, want_gradient = run(flash_attention, data, aligned=True)
  half = [jnp.asarray(x, jnp.bfloat16) for x in data[:3]]
  got, gradient = run(flash_attention, (*half, *data[3:]), aligned=True)
  for a, b in zip((got, *gradient), (want, *want_gradient)):
    assert a.dtype == jnp.bfloat16
    error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
    assert 1e-4 < error < 3 * 2**-8


def test_padding_is_zero_and_has_no_gradient():
  data = inputs(200)
  padding = data[5] < 0
  assert padding[1].all() and padding[0].any() and not padding[0].all()
  for attend, options in ((reference.attention, {}), (flash_attention, {"aligned": True})):
    out, gradient = run(attend, data, **options)
    assert not np.asarray(out)[padding].any()
    assert np.isfinite(out).all()
    for g in gradient:
      assert np.isfinite(g).all()
      assert not np.asarray(g)[padding].any()
      assert np.asarray(g)[~padding].any()


def test_what_a_query_may_not_see_is_not_read():
  """The last segment changes: nothing before it does, to the last bit, across blocks too."""
  q, k, v, cotangent, positions, segments = inputs(200)
  last = np.flatnonzero(segments[0] == 2)
  other = [x.copy() for x in (q, k, v)]
  for x in other:
    x[0, last] += 1
  before, _ = run(flash_attention, (q, k, v, cotangent, positions, segments), aligned=True)
  after, _ = run(flash_attention, (*other, cotangent, positions, segments), aligned=True)
  np.testing.assert_array_equal(before[0, : last[0]], after[0, : last[0]])
  assert np.abs(before[0, last] - after[0, last]).max() > 1e-2


def test_queries_apart_from_their_keys():
  """Half of the queries against all keys, as one shard of a context axis has them."""
  q, k, v, _, positions, segments = inputs(40)
  half = slice(20, 40)
  options = {"k_positions": positions, "k_segments": segments, "scale": K**-0.5}
  options |= {"q_positions": positions[:, half], "q_segments": segments[:, half]}
  want = numpy_attention(q, k, v, positions, segments)[:, half]
  got = flash_attention(q[:, half], k, v, aligned=False, **options)
  np.testing.assert_allclose(got, want, atol=1e-5)
