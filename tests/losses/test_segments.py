import jax
import numpy as np

from pt_jax.losses import segments


def test_sum_and_its_gradient_against_loops():
  """Signed values, runs of length 1, padding inside and at the end of a row."""
  ids = np.int32([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, -1, 2, 2], [-1] * 8])
  rng = np.random.default_rng(0)
  values, coefficients = rng.normal(size=(2, *ids.shape)).astype(np.float32)
  sums, gradient = np.zeros_like(values), np.zeros_like(values)
  for row, column in np.argwhere(ids >= 0):
    same = np.flatnonzero(ids[row] == ids[row, column])
    sums[row, column] = values[row, same].sum()
    gradient[row, column] = coefficients[row, same].sum()
  np.testing.assert_allclose(segments.segment_sum(values, ids), sums, rtol=1e-5, atol=1e-6)
  weighted = lambda v: (segments.segment_sum(v, ids) * coefficients).sum()
  np.testing.assert_allclose(jax.grad(weighted)(values), gradient, rtol=1e-5, atol=1e-6)
  assert segments.segment_count(ids) == 6


def test_rows_that_begin_alike_stay_apart():
  """Neighbouring rows share segment numbers; a flattened scan would run on into the next row."""
  ids = np.zeros((3, 4), np.int32)
  values = np.float32([[1] * 4, [10] * 4, [100] * 4])
  np.testing.assert_array_equal(segments.segment_sum(values, ids), 4 * values)
  assert segments.segment_count(ids) == 3
