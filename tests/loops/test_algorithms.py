"""Every policy-gradient preset in the loop: what it asks of the loop is there and reaches the step.

The model of 16 letters; two or three steps each.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from pt_jax.experiment import Critic, ModelReward, Steps, ValueHead
from pt_jax.loops import episodes, online, pipeline
from pt_jax.losses import objective
from pt_jax.losses.options import Correction, KlController
from pt_jax.rollout.rollouts import StopReason
from pt_jax.steps.optimizer import AdamW
from tests.loops import letters
from tests.loops.runs import Interrupted, bits, logged, run
from tests.loops.test_online import crash_at, recorded, rows_of


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Reports have tests of their own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


def critic(steps, **options) -> Critic:
  """A critic whose optimizer is as long as the stage."""
  passes = (steps + options.get("pretrain", 0)) * options.get("epochs", 1)
  return Critic(AdamW(0.02, steps=passes), **options)


def share_of_each(completion, texts):
  """The reward of a step is its share of "a"."""
  return [text.count("a") / max(len(text), 1) for text in texts]


PRESETS = {
  "ppo": (objective.ppo(), {"critic": critic(2)}),
  "vapo": (objective.vapo(alpha=0.5), {"critic": critic(2, pretrain=2, epochs=2)}),
  "gspo": (objective.gspo(), {}),
  "cispo": (objective.cispo(), {}),
  "sapo": (objective.sapo(), {}),
  "rloo": (objective.rloo(), {}),
  "reinforce_plus_plus": (objective.reinforce_plus_plus(), {}),
  "reinforce_plus_plus_baseline": (objective.reinforce_plus_plus(baseline=True), {}),
  "remax": (objective.remax(), {}),
  "vine_ppo": (objective.vine_ppo(2), {"steps_of": Steps(mark="b")}),
  "process": (
    dataclasses.replace(objective.grpo(), process=objective.Process(0.5)),
    {"steps_of": Steps(mark="b", rewards=share_of_each)},
  ),
  "exact kl, corrected": (
    dataclasses.replace(
      objective.dapo(8, 4), kl=objective.Kl(0.1, "exact"), correction=Correction(), entropy=0.01
    ),
    {},
  ),
  "value head": (objective.ppo(), {"critic": ValueHead()}),
}
ALWAYS = {
  *("loss", "reward", "policy/entropy", "policy/ratio", "policy/approx_kl", "policy/clip_fraction"),
  *("policy/clip_fraction_low", "policy/clip_fraction_high", "policy/surrogate", "policy/epochs"),
  *("rollout/logprob_gap_max", "rollout/tokens", "perf/step_seconds", "length/mean"),
}


SHORT = ("ppo", "vapo", "remax", "vine_ppo", "process", "exact kl, corrected", "value head")


@pytest.mark.parametrize(
  "name",
  [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS],
)
def test_every_preset_runs(name, tmp_path):
  chosen, options = PRESETS[name]
  stage = letters.stage(steps=2, objective=chosen, evaluate_problems=4, **options)
  finished = run(tmp_path, letters.experiment(stage))
  rows = rows_of(finished)
  assert len(rows) == 2 and rows[-1]["step"] == stage.total
  for row in rows:
    assert row.keys() >= ALWAYS
    assert ("policy/kl" in row) == (chosen.kl is not None)
    assert ("critic/loss" in row) == (stage.critic is not None)
    assert ("policy/correction_weight" in row) == (chosen.correction is not None)
    assert ("policy/positive_nll" in row) == (chosen.positive_nll > 0)
  assert set(finished.params) == set(letters.decoder_names())


def test_the_critic_learns_before_the_policy_moves(tmp_path):
  """VAPO: in the steps of pretraining only the critic is updated; its error falls."""
  stage = letters.stage(
    steps=1, objective=objective.vapo(alpha=0.5), critic=critic(1, pretrain=12, epochs=4)
  )
  finished = run(tmp_path, letters.experiment(stage))
  rows = rows_of(finished, "critic/loss")
  assert [("loss" in row) for row in rows] == [False] * 12 + [True]
  errors = [row["critic/error"] for row in rows]
  assert np.mean(errors[-3:]) < 0.7 * errors[0]
  assert [("policy/epochs" in row) for row in rows] == [False] * 12 + [True]
  explained = [row["critic/explained_variance"] for row in rows]
  assert explained[-1] > explained[0]


def test_ppo_learns(tmp_path):
  """A critic, KL in the reward with a controller, two epochs of two minibatches."""
  kl = objective.Kl(0.05, "k1", where="reward", controller=KlController(0.05))
  stage = letters.stage(
    steps=20,
    epochs=2,
    minibatches=2,
    objective=dataclasses.replace(objective.ppo(), kl=kl),
    critic=Critic(AdamW(0.03, steps=40)),
  )
  rows = rows_of(run(tmp_path, letters.experiment(stage)))
  rewards = [row["reward"] for row in rows]
  assert np.mean(rewards[-4:]) > np.mean(rewards[:2]) + 0.5
  coefficients = [row["policy/kl_coefficient"] for row in rows]
  assert coefficients[0] == 0.05 and len(set(coefficients)) > 10
  for before, after in itertools.pairwise(rows):
    error = np.clip(before["policy/kl"] / 0.05 - 1, -0.2, 0.2)
    expected = before["policy/kl_coefficient"] * (1 + 0.1 * error)
    assert after["policy/kl_coefficient"] == pytest.approx(expected, rel=1e-6)


def test_epochs_end_when_the_policy_has_moved(tmp_path):
  stage = letters.stage(steps=3, epochs=4, lr=0.05, stop_kl=1e-3)
  rows = rows_of(run(tmp_path, letters.experiment(stage)))
  assert all(1 <= row["policy/epochs"] < 4 for row in rows)
  patient = dataclasses.replace(stage, stop_kl=1e3)
  rows = rows_of(run(tmp_path, letters.experiment(patient, name="patient")))
  assert all(row["policy/epochs"] == 4 for row in rows)


def two_networks() -> letters.Online:
  """PPO with everything that a checkpoint has to hold, on prompts that stand once."""
  kl = objective.Kl(0.05, "k1", where="reward", controller=KlController(0.02))
  return letters.stage(
    steps=8,
    minibatches=2,
    objective=dataclasses.replace(objective.ppo(), kl=kl),
    critic=Critic(AdamW(0.03, steps=40), epochs=2, pretrain=2),
    evaluate_problems=4,
    share_prompts=True,
  )


def test_ppo_resumes_bit_for_bit(tmp_path, monkeypatch):
  """Two networks, a controller, pretraining: killed at steps 2, 5 and 8 of 10."""
  whole = run(tmp_path / "whole", letters.experiment(two_networks()))
  assert max(row["rollout/logprob_gap_max"] for row in rows_of(whole)) <= 1e-4
  for step in (2, 5, 8):
    folder = tmp_path / str(step)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
      crash_at(patch, step)
      run(folder, letters.experiment(two_networks()))
    resumed = run(folder, letters.experiment(two_networks()))
    assert bits(resumed.params) == bits(whole.params)
    assert logged(resumed.folder) == logged(whole.folder)


def test_the_value_head_shares_the_trunk(tmp_path):
  """Its loss moves the policy's weights, and the head leaves with the stage."""
  ends = []
  for coefficient in (0.5, 2.0):
    head = ValueHead(coefficient)
    stage = letters.stage(steps=2, objective=objective.ppo(), critic=head, evaluate_problems=4)
    folder = tmp_path / str(coefficient)
    ends.append(run(folder, letters.experiment(stage)).params)
  assert bits(ends[0]["blocks"]) != bits(ends[1]["blocks"])
  assert ends[0].keys() == set(letters.decoder_names())


