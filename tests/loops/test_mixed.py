"""PPO on what a reward model says, and pairs that are trained on beside RL, on sixteen letters."""

import dataclasses

import jax
import numpy as np
import pytest

from pt_jax.data.groups import Group
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.experiment import ComparisonData, Critic, Mix, ModelReward, Reward, Steps
from pt_jax.loops import model_rewards, online, pipeline
from pt_jax.losses import objective
from pt_jax.losses import preference_objective as preferences
from pt_jax.losses.reward import RewardObjective
from pt_jax.rewards.stack import Component, RewardStack
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


def completion(prompt: str, answer: str) -> Example:
  tokens = letters.Letters().encode(prompt + answer)
  mask = np.arange(len(tokens)) >= len(prompt)
  return Example(np.array(tokens, np.int32), mask.astype(np.float32))


def encode(row) -> Group:
  good, bad = (completion(row["prompt"], row[side]) for side in ("good", "bad"))
  return Group((good, bad), (1.0, 0.0))


def pairs(tokenizer) -> ComparisonData:
  """Answers with an "a" are better than those of the same length with other letters."""
  rng = np.random.default_rng(0)
  rows = []
  for problem in letters.Words(60):
    answer = "".join(rng.choice([*"bcdefgh"], rng.integers(1, 4)))  # a pair fits a row
    rows.append({"prompt": problem.prompt, "bad": f"{answer}p", "good": f"a{answer[1:]}p"})
  held_out = MemorySource(rows[:10], "held_out")
  return ComparisonData(Mixture({"p": MemorySource(rows[10:], "pairs")}, seed=0), held_out, encode)


def reward_stage(**changes) -> Reward:
  fields = {
    "name": "rm",
    "data": pairs,
    "layout": Layout(batch_size=8, row_length=16, window=16),
    "optimizer": AdamW(0.02, steps=30),
    "objective": RewardObjective("pairwise"),
  }
  return Reward(**(fields | changes))


def nothing_rewarded() -> RewardStack:
  """The right answer is measured, not rewarded."""
  return RewardStack([Component("correct", 0.0, letters.has_a)])


def test_ppo_on_a_reward_model(tmp_path, monkeypatch):
  """Actor, reference, reward model, critic: what only the model rewards is learned."""
  judged = recorded(monkeypatch, model_rewards.RewardModel, "judge")
  steps = 20
  stage = letters.stage(
    steps=steps,
    rewards=nothing_rewarded,
    objective=objective.ppo(),
    critic=Critic(AdamW(0.03, steps=steps), start="rm"),
    reward_model=ModelReward("rm", weight=2.0),
    evaluate_every=0,
  )
  finished = run(tmp_path, letters.experiment(reward_stage(), stage))
  assert finished.results["rm"]["eval/accuracy"] > 0.8
  rows = rows_of(finished, "reward/model")
  for row in rows:
    assert row["reward"] == pytest.approx(2 * row["reward/model"], rel=1e-4)
  right = [row["reward/correct"] for row in rows]
  assert np.mean(right[-4:]) > np.mean(right[:2]) + 0.2
  (_, before), after = judged[0]
  np.testing.assert_allclose(
    after.rewards.total, before.rewards.total + 2 * after.rewards.components["model"], rtol=1e-5
  )
  assert set(finished.params) == set(letters.decoder_names())


def test_a_model_of_steps_gives_the_rewards_of_process(tmp_path, monkeypatch):
  credits = recorded(monkeypatch, online, "assign_credit")
  chosen = dataclasses.replace(objective.grpo(), kl=None, process=objective.Process())
  stage = letters.stage(
    steps=1,
    objective=chosen,
    steps_of=Steps("b"),
    reward_model=ModelReward("rm", members=2, process=True),
    evaluate_problems=4,
  )
  rm = reward_stage(members=2, optimizer=AdamW(0.02, steps=2))
  run(tmp_path, letters.experiment(rm, stage))
  (((given,), _),) = credits
  inside = given.step_rewards[given.step_ends]
  assert ((inside > 0) & (inside < 1)).all() and len(np.unique(inside)) > 10
  assert not given.step_rewards[~given.step_ends].any()


