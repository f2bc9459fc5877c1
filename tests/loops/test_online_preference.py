"""The online preference loop on a model of 16 letters: it learns from what it samples, from weights
and a reference that are as old as they should be, and resumes bit for bit."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from pt_jax import metrics
from pt_jax.data.groups import Group
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.experiment import ComparisonData, ModelReward, Reward
from pt_jax.loops import evaluation, online_preference, pipeline
from pt_jax.losses import preference_objective as objectives
from pt_jax.losses.reward import RewardObjective
from pt_jax.rewards.judges import WinRates
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.steps.optimizer import AdamW
from tests.loops import letters
from tests.loops.runs import Interrupted, bits, logged, run

PLACES = {"stage", "step"}
STALE = {"refresh_every": 4, "reference_every": 5, "epochs": 2, "minibatches": 2}


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Reports have tests of their own; drawing one takes longer than these runs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


def experiment(**changes):
  stage = letters.preference_stage(**changes)
  return letters.experiment(stage, model=letters.PAIR_MODEL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """20 steps of online DPO that nothing interrupted: four updates each, from weights up to three
  steps old, against a reference up to four steps old."""
  return run(tmp_path_factory.mktemp("whole"), experiment(**STALE))


def rows_of(finished, name="reward"):
  """Logged rows that hold a metric."""
  return [r for r in metrics.read_jsonl(finished.folder / "metrics.jsonl") if name in r]


def recorded(monkeypatch, owner, name):
  """Calls of a function as (arguments, result), which still does what it did."""
  calls, real = [], getattr(owner, name)

  @functools.wraps(real)
  def wrapper(*args, **kwargs):
    result = real(*args, **kwargs)
    calls.append((args, result))
    return result

  monkeypatch.setattr(owner, name, wrapper)
  return calls


def crash_at(monkeypatch, step):
  """The run dies where it would make its `step`-th set of updates from now."""
  real, calls = online_preference._Loop._update_all, iter(range(1, 1000))

  def update_all(self, *args):
    if next(calls) == step:
      raise Interrupted
    return real(self, *args)

  monkeypatch.setattr(online_preference._Loop, "_update_all", update_all)


def test_it_learns(whole):
  rewards = [row["reward"] for row in rows_of(whole)]
  assert [row["step"] for row in rows_of(whole)] == [*range(1, 21)]
  assert np.mean(rewards[:2]) < 0.6 and np.mean(rewards[-5:]) > 1.2  # of 1.5
  held_out = rows_of(whole, "eval/pass@1")
  assert [row["step"] for row in held_out] == [8, 16, 20]
  assert held_out[-1]["eval/pass@1"] > 0.9
  assert whole.results["preference"] == {k: v for k, v in held_out[-1].items() if k not in PLACES}


def test_what_is_logged(whole):
  names = "chosen_reward rejected_reward margin accuracy chosen_logprob_change"
  expected = {f"preference/{name}" for name in names.split()} | {"loss", "optimizer/grad_norm"}
  names = "pairs score score_difference reward_agrees staleness groups_drawn groups_kept"
  expected |= {f"rollout/{name}" for name in names.split()} | {"rollout/zero_variance"}
  expected |= {"reward", "reward/correct", "reward/share", "length/mean", "stop/token"}
  for row in rows_of(whole):
    assert expected <= row.keys()
    assert (
      row["rollout/pairs"] == row["rollout/groups_kept"] == 4 * (1 - row["rollout/zero_variance"])
    )
    assert row["rollout/score"] == row["reward"] and row["rollout/reward_agrees"] == 1
    assert row["rollout/score_difference"] > 0
  samples = metrics.read_jsonl(whole.folder / "samples.jsonl")
  shown = [(row["step"], min(2, int(row["rollout/pairs"]))) for row in rows_of(whole)]
  assert [row["step"] for row in samples] == [step for step, count in shown for _ in range(count)]
  assert all(row["score"] > row["rejected_score"] for row in samples)
  for row in samples:
    share = row["completion"].count("a") / max(len(row["completion"]), 1)
    assert row["score"] == pytest.approx(("a" in row["completion"]) + 0.5 * share)


def test_the_sampling_weights_are_refreshed_every_fourth_step(whole):
  """New weights reach the engine (their log-probs are the trainer's) and then stay."""
  rows = rows_of(whole)
  assert [row["rollout/staleness"] for row in rows] == [0, 1, 2, 3] * 5
  gaps = [row["rollout/logprob_gap_max"] for row in rows if "rollout/logprob_gap_max" in row]
  print(f"largest gap of {len(gaps)} refreshes {max(gaps):.2e}")
  assert len(gaps) == 5 and max(gaps) <= 1e-4


def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, monkeypatch):
  # Checkpoints are behind every third step, of sampling weights up to three and a reference up to
  # four steps old: the crashes come before the first, right behind one, and after lost steps.
  for step in (2, 7, 1, 5):
    with monkeypatch.context() as patch:
      crash_at(patch, step)
      with pytest.raises(Interrupted):
        run(tmp_path, experiment(**STALE))
  resumed = run(tmp_path, experiment(**STALE))
  assert bits(resumed.params) == bits(whole.params)
  assert logged(resumed.folder) == logged(whole.folder)
  assert resumed.results == whole.results
  name = "samples.jsonl"
  assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def short(**changes):
  return experiment(**{"steps": 4, "evaluate_every": 0, "checkpoint_every": 0, **changes})


