"""Reward-model stages on a byte model of one layer: they learn, resume exactly, keep the policy."""

import dataclasses
import re

import numpy as np
import pytest

from pt_jax import metrics
from pt_jax.experiment import EarlyStop
from pt_jax.loops import pipeline, ranking, reward_model
from pt_jax.loops.offline import Outputs
from pt_jax.losses.reward import RewardObjective
from pt_jax.models import heads
from tests.loops import comparisons, tiny
from tests.loops.runs import Interrupted, bits, interrupted_at, logged, run

ENSEMBLE = comparisons.stage(members=3, objective=RewardObjective(center=0.01, bootstrap=True))


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Pictures have a test of their own below."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted."""
  return run(tmp_path_factory.mktemp("whole"), comparisons.experiment(ENSEMBLE))


def test_it_learns_and_logs_what_early_stops_may_watch(whole):
  rows = metrics.read_jsonl(whole.folder / "metrics.jsonl")
  held_out = [row for row in rows if "eval/accuracy" in row]
  assert [row["step"] for row in held_out] == [0, 6, 12]
  assert held_out[-1]["eval/accuracy_low"] > 0.6 > 0.5 >= held_out[0]["eval/accuracy_low"]
  assert held_out[-1]["eval/loss"] < 0.6 * held_out[0]["eval/loss"]
  found = {name for row in rows for name in row if "/slice/" not in name} - {"stage", "step"}
  assert found == set(reward_model.metrics_of(ENSEMBLE))
  results = whole.results["reward"]
  assert {f"eval/slice/{n}/accuracy" for n in (3, 4, 5, 6)} <= results.keys()
  assert results["eval/agreement"] <= 1 and results["eval/spread"] > 0


def test_figures_are_those_of_the_rewards_that_were_kept(whole):
  kept = dict(np.load(whole.folder / "held_out" / "reward.npz"))
  assert kept["rewards"].shape == (80, 3) and kept["rows"].tolist() == sorted([*range(40)] * 2)
  rewards = kept["rewards"].astype(np.float64).mean(1)
  margins = rewards[::2] - rewards[1::2]
  results = whole.results["reward"]
  assert results["eval/accuracy"] == pytest.approx((margins > 0).mean())
  assert results["eval/auc"] == pytest.approx(ranking.auc(rewards[::2], rewards[1::2]))
  assert results["eval/ece"] == pytest.approx(ranking.pair_calibration(margins).error)
  lengths = np.array([len(r["words"][0]) for r in comparisons.rows("pairwise", 40, 2)])
  assert results["eval/slice/4/accuracy"] == pytest.approx((margins[lengths == 4] > 0).mean())
  assert results["eval/slice/4/count"] == (lengths == 4).sum()


def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, monkeypatch):
  for step in (3, 6):
    with monkeypatch.context() as patch:
      interrupted_at(step, patch)
      with pytest.raises(Interrupted):
        run(tmp_path, comparisons.experiment(ENSEMBLE))
  resumed = run(tmp_path, comparisons.experiment(ENSEMBLE))
  assert logged(resumed.folder) == logged(whole.folder)
  assert resumed.results == whole.results
  ours, theirs = (np.load(f.folder / "held_out" / "reward.npz") for f in (resumed, whole))
  assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_the_policy_is_left_alone_and_its_trunk_is_the_start(tmp_path, monkeypatch):
  """sft, reward, sft: the second one goes on from the first; the reward model began with its
  trunk."""
  starts = []
  real = reward_model.offline.run_offline

  def seen(stage, data, training):
    starts.append((stage.name, training.context.params))
    return real(stage, data, training)

  monkeypatch.setattr(reward_model.offline, "run_offline", seen)
  short = dataclasses.replace(tiny.ADAM, steps=2)
  before, after = (tiny.stage(name=n, optimizer=short, sample_every=0) for n in ("a", "b"))
  reward = dataclasses.replace(ENSEMBLE, optimizer=dataclasses.replace(ENSEMBLE.optimizer, steps=2))
  finished = run(tmp_path, comparisons.experiment(before, reward, after))
  (_, first), (_, started), (_, second) = starts
  assert set(started) == set(heads.table(tiny.MODEL, 3))
  assert bits(second) != bits(first)
  trunk = {name: w for name, w in started.items() if name != heads.HEAD}
  assert bits(trunk) == bits({name: second[name] for name in trunk})
  assert np.ptp(np.asarray(started[heads.HEAD]), axis=0).min() > 0, "members begin apart"
  assert "unembed" in finished.params


