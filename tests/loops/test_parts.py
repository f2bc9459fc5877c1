"""Every field of what an online stage may have besides its policy is read: changed, it changes what
two steps log or leave."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from pt_jax import parts
from pt_jax.data.mixtures import Mixture
from pt_jax.data.pipeline import Layout
from pt_jax.loops import pipeline
from pt_jax.losses import objective
from pt_jax.losses import preference_objective as preferences
from pt_jax.parts import Critic, Mix, ModelReward, PassRate, Steps, ValueHead
from pt_jax.steps.optimizer import AdamW
from tests.loops import letters
from tests.loops.runs import bits, logged, run
from tests.loops.test_algorithms import share_of_each
from tests.loops.test_mixed import MIX, pairs, reward_stage

CRITIC = Critic(AdamW(0.03, steps=2))
PROCESS = dataclasses.replace(objective.grpo(), kl=None, process=objective.Process())
RM = reward_stage(members=2, optimizer=AdamW(0.02, steps=2))
ONE = reward_stage(name="one", optimizer=AdamW(0.02, steps=2))


def stage(chosen=None, **changes) -> letters.Online:
  return letters.stage(
    steps=2, objective=chosen or objective.dr_grpo(8), evaluate_problems=4, **changes
  )


def more_pairs(tokenizer) -> parts.ComparisonData:
  """The same rows in another order."""
  made = pairs(tokenizer)
  return dataclasses.replace(made, train=Mixture(made.train.sources, seed=1))


def longest(completion, texts):
  """The reward of a step is its length."""
  return [float(len(text)) for text in texts]


def with_critic(**changes):
  return stage(objective.ppo(), critic=dataclasses.replace(CRITIC, **changes))


def with_head(**changes):
  return stage(objective.ppo(), critic=ValueHead(**changes), epochs=2)


def with_model(**changes):
  return stage(reward_model=ModelReward(**({"stage": "rm", "members": 2} | changes)))


def with_mix(**changes):
  return stage(mix=dataclasses.replace(MIX, **changes))


def with_steps(**changes):
  fields = {"mark": "b", "rewards": share_of_each} | changes
  return stage(PROCESS, steps_of=Steps(**fields))


def with_pass_rate(**changes):
  fields = {"low": 0.1, "high": 0.6, "samples": 4, "problems": 24} | changes
  return stage(pass_rate=PassRate(**fields))


CASES = {  # options and field -> the stages that differ in it
  (Critic, "optimizer"): (with_critic, {"optimizer": AdamW(0.01, steps=2)}),
  (Critic, "start"): (with_critic, {"start": "one"}),
  (Critic, "epochs"): (with_critic, {"epochs": 2, "optimizer": AdamW(0.03, steps=4)}),
  (Critic, "clip"): (with_critic, {"clip": 0.01, "epochs": 2, "optimizer": AdamW(0.03, steps=4)}),
  (Critic, "pretrain"): (with_critic, {"pretrain": 1, "optimizer": AdamW(0.03, steps=3)}),
  (ValueHead, "coefficient"): (with_head, {"coefficient": 1.0}),
  (ValueHead, "clip"): (with_head, {"clip": 1e-4}),
  (ModelReward, "stage"): (with_model, {"stage": "one", "members": 1}),
  (ModelReward, "weight"): (with_model, {"weight": 2.0}),
  (ModelReward, "members"): (with_model, {"stage": "one", "members": 1}),
  (ModelReward, "pessimism"): (with_model, {"pessimism": 3.0}),
  (ModelReward, "process"): None,  # test_mixed.test_a_model_of_steps_gives_the_rewards_of_process
  (Mix, "data"): (with_mix, {"data": more_pairs}),
  (Mix, "objective"): (with_mix, {"objective": preferences.ipo()}),
  (Mix, "layout"): (with_mix, {"layout": Layout(batch_size=4, row_length=16, window=16)}),
  (Mix, "weight"): (with_mix, {"weight": 2.0}),
  (Steps, "mark"): (with_steps, {"mark": "c"}),
  (Steps, "rewards"): (with_steps, {"rewards": longest}),
  (PassRate, "low"): (with_pass_rate, {"low": 0.3}),
  (PassRate, "high"): (with_pass_rate, {"high": 0.9}),
  (PassRate, "samples"): (with_pass_rate, {"samples": 2}),
  (PassRate, "problems"): (with_pass_rate, {"problems": 30}),
}
ELSEWHERE = {
  *("SupervisedData", "ComparisonData", "Problems", "EarlyStop"),  # data, and a rule of its own
  "Curriculum",  # tests/loops/test_difficulty.py
}


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Reports have tests of their own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


def test_every_field_is_listed():
  classes = [
    c for c in vars(parts).values() if isinstance(c, type) and c.__module__ == "pt_jax.parts"
  ]
  walked = {c for c, _ in CASES}
  assert {c.__name__ for c in classes} == {c.__name__ for c in walked} | ELSEWHERE
  assert {(c, f.name) for c in walked for f in dataclasses.fields(c)} == set(CASES)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
  """What an experiment logged in its last stage and left, by how it was made; run once each."""
  folder, numbers = tmp_path_factory.mktemp("parts"), itertools.count()

  @functools.cache
  def outcome(make, *changes):
    before = (RM, ONE) if make is with_model or "start" in dict(changes) else ()
    experiment = letters.experiment(*before, make(**dict(changes)))
    finished = run(folder, experiment, id=str(next(numbers)))
    rows = [row for row in logged(finished.folder) if '"stage": "rl"' in row]
    return rows, bits(finished.params)

  return outcome


@pytest.mark.parametrize("kind, field", [place for place, case in CASES.items() if case])
def test_every_field_is_read(kind, field, left):
  make, changes = CASES[kind, field]
  base = ()
  if field == "clip" and kind is Critic:  # one update finds every value where it was
    base = tuple((k, v) for k, v in changes.items() if k != "clip")
  before, after = left(make, *base), left(make, *changes.items())
  assert before[0] != after[0] or before[1] != after[1]
  np.testing.assert_equal(len(before[1]), len(after[1]))