def test_the_reference_moves_when_it_should(tmp_path, monkeypatch):
  """Where the policy is the reference the loss is log 2; with one update a step that is right
  behind a refresh and at the start."""
  equal = lambda every: [
    row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for row in rows_of(run(tmp_path / str(every), short(reference_every=every)))
  ]
  assert equal(0) == [True, False, False, False]
  assert equal(1) == [True] * 4
  assert equal(2) == [True, False, True, False]


def test_the_engine_keeps_old_weights_between_refreshes(tmp_path, monkeypatch):
  """The evaluations in between see the policy, and hand the old weights back."""
  sampled = recorded(monkeypatch, online_preference, "generate_and_judge")
  held_out = recorded(monkeypatch, evaluation, "generate_and_judge")
  changes = {"refresh_every": 3, "evaluate_every": 1, "evaluate_problems": 4}
  rows = rows_of(run(tmp_path, short(**changes)))
  assert [result.rollouts.version.max() for _, result in sampled] == [0, 0, 0, 3]
  assert [result.rollouts.version.max() for _, result in held_out[::2]] == [1, 2, 3, 4]
  gaps = [row.get("rollout/logprob_gap_max") for row in rows]
  assert gaps[1:3] == [None, None] and max(gaps[0], gaps[3]) <= 1e-4


def test_an_unpaired_objective_takes_completions_as_right_or_wrong(tmp_path, monkeypatch):
  packed = recorded(monkeypatch, online_preference.pairs, "pack_comparisons")
  changes = {"objective": objectives.kto(0.1), "steps": 12, "minibatches": 2, "rows": 16}
  finished = run(tmp_path, short(**changes))
  rows = rows_of(finished)
  assert np.mean([r["reward"] for r in rows[-3:]]) > np.mean([r["reward"] for r in rows[:2]]) + 0.4
  assert all(row["preference/baseline"] >= -20 and "rollout/right" in row for row in rows)
  for (groups, *_), batch in packed:
    assert len(groups) == 16
    assert {label for group in groups for label in group.labels[:1]} <= {0.0, 1.0}
    completions = sum(g.completions[0].mask.sum() for g in groups)
    assert batch.mask[batch.labels >= 0].sum() == completions
  right = [
    np.mean([g.labels[0] for (gs, *_), _ in packed[2 * i : 2 * i + 2] for g in gs])
    for i in range(12)
  ]
  np.testing.assert_allclose([row["rollout/right"] for row in rows], right)
  assert [row["reward/correct"] for row in rows] == pytest.approx(right)
  samples = metrics.read_jsonl(finished.folder / "samples.jsonl")
  assert {row["label"] for row in samples} == {0.0, 1.0}


