import jax
import numpy as np
import pytest

from pt_jax.losses import reduce, supervised


def test_perplexity_of_a_fair_die():
  logprobs = np.full((2, 4), -np.log(6), np.float32)
  mask = np.float32([[0, 1, 1, 0], [0, 1, 0, 0]])
  loss = supervised.nll(logprobs, mask)
  np.testing.assert_array_equal(loss != 0, mask)
  mean = reduce.reduce("token_mean", loss, mask, np.zeros((2, 4), np.int32)).mean()
  np.testing.assert_allclose(np.exp(mean), 6, rtol=1e-5)


def test_gradient_is_minus_one_on_targets_and_nothing_else_is_read():
  logprobs = np.float32([[-np.inf, -2.0, np.nan, -30.0]])
  mask = np.float32([[0, 1, 0, 0.5]])  # a weight is applied by the reduction, not here
  gradient = jax.grad(lambda lp: supervised.nll(lp, mask).sum())(logprobs)
  np.testing.assert_array_equal(gradient, [[0, -1, 0, -1]])


def test_shapes_are_checked():
  with pytest.raises(AssertionError):
    supervised.nll(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))
