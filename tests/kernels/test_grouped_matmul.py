"""Grouped products: the reference against NumPy, both forms against the reference."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul import grouped_matmul, reference

TILES = {"rows": 16, "columns": 128, "depth": 128}
K, N = 24, 150


def inputs(sizes, rows, transpose_rhs=False, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  matrix = (N, K) if transpose_rhs else (K, N)
  lhs, rhs, weights = (
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in ((rows, K), (len(sizes), *matrix), (rows, N))
  )
  return lhs, rhs, np.asarray(sizes, np.int32), weights


def run(form, data, **options):
  """The product, and the gradients of a weighted sum of it."""
  lhs, rhs, sizes, weights = data
  own = {"chip": "v5e", "tiles": TILES} if form == "tpu" else {}
  function = reference.grouped_matmul if form == "reference" else grouped_matmul

  @jax.jit
  def both(lhs, rhs):
    def total(lhs, rhs):
      out = function(lhs, rhs, sizes, **options, **own)
      return (out.astype(jnp.float32) * weights).sum(), out

    gradients, out = jax.grad(total, (0, 1), has_aux=True)(lhs, rhs)
    return out, gradients

  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  mode = pltpu.force_tpu_interpret_mode(params) if form == "tpu" else contextlib.nullcontext()
  with mode:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), both(lhs, rhs))


def assert_near(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def test_reference_is_a_loop_over_rows():
  lhs, rhs, sizes, _ = inputs([3, 0, 2], 7)
  want = np.zeros((7, N))
  for row, group in enumerate([0, 0, 0, 2, 2]):
    want[row] = np.asarray(lhs[row], np.float64) @ np.asarray(rhs[group], np.float64)
  np.testing.assert_allclose(reference.grouped_matmul(lhs, rhs, sizes), want, atol=1e-5)


# Groups that share a tile, that are empty (also first, last, all), that end with a tile; rows
# behind the last group, and rows that tiles do not divide.
SIZES = [([5, 0, 20, 3, 16], 50), ([0, 16, 0, 32, 0], 48), ([0, 0], 20), ([1], 1)]


@pytest.mark.parametrize(("sizes", "rows"), SIZES)
@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_values_and_gradients_are_the_references(form, sizes, rows):
  data = inputs(sizes, rows)
  assert_near(run(form, data), run("reference", data))


@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_transposed_matrices(form):
  data = inputs(*SIZES[0], transpose_rhs=True)
  assert_near(run(form, data, transpose_rhs=True), run("reference", data, transpose_rhs=True))


def test_bfloat16():
  data = inputs(*SIZES[0], dtype=jnp.bfloat16)
  assert_near(run("tpu", data), run("reference", data), 2**-7)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 20))
def test_any_groups(sizes, more):
  data = inputs(sizes, max(1, sum(sizes) + more))
  assert_near(run("tpu", data), run("reference", data))


def test_nan_of_rows_that_are_no_groups_reaches_nothing():
  """What dispatch leaves behind the last group may be anything."""
  lhs, rhs, sizes, weights = inputs(*SIZES[0])
  total = int(sizes.sum())
  lhs, weights = lhs.at[total:].set(np.nan), weights.at[total:].set(0)
  out, gradients = run("tpu", (lhs, rhs, sizes, weights))
  assert np.isfinite(out).all() and not out[total:].any()
  assert all(np.isfinite(g).all() for g in gradients)
  assert not gradients[1][1].any()  # the empty group


def test_tiles_that_are_none_are_named():
  lhs, rhs, sizes, _ = inputs([1], 1)
  with pytest.raises(ValueError, match=r"tiles: expected \['columns', 'depth', 'rows'\] >= 1"):
    functools.partial(grouped_matmul, tiles={"rows": 8})(lhs, rhs, sizes)