def test_remax_asks_for_greedy_completions(tmp_path, monkeypatch):
  credits = recorded(monkeypatch, online, "assign_credit")
  stage = letters.stage(steps=1, objective=objective.remax(), evaluate_problems=4)
  run(tmp_path, letters.experiment(stage))
  (((given,), credit),) = credits
  assert given.greedy.shape == (32,)
  by_group = given.greedy.reshape(4, 8)
  assert (by_group == by_group[:, :1]).all()  # one greedy completion a prompt
  expected = (credit.rewards - given.greedy)[:, None] * given.mask
  np.testing.assert_allclose(credit.advantages, expected, rtol=1e-5, atol=1e-6)


def test_steps_are_where_the_mark_is(tmp_path, monkeypatch):
  """Values from every step but the last; continuations keep what stands before the mark."""
  valued = recorded(monkeypatch, episodes, "step_values")
  asked = recorded(monkeypatch, episodes, "read_completions")
  credits = recorded(monkeypatch, online, "assign_credit")
  chosen = dataclasses.replace(objective.vine_ppo(3), kl=None)
  stage = letters.stage(steps=1, objective=chosen, steps_of=Steps(mark="c"), evaluate_problems=4)
  run(tmp_path, letters.experiment(stage))
  (((judged, ends), (values, tokens)),) = valued
  (((given,), credit),) = credits
  ((_, completions),) = asked
  rollouts = judged.rollouts
  drawn, prefixes = given.mask, []
  last = np.arange(drawn.shape[1]) == rollouts.length[:, None] - 1
  marked = drawn & (rollouts.tokens == 2)
  stopped = (rollouts.stop == StopReason.TOKEN)[:, None] & np.pad(marked[:, :-1], ((0, 0), (1, 0)))
  assert (ends == (marked | (drawn & last & ~stopped))).all()
  for row, place in np.argwhere(ends & ~last):
    prefixes += [
      letters.Letters().decode(rollouts.tokens[row, rollouts.prompt_length[row] : place + 1])
    ]
  assert len(completions) == 3 * len(prefixes) and tokens > 0
  for i, completion in enumerate(completions):
    assert completion.text.startswith(prefixes[i // 3])
  totals = np.float32([letters.has_a(c) + 0.5 * letters.share_of_a(c) for c in completions])
  np.testing.assert_allclose(values[ends & ~last], totals.reshape(-1, 3).mean(1), rtol=1e-5)
  total = judged.rewards.total.reshape(4, 8)
  groups = ((total.sum(1, keepdims=True) - total) / 7).ravel()  # the others of the group
  first = drawn.argmax(1)
  after = np.where(
    (ends & ~last).any(1), values[np.arange(32), (ends & ~last).argmax(1)], judged.rewards.total
  )
  np.testing.assert_allclose(
    credit.advantages[np.arange(32), first], after - groups, rtol=1e-4, atol=1e-5
  )


def wrong_number(completion, texts):
  return [0.0] * (len(texts) + 1)


def test_step_rewards_of_another_number_are_named(tmp_path):
  chosen = dataclasses.replace(objective.grpo(), kl=None, process=objective.Process())
  stage = letters.stage(objective=chosen, steps_of=Steps("b", wrong_number), evaluate_problems=4)
  with pytest.raises(ValueError, match=r"step rewards, problem 'word/\d+': expected \d+ finite"):
    run(tmp_path, letters.experiment(stage))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"objective": objective.ppo()}, "critic: expected one, for an objective with Gae, found None"),
    ({"critic": ValueHead()}, "critic: expected none without Gae, found ValueHead"),
    ({"objective": objective.vine_ppo()}, "steps_of: expected one, for an objective with process"),
    ({"steps_of": Steps()}, "steps_of: expected none without process or MonteCarlo"),
    (
      {
        "objective": dataclasses.replace(objective.grpo(), process=objective.Process()),
        "steps_of": Steps(),
      },
      "objective.process: expected steps_of.rewards or a reward model of steps, found neither",
    ),
    ({"group_size": 1}, "group_size: expected at least 2, since the objective compares the"),
    (
      {"objective": objective.dapo(8, 4), "reward_model": ModelReward("rm")},
      "reward_model: expected none with MonteCarlo or filters.zero_variance",
    ),
    (
      {"objective": objective.vine_ppo(), "steps_of": Steps("b", share_of_each)},
      "steps_of.rewards: only objective.process reads them",
    ),
    (
      {"objective": objective.ppo(), "critic": ValueHead(), "group_size": 1, "share_prompts": True},
      "share_prompts: expected a group_size of at least 2, found 1",
    ),
    ({"stop_kl": 0.1}, "stop_kl: expected a number > 0 and several epochs, found 0.1 and 1"),
    (
      {"objective": objective.ppo(), "critic": Critic(AdamW(0.1, steps=3))},
      "critic.optimizer.steps is 3, expected 20 (steps x epochs x minibatches)",
    ),
  ],
)
def test_stages_that_contradict_themselves(changes, message):
  with pytest.raises(ValueError) as error:
    letters.stage(**changes)
  assert str(error.value).startswith(f"stage rl: {message}")


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Critic(AdamW(0.1, steps=3), epochs=0), "critic.epochs: expected at least 1, found 0"),
    (lambda: Critic(AdamW(0.1, steps=3), pretrain=-1), "critic.pretrain: expected at least 0"),
    (lambda: Critic(AdamW(0.1, steps=3), clip=0), "critic.clip: expected a number > 0 or None"),
    (lambda: ValueHead(0.0), "critic.coefficient: expected a number > 0, found 0.0"),
    (lambda: ValueHead(clip=-1), "critic.clip: expected a number > 0 or None, found -1"),
    (lambda: Steps(""), "steps.mark: expected some text, found none"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
