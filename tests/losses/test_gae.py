"""Advantages of single tokens against the papers' sums, with observations and padding between."""

import numpy as np
import pytest

from pt_jax.losses import gae
from tests.losses import paper

# Three completions: of 5 tokens, of 4 with two observations inside, and of one token.
MASK = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0]], bool)
MASK[1, 0] = True


def _fields():
  rng = np.random.default_rng(3)
  rewards, values = rng.normal(size=(2, *MASK.shape))
  junk = np.where(MASK, 0, np.nan)  # nothing may be read there
  return rewards + junk, values + junk


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.97, 1.0)])
def test_equals_the_papers_sum(gamma, lam):
  """Observations are carried past: the tokens around them are neighbours."""
  rewards, values = _fields()
  got = gae.generalized_advantage(rewards, values, MASK, gamma=gamma, lam=lam)
  for row, mask in enumerate(MASK):
    wanted = paper.gae(rewards[row][mask], values[row][mask], gamma, lam)
    np.testing.assert_allclose(got[row][mask], wanted, rtol=1e-12)
    assert not got[row][~mask].any()


def test_worked_by_hand():
  """Reward 1 at the end, values 0.5 and 0.25, gamma 1, lambda 0.5: deltas -0.25 and 0.75."""
  rewards, values = np.array([[0, 1.0]]), np.array([[0.5, 0.25]])
  got = gae.generalized_advantage(rewards, values, np.ones((1, 2), bool), gamma=1.0, lam=0.5)
  np.testing.assert_allclose(got, [[-0.25 + 0.5 * 0.75, 0.75]])


def test_lambda_of_one_is_the_return_less_the_value():
  rewards, values = _fields()
  got = gae.generalized_advantage(rewards, values, MASK, gamma=0.9, lam=1.0)
  returns = gae.discounted_returns(rewards, MASK, gamma=0.9)
  np.testing.assert_allclose(got, np.where(MASK, returns - values, 0), rtol=1e-12)
  row = rewards[0][MASK[0]]
  np.testing.assert_allclose(returns[0, 0], (row * 0.9 ** np.arange(5)).sum(), rtol=1e-12)


def test_lambda_of_each_completion():
  rewards, values = _fields()
  mixed = gae.generalized_advantage(rewards, values, MASK, gamma=0.9, lam=np.array([0, 0.5, 1]))
  for row, lam in enumerate((0.0, 0.5, 1.0)):
    alone = gae.generalized_advantage(rewards, values, MASK, gamma=0.9, lam=lam)
    np.testing.assert_array_equal(mixed[row], alone[row])


def test_length_adaptive_lambda_is_the_papers():
  """VAPO: alpha 0.05; 1000 tokens have 0.98, 100 have 0.8, under 20 none is left."""
  got = gae.length_adaptive_lambda(np.array([1000, 100, 20, 5, 0]), 0.05)
  np.testing.assert_allclose(got, [0.98, 0.8, 0, 0, 0])


def test_whitening():
  values = np.array([[1.0, 2.0, 99.0], [4.0, np.nan, 5.0]])
  mask = np.array([[1, 1, 0], [1, 0, 1]], bool)
  got = gae.whiten(values, mask)
  inside = np.array([1.0, 2, 4, 5])
  wanted = (inside - 3) / np.sqrt(inside.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(got[mask], wanted, rtol=1e-12)
  assert not got[~mask].any()


def test_equal_and_single_values_whiten_to_zero():
  one = np.array([[True, False]])
  equal = gae.whiten(np.full((2, 3), 0.1), np.ones((2, 3), bool))
  np.testing.assert_allclose(equal, 0, atol=1e-9)
  assert not gae.whiten(np.array([[7.0, 1.0]]), one).any()
  assert not gae.whiten(np.array([[7.0, 1.0]]), ~one & False).any()