@pytest.mark.parametrize("kind", ["listwise", "outcome", "process"])
def test_other_kinds_learn(kind, tmp_path):
  finished = run(tmp_path, comparisons.experiment(comparisons.stage(kind, evaluate_every=0)))
  results = finished.results["reward"]
  assert results["eval/accuracy_low"] > 0.5 and results["eval/auc"] > 0.7
  rows = metrics.read_jsonl(finished.folder / "metrics.jsonl")
  found = {name for row in rows for name in row if "/slice/" not in name} - {"stage", "step"}
  assert found == set(reward_model.metrics_of(comparisons.stage(kind)))
  kept = np.load(finished.folder / "held_out" / "reward.npz")
  assert reward_model.draw("reward", Outputs(kept["rows"], dict(kept)))


def test_pairs_of_a_list_are_every_two_of_it():
  rows = np.array([4, 4, 4, 7, 9, 9])
  found = reward_model.pairs_of(rows, np.arange(6.0)[:, None])
  assert found.rows.tolist() == [4, 4, 4, 9]
  assert found.chosen[:, 0].tolist() == [0, 0, 1, 4]
  assert found.rejected[:, 0].tolist() == [1, 2, 2, 5]


@pytest.mark.parametrize(
  "stage, message",
  [
    (
      lambda: comparisons.stage(data=comparisons.Data("outcome")),
      r"stage reward: train\[0\]: pairwise rows: expected 2 completions, found 1",
    ),
    (
      lambda: comparisons.stage("listwise", data=comparisons.Data("outcome")),
      r"stage reward: train\[0\]: listwise rows: expected at least 2 completions, found 1",
    ),
    (
      lambda: comparisons.stage("outcome", data=comparisons.Data("pairwise")),
      r"stage reward: train\[0\]: outcome rows: expected 1 completions, found 2",
    ),
    (
      lambda: comparisons.stage(stop=(EarlyStop("eval/spread", above=1.0),)),
      "stage reward: early stop: expected a metric among .*, found 'eval/spread'",
    ),
  ],
)
def test_what_cannot_be_trained_is_named(stage, message, tmp_path):
  with pytest.raises(ValueError, match=f"^{message}"):
    run(tmp_path, comparisons.experiment(stage()))
  assert not any(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"members": 0}, "stage reward: members: expected at least 1, found 0"),
    (
      {"objective": RewardObjective(bootstrap=True)},
      "stage reward: bootstrap: expected members > 1, found 1",
    ),
  ],
)
def test_bad_options_are_named(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    comparisons.stage(**changes)


def test_labels_outside_are_named():
  data = comparisons.data(tiny.ByteTokenizer(), kind="process")
  row = comparisons.rows("process", 1, 0)[0]
  group = data.encode(row)
  wrong = dataclasses.replace(data, encode=lambda _: group._replace(labels=(-1.0,)))
  with pytest.raises(ValueError, match=r"process rows: expected labels in 0\.\.1, found"):
    reward_model.checked(wrong, "process").encode(row)


def test_the_reward_is_read_where_a_rollout_ends():
  """What a template adds behind the token that closes the turn is cut off, with its labels."""
  data = comparisons.data(tiny.ByteTokenizer(), kind="process")
  row = comparisons.rows("process", 1, 0)[0]
  (completion,), (label,) = data.encode(row)[:2]
  longer = completion._replace(
    tokens=np.append(completion.tokens, [10, 10]), mask=np.append(completion.mask, [0, 0])
  )
  group = data.encode(row)._replace(completions=(longer,), labels=(np.append(label, [0, 0]),))
  got = reward_model.checked(dataclasses.replace(data, encode=lambda _: group), "process")
  np.testing.assert_array_equal(got.encode(row).completions[0].tokens, completion.tokens)
  np.testing.assert_array_equal(got.encode(row).labels[0], label)
