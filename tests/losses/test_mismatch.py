import jax
import numpy as np

from pt_jax.losses import mismatch

MASK = np.float32([[1, 1, 0], [1, 1, 0]])


def test_worked_by_hand():
  trainer = np.float32([[-1.0, -2.0, -3.0], [-1.0, -1.5, 0.0]])
  sampler = np.float32([[-1.0, -2.5, -9.0], [-0.9, -1.5, np.nan]])
  got = mismatch.logprob_gap(trainer, sampler, MASK)
  np.testing.assert_allclose(got["logprob_gap"], [[0, 0.5, 0], [0.1, 0, 0]], rtol=1e-5)
  k3 = [[0, np.exp(0.5) - 1.5, 0], [np.exp(-0.1) - 0.9, 0, 0]]
  np.testing.assert_allclose(got["logprob_gap_kl"], k3, rtol=1e-4)
  slope = jax.grad(lambda lp: mismatch.logprob_gap(lp, sampler, MASK)["logprob_gap"].sum())
  assert not slope(trainer).any()


def test_a_broken_engine_is_seen():
  """A gap past the limit of the ratio is reported whole; NaN is not hushed up."""
  row = np.full((2, 3), -1.0, np.float32)
  far = mismatch.logprob_gap(row, row - 100, MASK)
  assert far["logprob_gap"].max() == 100 and np.isfinite(far["logprob_gap_kl"]).all()
  assert np.isnan(mismatch.logprob_gap(row, row * np.nan, MASK)["logprob_gap"]).sum() == 4