MIX = Mix(pairs, preferences.dpo(), Layout(batch_size=8, row_length=16, window=16), weight=1.0)


def test_pairs_are_learned_beside_rl(tmp_path):
  """RL that rewards nothing: what moves is the preference, by its weight."""
  ends = {}
  for weight in (1.0, 3.0):
    mix = dataclasses.replace(MIX, weight=weight)
    stage = letters.stage(steps=8, rewards=nothing_rewarded, mix=mix, evaluate_problems=4)
    rows = rows_of(run(tmp_path / str(weight), letters.experiment(stage)))
    ends[weight] = rows
    for row in rows:
      assert row["loss"] == pytest.approx(weight * row["preference/loss"], rel=1e-4)
    assert rows[0]["preference/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert rows[-1]["preference/accuracy"] > 0.8
    assert rows[-1]["preference/loss"] < rows[0]["preference/loss"]
  first = [ends[w][0]["optimizer/grad_norm"] for w in (1.0, 3.0)]
  assert first[1] == pytest.approx(3 * first[0], rel=1e-4)


def test_a_mixed_run_resumes_bit_for_bit(tmp_path, monkeypatch):
  make = lambda: letters.experiment(letters.stage(steps=7, mix=MIX, evaluate_problems=4))
  whole = run(tmp_path / "whole", make())
  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    crash_at(patch, 5)
    run(tmp_path / "killed", make())
  resumed = run(tmp_path / "killed", make())
  assert bits(resumed.params) == bits(whole.params)
  assert logged(resumed.folder) == logged(whole.folder)


def test_the_gradient_is_the_sum_of_both(tmp_path, monkeypatch):
  """The first moments after one update, RL's and alpha times the pairs', each alone and mixed."""
  moments = {}
  real = online._Loop._save

  for name, (rewards, mix) in {
    "rl": (letters.rewards, None),
    "pairs": (nothing_rewarded, MIX),
    "both": (letters.rewards, MIX),
  }.items():
    optimizer = AdamW(0.01, steps=2, clip_norm=1e9)
    stage = letters.stage(
      steps=2,
      rewards=rewards,
      mix=mix,
      optimizer=optimizer,
      checkpoint_every=1,
      evaluate_problems=4,
    )

    def save(self, done, name=name):
      moments[name] = jax.device_get(self.state.optimizer[0].mu)
      return real(self, done)

    monkeypatch.setattr(online._Loop, "_save", save)
    run(tmp_path / name, letters.experiment(stage))
  expected = jax.tree.map(lambda a, b: a + b, moments["rl"], moments["pairs"])
  for got, wanted in zip(jax.tree.leaves(moments["both"]), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: ModelReward("rm", weight=0), "reward_model.weight: expected a number other than 0"),
    (lambda: ModelReward("rm", members=0), "reward_model.members: expected at least 1, found 0"),
    (lambda: ModelReward("rm", pessimism=-1), "reward_model.pessimism: expected a number >= 0"),
    (lambda: ModelReward("rm", 2.0, process=True), "reward_model.weight: expected 1.0"),
    (lambda: dataclasses.replace(MIX, weight=0), "mix.weight: expected a number > 0, found 0"),
    (lambda: dataclasses.replace(MIX, objective=preferences.kto()), "mix.objective: expected one"),
    (
      lambda: letters.experiment(letters.stage(reward_model=ModelReward("rm"))),
      "stage rl: reward_model: expected a Reward stage before it with 1 members, found 'rm'",
    ),
    (
      lambda: letters.stage(reward_model=ModelReward("rm", process=True)),
      "stage rl: reward_model.process: the objective has no process",
    ),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_pairs_that_do_not_fit_are_named(tmp_path):
  mix = dataclasses.replace(MIX, layout=Layout(batch_size=8, row_length=32))
  stage = letters.stage(mix=mix)
  with pytest.raises(ValueError, match="stage rl: row_length: expected at most the model's max_"):
    run(tmp_path, letters.experiment(stage))