def more_b(first, second):
  """Likes what the rewards do not."""
  return float(first.text.count("b") > second.text.count("b")) or 0.5 * float(
    first.text.count("b") == second.text.count("b")
  )


def test_a_judge_takes_the_place_of_the_rewards(tmp_path):
  finished = run(tmp_path, short(judge=WinRates(more_b), steps=10))
  samples = metrics.read_jsonl(finished.folder / "samples.jsonl")
  assert samples and all(
    row["completion"].count("b") > row["rejected"].count("b") for row in samples
  )
  share = lambda rows: np.mean([row["completion"].count("b") for row in rows])
  assert share(samples[-6:]) > share(samples[:6]) + 1
  assert min(row["rollout/reward_agrees"] for row in rows_of(finished)) < 1


def comparisons(tokenizer):
  """Answers with more "a" are better, as a reward model has to find out."""
  rng = np.random.default_rng(0)
  words = ["".join(rng.choice([*"aabcdefgh"], 6)) for _ in range(400)]
  rows = [
    {
      "better": max(pair, key=lambda w: w.count("a")),
      "worse": min(pair, key=lambda w: w.count("a")),
    }
    for pair in zip(words[::2], words[1::2])
    if pair[0].count("a") != pair[1].count("a")
  ]

  def encode(row):
    answer = lambda word: np.array([*tokenizer.encode("b" + word), letters.END], np.int32)
    example = lambda word: Example(answer(word), np.float32([0] + [1] * 7))
    return Group((example(row["better"]), example(row["worse"])), (1.0, 0.0))

  train, held_out = MemorySource(rows[:-20], "train"), MemorySource(rows[-20:], "held_out")
  return ComparisonData(Mixture({"pairs": train}, seed=0), held_out, encode)


def reward_stage():
  layout = Layout(batch_size=8, row_length=32)
  optimizer = AdamW(0.02, steps=30, warmup=2)
  return Reward(
    name="rm", data=comparisons, objective=RewardObjective(), layout=layout, optimizer=optimizer
  )


def test_a_reward_model_takes_the_place_of_the_rewards(tmp_path):
  judge = ModelReward("rm")
  stage = letters.preference_stage(steps=10, judge=judge, evaluate_every=0, checkpoint_every=0)
  finished = run(tmp_path, letters.experiment(reward_stage(), stage, model=letters.PAIR_MODEL))
  rows = [row for row in rows_of(finished) if row["stage"] == "preference"]
  scores, rewards = ([row[name] for row in rows] for name in ("rollout/score", "reward"))
  assert np.mean(scores[-2:]) > np.mean(scores[:2]) and np.mean(rewards[-2:]) > np.mean(rewards[:2])
  assert scores[0] != pytest.approx(rewards[0])
  assert np.mean([row["rollout/reward_agrees"] for row in rows]) > 0.7
  for changes in ({"stage": "other"}, {"members": 2}):
    other = dataclasses.replace(stage, judge=dataclasses.replace(judge, **changes))
    with pytest.raises(ValueError, match=r"^stage preference: judge: expected a Reward stage befo"):
      letters.experiment(reward_stage(), other)


def hopeless():
  return RewardStack([Component("correct", 1.0, lambda completion: 0.0)])


def test_ties_train_nothing(tmp_path):
  finished = run(tmp_path, short(rewards=hopeless, resample_limit=2, steps=2))
  rows = rows_of(finished)
  assert [row["rollout/pairs"] for row in rows] == [0, 0] and "loss" not in rows[0]
  assert [row["rollout/groups_drawn"] for row in rows] == [8, 8]
  start = run(tmp_path / "start", short(rewards=hopeless, steps=1))
  assert bits(finished.params) == bits(start.params)


