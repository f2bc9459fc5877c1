import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import objective, policy
from tests.losses import layouts, paper

OPTIONS = [
  ("segment_mean", None, objective.Clip(0.2, 0.2), None),
  ("segment_mean", None, objective.Clip(0.2, 0.2), objective.Kl(0.04)),
  ("token_mean", None, objective.Clip(0.2, 0.28), objective.Kl(0.3, "k2")),
  ("token_mean", None, objective.Clip(0.1, 0.3), objective.Kl(0.3, "k1", True)),
  ("constant", 9, objective.Clip(0.3, 0.1), objective.Kl(0.3, "k3", True)),
]


@pytest.mark.parametrize("reduction, constant_length, clip, kl", OPTIONS)
def test_equals_the_paper_in_packed_rows(reduction, constant_length, clip, kl):
  made = layouts.samples()
  chosen = objective.Objective(
    clip=clip, kl=kl, reduction=reduction, constant_length=constant_length
  )
  batch = layouts.lay_out(made, layouts.PACKED, 12)
  value, gradient = layouts.value_and_gradient(batch, chosen)
  expected, expected_gradients = paper.objective(
    made,
    reduction,
    constant_length,
    low=clip.low,
    high=clip.high,
    beta=kl.coefficient if kl else 0.0,
    estimator=kl.estimator if kl else "k3",
    weighted=bool(kl and kl.importance_weighted),
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, wanted in zip(layouts.take_back(gradient, made, layouts.PACKED), expected_gradients):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)


def _losses(log_ratios, advantages, chosen, reference=None, mask=None):
  """Loss, d loss / d logprob and metrics of a row of tokens whose old log-prob is -40."""
  log_ratios, advantages = np.float32([log_ratios]), np.float32([advantages])
  old = np.full_like(log_ratios, -40.0)
  mask = np.ones_like(old) if mask is None else np.float32([mask])
  reference = None if reference is None else old + np.float32([reference])

  def summed(logprobs):
    loss, metrics = policy.policy_loss(
      logprobs, old, advantages, mask, objective=chosen, reference_logprobs=reference
    )
    return loss.sum(), (loss, metrics)

  gradient, (loss, metrics) = jax.grad(summed, has_aux=True)(jnp.asarray(old + log_ratios))
  return np.array(loss[0]), np.array(gradient[0]), jax.tree.map(lambda x: np.array(x[0]), metrics)


def test_gradient_of_each_branch():
  """-A r wherever the ratio may still move, 0 where the clip has silenced the token."""
  chosen = objective.Objective(clip=objective.Clip(low=0.2, high=0.28))
  ratio = np.array([1.0, 1.0, 1.27, 1.29, 0.81, 0.79, 1.29, 0.79, 1.0])
  advantage = np.array([2.0, -3.0, 2.0, 2.0, -3.0, -3.0, -3.0, 2.0, 0.0])
  silenced = np.array([0, 0, 0, 1, 0, 1, 0, 0, 0])  # r > 1.28 with A > 0; r < 0.8 with A < 0
  loss, gradient, metrics = _losses(np.log(ratio), advantage, chosen)
  np.testing.assert_allclose(gradient, -advantage * ratio * (1 - silenced), rtol=1e-5)
  np.testing.assert_allclose(loss[[0, 3, 5]], [-2.0, -2.0 * 1.28, 3.0 * 0.8], rtol=1e-5)
  np.testing.assert_array_equal(metrics["clip_fraction"], silenced)
  np.testing.assert_array_equal(metrics["clip_fraction_high"], [0, 0, 0, 1, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(metrics["clip_fraction_low"], [0, 0, 0, 0, 0, 1, 0, 0, 0])
  np.testing.assert_allclose(metrics["ratio"], ratio, rtol=1e-5)
  np.testing.assert_allclose(metrics["approx_kl"], ratio - 1 - np.log(ratio), atol=1e-5)


def test_kl_pulls_to_the_reference():
  """A = 0: only the KL is left. p above the reference must come down, below it must come up."""
  chosen = objective.Objective(kl=objective.Kl(0.5))
  reference = np.array([-0.7, 0.7])
  loss, gradient, metrics = _losses([0, 0], [0, 0], chosen, reference)
  k3 = np.exp(reference) - reference - 1
  np.testing.assert_allclose(gradient, 0.5 * (1 - np.exp(reference)), rtol=1e-5)
  np.testing.assert_allclose(loss, 0.5 * k3, rtol=1e-5)
  np.testing.assert_allclose(metrics["kl"], k3, rtol=1e-5)
  np.testing.assert_array_equal(metrics["surrogate"], 0)
  measured = dataclasses.replace(chosen, kl=objective.Kl(0.0))
  loss, gradient, metrics = _losses([0, 0], [0, 0], measured, reference)
  assert not loss.any() and not gradient.any()
  np.testing.assert_allclose(metrics["kl"], k3, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
def test_far_apart_policies_stay_finite(estimator, weighted):
  """+-30 nats between any two of the three policies; +-90 overflows float32 if not guarded."""
  chosen = objective.Objective(kl=objective.Kl(0.1, estimator, weighted))
  for far in (30.0, 90.0):
    grid = [(r, a, k) for r in (-far, 0, far) for a in (-1, 1) for k in (-far, 0, far)]
    ratios, advantages, references = zip(*grid)
    loss, gradient, metrics = _losses(ratios, advantages, chosen, references)
    for values in (loss, gradient, *metrics.values()):
      assert np.isfinite(values).all()
  assert jnp.isinf(jnp.exp(90.0))


def test_30_nats_are_exact():
  """The guard against overflow must not touch them: A < 0 and r = e^30 is not clipped by PPO."""
  loss, gradient, _ = _losses([30.0, -30.0], [-1.0, 1.0], objective.Objective())
  np.testing.assert_allclose(loss, [np.exp(30.0), -np.exp(-30.0)], rtol=1e-5)
  np.testing.assert_allclose(gradient, [np.exp(30.0), -np.exp(-30.0)], rtol=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_nothing_outside_the_mask_is_read(junk):
  chosen = objective.Objective(kl=objective.Kl(0.1, importance_weighted=True))
  clean = _losses([0.1, 0.0], [1.0, 0.0], chosen, [0.2, 0.0], [1, 0])
  dirty = _losses([0.1, junk], [1.0, junk], chosen, [0.2, junk], [1, 0])
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
    np.testing.assert_array_equal(a, b)
    assert b[1] == 0
  in_mask = _losses([0.1, np.nan], [1.0, 1.0], chosen, [0.2, 0.0], [1, 1])
  assert np.isnan(in_mask[0][1])  # what IS trained must not be hushed up


def test_a_kl_without_reference_is_an_error():
  with pytest.raises(ValueError, match=r"reference_logprobs: objective\.kl needs them, found None"):
    _losses([0.0], [1.0], objective.grpo())


def test_shapes_and_types_are_checked():
  row = np.zeros((1, 3), np.float32)
  with pytest.raises(AssertionError):
    policy.policy_loss(row, row, row[0], row, objective=objective.Objective())
  with pytest.raises(AssertionError):
    half = row.astype(jnp.bfloat16)
    policy.policy_loss(half, row, row, row, objective=objective.Objective())
