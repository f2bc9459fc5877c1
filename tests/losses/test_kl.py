import jax
import numpy as np
import pytest

from pt_jax.losses import kl

# Two distributions over four tokens, far enough apart that the estimators differ.
POLICY = np.array([0.5, 0.3, 0.15, 0.05])
REFERENCE = np.array([0.2, 0.2, 0.3, 0.3])
FORWARD = float(np.sum(POLICY * np.log(POLICY / REFERENCE)))  # KL(policy || reference)


def _row(probabilities):
  return np.log(probabilities)[None].astype(np.float32)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_kl(estimator):
  each = kl.kl_estimate(_row(POLICY), _row(REFERENCE), np.ones((1, 4)), estimator=estimator)
  np.testing.assert_allclose(np.sum(POLICY * each[0]), FORWARD, rtol=1e-5)
  assert (each < 0).any() == (estimator == "k1")


def _expected_gradient(estimator):
  """E_policy[d estimate / d logits], chained through softmax: what a loss would follow."""
  slope = jax.grad(
    lambda lp: kl.kl_estimate(lp, _row(REFERENCE), np.ones((1, 4)), estimator=estimator).sum()
  )(_row(POLICY))[0]
  by_logits = np.eye(4) - POLICY[None]  # d log p_token / d logits, one row a token
  return np.sum((POLICY * slope)[:, None] * by_logits, 0)


def test_which_divergence_each_minimises():
  """The table in the docstring: none for k1, KL(policy || reference) for k2, the reverse for k3."""
  log_ratio = np.log(POLICY / REFERENCE)
  forward = POLICY * (log_ratio - FORWARD)  # d KL(policy || reference) / d logits
  np.testing.assert_allclose(_expected_gradient("k1"), 0, atol=1e-6)
  np.testing.assert_allclose(_expected_gradient("k2"), forward, rtol=1e-4)
  np.testing.assert_allclose(_expected_gradient("k3"), POLICY - REFERENCE, rtol=1e-4)


def test_small_differences_keep_their_digits():
  """k3 of 1e-3 nats is 5e-7: exp(d) - d - 1 in float32 would have no digit left of it."""
  d = np.float32(1e-3)
  got = kl.kl_estimate(
    np.zeros((1, 1), np.float32), np.full((1, 1), d), np.ones((1, 1)), estimator="k3"
  )
  np.testing.assert_allclose(got, 5.0017e-7, rtol=1e-3)
