"""What the rewards of completions become: every kind of advantage, worked by hand or summed up."""

import dataclasses

import numpy as np
import pytest

from pt_jax.losses import credit, gae, objective
from pt_jax.losses.credit import Episodes
from pt_jax.losses.objective import (
  Gae,
  Greedy,
  GroupRelative,
  Kl,
  LeaveOneOut,
  MonteCarlo,
  Objective,
  Process,
  Returns,
)

# Four completions of two prompts, of 3, 2, 1 and 3 tokens behind one token of the prompt.
MASK = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]], bool)
REWARDS, GROUPS = np.array([1.0, 0.0, 0.5, 1.5]), np.array([0, 0, 1, 1])
KL = np.where(MASK, [0.1, 0.2, -0.1, 0.4], np.nan)
PLAIN = Episodes(REWARDS, np.zeros(4, bool), GROUPS, MASK)
REWARD_KL = Kl(0.5, "k1", where="reward")


def _given(chosen, episodes=PLAIN, **fields):
  return credit.assign_credit(dataclasses.replace(episodes, **fields), objective=chosen)


def _spread(values):
  return np.asarray(values)[:, None] * MASK


def test_rloo_takes_the_kl_off_the_reward_of_the_completion():
  """KL sums 0.5, 0.1, 0.2, 0.5 times 0.5: rewards 0.75, -0.05, 0.4, 1.25."""
  chosen = Objective(advantage=LeaveOneOut(), kl=REWARD_KL)
  given = _given(chosen, kl=KL)
  rewards = REWARDS - 0.5 * np.nansum(np.where(MASK, KL, 0), 1)
  np.testing.assert_allclose(given.rewards, rewards, rtol=1e-6)
  wanted = [rewards[0] - rewards[1], rewards[1] - rewards[0]]
  wanted += [rewards[2] - rewards[3], rewards[3] - rewards[2]]
  np.testing.assert_allclose(given.advantages, _spread(wanted), rtol=1e-6)
  moved = credit.assign_credit(
    dataclasses.replace(PLAIN, kl=KL), objective=chosen, kl_coefficient=0.0
  )
  np.testing.assert_allclose(moved.rewards, REWARDS)


def test_a_kl_in_the_loss_leaves_the_reward_alone():
  given = _given(Objective(kl=Kl(0.5)))
  np.testing.assert_array_equal(given.rewards, REWARDS.astype(np.float32))


def test_remax_is_the_distance_to_the_greedy_completion():
  given = _given(Objective(advantage=Greedy()), greedy=np.array([0.5, 0.5, 1.0, 1.0]))
  np.testing.assert_allclose(given.advantages, _spread([0.5, -0.5, -0.5, 0.5]), rtol=1e-6)


def test_reinforce_plus_plus_whitens_discounted_returns():
  """Outcome at the last token, the KL off every token, gamma 0.5, then over the ten tokens."""
  chosen = Objective(advantage=Returns(gamma=0.5), kl=REWARD_KL)
  given = _given(chosen, kl=KL)
  rewards = [
    [-0.1, 0.05, 1 - 0.2],
    [-0.1, 0 + 0.05],
    [0.5 - 0.1],
    [-0.1, 0.05, 1.5 - 0.2],
  ]
  returns = []
  for row in rewards:
    returns += [sum(0.5**k * x for k, x in enumerate(row[t:])) for t in range(len(row))]
  returns = np.array(returns)
  wanted = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(given.advantages[MASK], wanted, rtol=1e-5)