def third(completion):
  """1 for an early letter at the start, where the problem's number divides by three."""
  number = int(completion.problem.id.split("/")[1])
  return float(number % 3 == 0 and completion.text[:1] in ("a", "b", "c", "d"))


def sparse():
  return RewardStack([Component("correct", 1.0, third)])


def test_groups_of_ties_are_drawn_again(tmp_path):
  rows = rows_of(run(tmp_path, short(rewards=sparse, resample_limit=10, pairing="random", steps=2)))
  for row in rows:
    assert row["rollout/groups_drawn"] in range(8, 41, 4)
    assert 4 <= row["rollout/groups_kept"] < row["rollout/groups_drawn"]
    assert row["rollout/zero_variance"] == 0 and row["rollout/pairs"] == 4


def test_a_loss_that_is_nan_stops_the_run(tmp_path, monkeypatch):
  real = online_preference.pairs.pair_groups
  spoilt = lambda *args: [g._replace(weight=math.nan) for g in real(*args)]
  monkeypatch.setattr(online_preference.pairs, "pair_groups", spoilt)
  with pytest.raises(ValueError, match=r"^stage preference: step 1: metric .*: expected a finite"):
    run(tmp_path, short())


def test_a_judge_that_fails_is_named(tmp_path):
  message = r"^stage preference: judge: expected 32 scores, found shape \(3,\)$"
  with pytest.raises(ValueError, match=message):
    run(tmp_path, short(judge=lambda completions, groups: np.zeros(3)))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rewards": lambda: RewardStack([Component("share", 1.0, letters.share_of_a)])},
     "expected a reward component named 'correct'"),
    ({"evaluate_problems": 17}, "held-out problems: expected 17, found 16"),
    ({"row_length": 16}, "problem word/0: expected 1 to 0 tokens"),
    ({"row_length": 64}, "row_length: expected at most the model's max_length 32, found 64"),
  ],
)  # fmt: skip
def test_stages_that_cannot_run(tmp_path, changes, message):
  with pytest.raises(ValueError, match=rf"^stage preference: {message}") as error:
    run(tmp_path, experiment(**changes))
  assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"optimizer": AdamW(0.1, steps=7)}, "optimizer.steps is 7, expected 20"),
    ({"group_size": 1}, "group_size: expected at least 2, found 1"),
    ({"refresh_every": 0}, "refresh_every: expected at least 1, found 0"),
    ({"reference_every": -1}, "reference_every: expected at least 0, found -1"),
    ({"pairing": "worst"}, "pairing: expected one of best_worst, random, all, found 'worst'"),
    ({"judge": ModelReward("rm", weight=2.0)},
     "judge: expected a model of outcomes with weight 1, found ModelReward(stage='rm', weight=2.0"),
    ({"objective": objectives.simpo(), "reference_every": 2},
     "reference_every: 'sigmoid' without a reference does not read it, found 2"),
    ({"objective": objectives.kto(), "prompts": 1},
     "prompts: expected at least 2 for mismatched pairs, found 1"),
  ],
)  # fmt: skip
def test_stages_that_contradict_themselves(changes, message):
  with pytest.raises(ValueError) as error:
    letters.preference_stage(**changes)
  assert str(error.value).startswith(f"stage preference: {message}")


def test_completions_for_one_that_stands_alone_may_be_longer():
  """BCO has no mismatched completion beside, so a row of 16 is enough."""
  stage = letters.preference_stage(objective=objectives.bco(0.1))
  assert stage.completions_per_group == 1
  assert letters.preference_stage(objective=objectives.kto(0.1)).completions_per_group == 2


def test_temperature_is_that_of_the_samples_when_the_gap_is_measured(tmp_path):
  sampling = SamplingParams(max_tokens=8, stop_tokens=(letters.END,), temperature=0.7)
  rows = rows_of(run(tmp_path, short(sampling=sampling, steps=3, objective=objectives.simpo())))
  assert all(row["rollout/logprob_gap_max"] <= 1e-4 for row in rows)
  assert "preference/chosen_logprob_change" not in rows[0]
