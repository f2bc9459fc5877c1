import dataclasses

import numpy as np
import pytest

from pt_jax.losses import advantages, credit, objective

# Three groups, out of order and of unequal size: {1, 0, 1}, {4, 0}, {0.5}.
REWARDS = np.float32([1, 4, 0, 0.5, 1, 0])
GROUPS = np.array([7, 2, 7, 30, 7, 2])


def test_worked_by_hand():
  """Means 2/3, 2 and 0.5; std (ddof 1) sqrt(1/3), sqrt(8) and, of a lone sample, none."""
  relative = lambda **options: advantages.group_relative(REWARDS, GROUPS, **options)
  centred = np.array([1 / 3, 2, -2 / 3, 0, 1 / 3, -2])
  np.testing.assert_allclose(relative(scale="none", epsilon=1.0), centred, rtol=1e-6)
  std = np.array([3**-0.5, 8**0.5, 3**-0.5, 1, 3**-0.5, 8**0.5])
  np.testing.assert_allclose(relative(scale="group", epsilon=0.0), centred / std, rtol=1e-6)
  np.testing.assert_allclose(relative(scale="group", epsilon=0.1), centred / (std + 0.1), rtol=1e-6)
  # Rewards 1 4 0 0.5 1 0: mean 6.5 / 6, squares sum to 18.25.
  batch = ((18.25 - 6.5**2 / 6) / 5) ** 0.5
  np.testing.assert_allclose(relative(scale="batch", epsilon=0.0), centred / batch, rtol=1e-6)


@pytest.mark.parametrize("scale", advantages.SCALES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_equal_rewards_and_lone_samples_are_exactly_zero(scale, epsilon):
  options = {"scale": scale, "epsilon": epsilon}
  equal = advantages.group_relative(np.full(7, 0.1), np.zeros(7, int), **options)
  lone = advantages.group_relative(np.array([0.1, 0.7, -3]), np.arange(3), **options)
  one = advantages.group_relative(np.array([0.3]), np.array([0]), **options)
  for got in (equal, lone, one):
    assert got.dtype == np.float32 and not got.any()


def test_informative_groups():
  np.testing.assert_array_equal(advantages.informative(REWARDS, GROUPS), [1, 1, 1, 0, 1, 1])
  np.testing.assert_array_equal(advantages.informative(np.full(4, 0.3), [0, 0, 1, 1]), [0] * 4)


def test_overlong_penalty_is_the_papers():
  """DAPO: 16384 expected tokens and a cache of 4096, so 20480 at most."""
  lengths = np.array([1, 16384, 16384 + 1024, 20480 - 1, 20480, 20481, 90000])
  penalty = advantages.overlong_penalty(lengths, max_length=20480, buffer=4096)
  np.testing.assert_allclose(penalty, [0, 0, -0.25, -4095 / 4096, -1, -1, -1], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_named(bad):
  with pytest.raises(ValueError, match=rf"rewards\[2\]: expected a finite number, found {bad}"):
    advantages.group_relative(
      np.array([0, 1, bad]), np.array([0, 0, 0]), scale="group", epsilon=1e-4
    )


def test_shapes_are_named():
  with pytest.raises(ValueError, match=r"expected equal shapes \[B\], found \(3,\) and \(2,\)"):
    advantages.informative(np.zeros(3), np.zeros(2, int))
  with pytest.raises(ValueError, match=r"rewards, lengths, truncated: .* \(2,\), \(2,\), \(3,\)"):
    credit.assign_credit(
      np.zeros(2), np.ones(2), np.zeros(3), np.zeros(2), objective=objective.grpo()
    )


def test_credit_of_dapo():
  """The overlong penalty enters the rewards before they are compared; the filter looks earlier."""
  rewards, groups = np.array([1, 1, 0, 1]), np.array([0, 0, 1, 1])
  lengths, truncated = np.array([10, 18, 5, 20]), np.array([False, False, False, True])
  dapo = objective.dapo(max_length=20, buffer=4)
  given = credit.assign_credit(rewards, lengths, truncated, groups, objective=dapo)
  np.testing.assert_allclose(given.rewards, [1, 0.5, 0, 0])
  np.testing.assert_allclose(given.advantages, [0.70691, -0.70691, 0, 0], atol=1e-4)
  assert given.trained.all()
  kept = credit.kept_groups(rewards, groups, objective=dapo)
  np.testing.assert_array_equal(kept, [False, False, True, True])
  assert credit.kept_groups(rewards, groups, objective=objective.grpo()).all()
  filters = objective.Filters(truncated=True)
  filtered = dataclasses.replace(dapo, filters=filters)
  given = credit.assign_credit(rewards, lengths, truncated, groups, objective=filtered)
  np.testing.assert_array_equal(given.trained, ~truncated)
