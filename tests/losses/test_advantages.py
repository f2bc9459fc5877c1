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


def test_leave_one_out_worked_by_hand():
  """{1, 0, 1}: against the means 0.5, 1, 0.5; {4, 0}: against 0 and 4; a lone sample has none."""
  wanted = [0.5, 4, -1, 0, 0.5, -4]
  np.testing.assert_allclose(advantages.leave_one_out(REWARDS, GROUPS), wanted, rtol=1e-6)
  assert not advantages.leave_one_out(np.full(5, 0.1), np.zeros(5, int)).any()


def test_ddof():
  """Of {1, 0, 1} the std is sqrt(1 / 3) with n - 1 and sqrt(2) / 3 with n."""
  got = advantages.group_relative(REWARDS, GROUPS, scale="group", epsilon=0.0, ddof=0)
  np.testing.assert_allclose(got[[0, 2]], [0.5**0.5, -(2**0.5)], rtol=1e-6)


def test_credit_of_dapo():
  """The overlong penalty enters the rewards before they are compared; the filter looks earlier."""
  rewards, groups = np.array([1, 1, 0, 1]), np.array([0, 0, 1, 1])
  lengths, truncated = np.array([10, 18, 5, 20]), np.array([False, False, False, True])
  mask = np.arange(20) < lengths[:, None]
  dapo = objective.dapo(max_length=20, buffer=4)
  episodes = credit.Episodes(rewards, truncated, groups, mask)
  given = credit.assign_credit(episodes, objective=dapo)
  np.testing.assert_allclose(given.rewards, [1, 0.5, 0, 0])
  expected = np.array([0.70691, -0.70691, 0, 0])[:, None] * mask
  np.testing.assert_allclose(given.advantages, expected, atol=1e-4)
  assert given.trained.all()
  kept = credit.kept_groups(rewards, groups, objective=dapo)
  np.testing.assert_array_equal(kept, [False, False, True, True])
  assert credit.kept_groups(rewards, groups, objective=objective.grpo()).all()
  filters = objective.Filters(truncated=True)
  filtered = dataclasses.replace(dapo, filters=filters)
  given = credit.assign_credit(episodes, objective=filtered)
  np.testing.assert_array_equal(given.trained, ~truncated)