def test_reinforce_plus_plus_baseline_is_centred_by_group_before():
  given = _given(Objective(advantage=Returns(baseline=True)))
  centred = _spread([0.5, -0.5, -0.5, 0.5])[MASK]
  wanted = (centred - centred.mean()) / np.sqrt(centred.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(given.advantages[MASK], wanted, rtol=1e-5)


def test_gae_decoupled():
  """VAPO: the policy's lambda from the length, the critic's 1: its targets are plain returns."""
  values = np.random.default_rng(0).normal(size=MASK.shape)
  chosen = Objective(advantage=Gae(critic_lam=1.0, adaptive=0.5, whiten=False))
  given = _given(chosen, values=values)
  np.testing.assert_allclose(given.returns, _spread(REWARDS), rtol=1e-5)
  last = MASK & (np.arange(4) == MASK.sum(1)[:, None])
  lam = np.array([1 / 3, 0, 0, 1 / 3])  # 1 - 1 / (0.5 * length), at least 0
  wanted = gae.generalized_advantage(last * REWARDS[:, None], values, MASK, gamma=1.0, lam=lam)
  np.testing.assert_allclose(given.advantages, wanted, rtol=1e-5)
  whitened = _given(Objective(advantage=Gae(critic_lam=1.0, adaptive=0.5)), values=values)
  np.testing.assert_allclose(whitened.advantages, gae.whiten(wanted, MASK), rtol=1e-5)
  np.testing.assert_array_equal(whitened.returns, given.returns)  # taken before whitening


STEPS = {
  "step_ends": np.array([[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]], bool),
  "step_rewards": np.array([[9, 1.0, 9, 0.0], [9, 9, 0.5, 9], [9, 0.2, 9, 9], [9, 0, 0.6, 1]]),
}


def test_process_rewards_are_normalised_by_group_and_summed_from_the_end():
  """DeepSeekMath 4.1.3. Group 0 has the steps 1, 0 and 0.5: mean 0.5, so 0.5, -0.5 and 0; the first
  token of its first completion sees both steps, the others the last one."""
  chosen = Objective(advantage=GroupRelative("none"), process=Process(2.0, 0.0))
  given = _given(chosen, **STEPS)
  np.testing.assert_allclose(given.advantages[0], [0, 0, -1, -1], atol=1e-6)
  np.testing.assert_allclose(given.advantages[1], [0, 0, 0, 0], atol=1e-6)
  centred = np.array([0.2, 0, 0.6, 1]) - 0.45
  np.testing.assert_allclose(given.advantages[2, 1], 2 * centred[0], rtol=1e-6)
  wanted = 2 * np.cumsum(centred[1:][::-1])[::-1]
  np.testing.assert_allclose(given.advantages[3, 1:], wanted, rtol=1e-5)


def test_outcome_and_process_are_mixed_with_their_weights():
  alone = _given(Objective(advantage=GroupRelative("none"))).advantages
  steps = _given(
    Objective(advantage=GroupRelative("none"), process=Process(1.0, 0.0)), **STEPS
  ).advantages
  mixed = _given(
    Objective(advantage=GroupRelative("none"), process=Process(0.3, 0.7)), **STEPS
  ).advantages
  np.testing.assert_allclose(mixed, 0.7 * alone + 0.3 * steps, rtol=1e-5, atol=1e-7)


def test_process_rewards_stand_where_steps_end_in_a_return():
  chosen = Objective(advantage=Returns(whiten=False), process=Process(2.0, 0.5))
  given = _given(chosen, **STEPS)
  np.testing.assert_allclose(given.advantages[0, 1:], [2 + 0.5, 0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(given.advantages[3, 1:], [3.95, 3.95, 2.75], rtol=1e-6)


def test_monte_carlo_is_the_change_of_the_value_over_each_step():
  """Completion 0: prompt 0.5, after its first step 0.8, at the end its reward 1."""
  values = np.where(STEPS["step_ends"], [[9, 0.8, 9, 7], [9] * 4, [9] * 4, [9, 0.3, 0.9, 7]], 9)
  given = _given(
    Objective(advantage=MonteCarlo()),
    step_ends=STEPS["step_ends"],
    step_values=values,
    prompt_values=np.array([0.5, 0.5, 1.0, 1.0]),
  )
  np.testing.assert_allclose(given.advantages[0, 1:], [0.3, 0.2, 0.2], atol=1e-6)
  np.testing.assert_allclose(given.advantages[1, 1:3], [-0.5, -0.5], atol=1e-6)
  np.testing.assert_allclose(given.advantages[2, 1], -0.5, atol=1e-6)
  np.testing.assert_allclose(given.advantages[3, 1:], [-0.7, 0.6, 0.6], atol=1e-6)


def test_equal_rewards_and_groups_of_one_give_nothing():
  """Whatever compares completions; a return that is whitened as well, since all are equal."""
  equal = dataclasses.replace(PLAIN, rewards=np.full(4, 0.3), greedy=np.full(4, 0.3))
  lone = dataclasses.replace(PLAIN, groups=np.arange(4))
  for kind in (GroupRelative(), LeaveOneOut(), Greedy(), Returns(), Returns(baseline=True)):
    given = _given(Objective(advantage=kind), equal)
    np.testing.assert_allclose(given.advantages, 0, atol=1e-6)
  for kind in (GroupRelative(), LeaveOneOut(), Returns(baseline=True)):
    assert not _given(Objective(advantage=kind), lone).advantages.any()


def test_truncated_completions_are_left_out_of_the_whitening():
  truncated = np.array([True, False, False, False])
  chosen = Objective(advantage=Returns(), filters=objective.Filters(truncated=True))
  given = _given(chosen, truncated=truncated, right=np.ones(4, bool))
  np.testing.assert_array_equal(given.trained, ~truncated)
  np.testing.assert_array_equal(given.positive, ~truncated)
  kept = given.advantages[1:][MASK[1:]]
  np.testing.assert_allclose([kept.mean(), kept.std(ddof=1)], [0, 1], atol=1e-6)


@pytest.mark.parametrize(
  "chosen, field",
  [
    (objective.ppo(), "kl"),
    (Objective(advantage=Gae()), "values"),
    (Objective(advantage=Greedy()), "greedy"),
    (Objective(process=Process()), "step_"),
    (objective.vine_ppo(), "(step_ends|step_values)"),
    (Objective(positive_nll=0.1), "right"),
  ],
)
def test_what_is_missing_is_named(chosen, field):
  values = np.zeros(MASK.shape) if field == "kl" else None
  with pytest.raises(ValueError, match=rf"episodes\.{field}.*: the objective needs it, found None"):
    _given(chosen, values=values)


@pytest.mark.parametrize(
  "chosen, field", [(objective.ppo(), "kl"), (Objective(advantage=Gae()), "values")]
)
def test_what_is_not_finite_is_named(chosen, field):
  fields = {"kl": np.zeros(MASK.shape), "values": np.zeros(MASK.shape)}
  fields[field] = np.where(MASK, np.nan, 0.0)
  with pytest.raises(ValueError, match=rf"episodes\.{field}: expected finite numbers"):
    _given(chosen, **fields)


def test_shapes_are_named():
  with pytest.raises(ValueError, match=r"episodes\.truncated: expected \(4,\), found \(3,\)"):
    _given(Objective(), truncated=np.zeros(3, bool))
  with pytest.raises(ValueError, match=r"episodes\.values: expected \(4, 4\), found \(4,\)"):
    _given(Objective(advantage=Gae()), values=np.zeros(4))
