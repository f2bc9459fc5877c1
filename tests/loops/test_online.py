"""The online loop on a model of 16 letters: it learns, says what it did, resumes bit for bit."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from pt_jax import metrics
from pt_jax.experiment import Evaluate
from pt_jax.loops import online, pipeline, prompts, rollouts
from pt_jax.losses import objective
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rollout import engine
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from tests.loops import letters
from tests.loops.runs import Interrupted, bits, logged, run

PLACES = {"stage", "step"}


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Reports have tests of their own; drawing one takes longer than these runs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """20 steps of GRPO that nothing interrupted."""
  return run(tmp_path_factory.mktemp("whole"), letters.experiment())


def rows_of(finished, name="loss"):
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
  real, calls = online._Loop._learn, iter(range(1, 1000))

  def learn(self, *args):
    if next(calls) == step:
      raise Interrupted
    return real(self, *args)

  monkeypatch.setattr(online._Loop, "_learn", learn)


def begin(folder, experiment, steps):
  """The rows that an experiment logs in its first steps. The programs are those of the whole."""
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
    crash_at(patch, steps + 1)
    run(folder, experiment)
  rows = metrics.read_jsonl(folder / "letters" / "0" / "metrics.jsonl")
  return [row for row in rows if "loss" in row]


def test_it_learns(whole):
  rewards = [row["reward"] for row in rows_of(whole)]
  assert [row["step"] for row in rows_of(whole)] == [*range(1, 21)]
  assert np.mean(rewards[:2]) < 0.6 and np.mean(rewards[-5:]) > 1.3  # of 1.5
  held_out = rows_of(whole, "eval/pass@1")
  assert [row["step"] for row in held_out] == [8, 16, 20]
  assert held_out[-1]["eval/pass@1"] > 0.9 and held_out[-1]["eval/greedy"] > 0.9
  assert whole.results["rl"] == {k: v for k, v in held_out[-1].items() if k not in PLACES}


def test_rollout_logprobs_are_the_trainers_after_every_update(whole):
  gaps = [row["rollout/logprob_gap_max"] for row in rows_of(whole)]
  print(f"largest gap of {len(gaps)} updates {max(gaps):.2e}")
  assert len(gaps) == 20 and max(gaps) <= 1e-4
  assert all(
    row["rollout/logprob_gap_mean"] <= row["rollout/logprob_gap_max"] + 1e-9
    for row in rows_of(whole)
  )


def test_the_gap_shows_an_engine_whose_weights_are_old(tmp_path, monkeypatch):
  real = engine.Engine.update
  monkeypatch.setattr(engine.Engine, "update", lambda *a: real(*a) if a[-1] == 0 else None)
  rows = begin(tmp_path, letters.experiment(), 5)
  gaps = [row["rollout/logprob_gap_max"] for row in rows]
  assert gaps[0] <= 1e-4 and min(gaps[1:]) > 1e-2


def test_what_is_logged(whole):
  policy = "approx_kl clip_fraction clip_fraction_low clip_fraction_high entropy ratio surrogate"
  stops = {f"stop/{reason.name.lower()}" for reason in StopReason}
  rewards = {"reward", "reward/correct", "reward/share", "length/mean", "length/max"}
  rollout = "logprob_gap_max logprob_gap_mean logprob_gap_kl zero_variance groups_drawn groups_kept"
  expected = {f"policy/{name}" for name in policy.split()} | stops | rewards
  expected |= {f"rollout/{name}" for name in rollout.split()} | {"loss", "optimizer/grad_norm"}
  for row in rows_of(whole):
    assert expected <= row.keys()
    assert sum(row[name] for name in stops) == pytest.approx(1)
    assert row["reward"] == pytest.approx(row["reward/correct"] + 0.5 * row["reward/share"])
    assert row["policy/ratio"] == 1 and row["policy/clip_fraction"] == 0  # one update a step
    assert 0 <= row["policy/entropy"] <= math.log(16) + 1e-5
  for row in rows_of(whole, "eval/pass@1"):
    assert {f"eval/{name}" for name in stops | rewards} <= row.keys()
  assert rows_of(whole)[0]["policy/entropy"] > 2 * rows_of(whole)[-1]["policy/entropy"]


def test_samples_are_of_training_problems(whole):
  rows = metrics.read_jsonl(whole.folder / "samples.jsonl")
  assert [row["step"] for row in rows] == [step for step in range(1, 21) for _ in range(2)]
  trained = {problem.id for problem in letters.Words(60)}
  assert {row["problem"] for row in rows} <= trained and len({row["problem"] for row in rows}) > 20
  for row in rows:
    correct, share = "a" in row["completion"], row["completion"].count("a")
    expected = correct + 0.5 * share / max(len(row["completion"]), 1)
    assert row["reward"] == pytest.approx(expected)


def test_every_epoch_of_prompts_has_its_own_order():
  stream = prompts.Prompts(letters.Words(10), seed=3)
  drawn = [[problem.id for problem in stream.take(n)] for n in (4, 4, 4, 8)]
  flat = [name for part in drawn for name in part]
  first, second = flat[:10], flat[10:]
  assert sorted(first) == sorted(second) == sorted(p.id for p in letters.Words(10))
  assert first != second
  resumed = prompts.Prompts(letters.Words(10), seed=3)
  resumed.drawn = 8
  assert [p.id for p in resumed.take(4)] == drawn[2]


def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, monkeypatch):
  # Checkpoints are behind every third step: the crashes come before the first, right behind one,
  # after steps that are lost, and in the last step.
  for step in (2, 7, 1, 6, 8):
    with monkeypatch.context() as patch:
      crash_at(patch, step)
      with pytest.raises(Interrupted):
        run(tmp_path, letters.experiment())
  resumed = run(tmp_path, letters.experiment())
  assert bits(resumed.params) == bits(whole.params)
  assert logged(resumed.folder) == logged(whole.folder)
  assert resumed.results == whole.results
  name = "samples.jsonl"
  assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_another_seed_is_another_run(whole, tmp_path):
  other, ours = begin(tmp_path, letters.experiment(seed=1), 2), rows_of(whole)
  for name in ("loss", "reward", "policy/entropy"):
    assert [row[name] for row in other] != [row[name] for row in ours[:2]]


def third(completion):
  """1 for an early letter at the start, where the problem's number divides by three."""
  number = int(completion.problem.id.split("/")[1])
  return float(number % 3 == 0 and completion.text[:1] in ("a", "b", "c", "d"))


def sparse_rewards():
  return RewardStack([Component("correct", 1.0, third)])


def hopeless_rewards():
  return RewardStack([Component("correct", 1.0, lambda completion: 0.0)])


DAPO = {"objective": objective.dapo(max_length=8, buffer=6), "steps": 3, "lr": 1e-3}


def test_dapo_draws_again_and_punishes_length(tmp_path, monkeypatch):
  """Two of three problems are hopeless: their groups have equal rewards and are replaced."""
  learned = recorded(monkeypatch, online._Loop, "_learn")
  credits = recorded(monkeypatch, online, "assign_credit")
  stage = letters.stage(**DAPO, rewards=sparse_rewards, resample_limit=10)
  rows = rows_of(run(tmp_path, letters.experiment(stage)))
  assert len(rows) == len(learned) == len(credits) == 3
  for row in rows:
    assert row["rollout/groups_drawn"] in range(8, 41, 4)
    assert 4 <= row["rollout/groups_kept"] < row["rollout/groups_drawn"]
    assert row["rollout/zero_variance"] == 0
  for ((_, _, judged, *_), _), ((episodes,), credit) in zip(learned, credits):
    problems = [c.problem.id for c in judged.completions]
    assert len(problems) == 32 and len(np.unique(judged.groups)) == 4
    for group in np.unique(judged.groups):
      place = np.flatnonzero(judged.groups == group)
      assert len(place) == 8 and len({problems[i] for i in place}) == 1
      assert np.ptp(judged.rewards.total[place]) > 0
      # Eq. 13: nothing up to 8 - 6 tokens, then a sixth a token. Eq. 9: mean and std of the group.
      lengths = np.array([judged.completions[i].tokens for i in place])
      rewards = judged.rewards.total[place] - np.maximum(lengths - 2, 0) / 6
      expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
      np.testing.assert_allclose(credit.rewards[place], rewards, atol=1e-6)
      spread = expected[:, None] * episodes.mask[place]
      np.testing.assert_allclose(credit.advantages[place], spread, rtol=1e-4, atol=1e-5)


def test_dynamic_sampling_ends_where_nothing_can_be_kept(tmp_path):
  stage = letters.stage(**DAPO, rewards=hopeless_rewards, resample_limit=2)
  (row,) = begin(tmp_path, letters.experiment(stage), 1)
  assert (row["rollout/groups_drawn"], row["rollout/groups_kept"]) == (8, 0)
  assert row["rollout/zero_variance"] == 1


def test_epochs_minibatches_reference_and_truncated(tmp_path, monkeypatch):
  """Old log-probs are those before the first of four updates; the reference never moves."""
  updates = recorded(monkeypatch, online._Loop, "_update_policy")
  packed = recorded(monkeypatch, rollouts.Packed, "fields")
  credits = recorded(monkeypatch, online, "assign_credit")
  before, batches, make = [], [], online._Loop._scored

  def scored(loop, batch):
    before.append(jax.device_get(loop.state.params))
    batches.append((loop, make(loop, batch)))
    return batches[-1][1]

  monkeypatch.setattr(online._Loop, "_scored", scored)
  algorithm = dataclasses.replace(
    objective.grpo(),
    kl=objective.Kl(0.01, estimator="k3"),
    filters=objective.Filters(truncated=True),
  )
  sampling = SamplingParams(max_tokens=8, stop_tokens=(*range(10, 16),))  # most end in time
  options = {"epochs": 2, "minibatches": 2, "objective": algorithm, "sampling": sampling}
  stage = letters.stage(steps=3, lr=0.01, evaluate_problems=8, **options)
  finished = run(tmp_path, letters.experiment(stage))
  measured = [[{k: float(v) for k, v in m.items()} for m in result] for _, result in updates]
  assert [len(step) for step in measured] == [4, 4, 4]
  for step in measured:
    assert step[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(step[0]["policy/approx_kl"]) < 1e-6
    assert all(m["policy/approx_kl"] > 1e-6 for m in step[1:])
    assert all(m["rollout/logprob_gap_max"] <= 1e-4 for m in step)  # old against sampler
  assert measured[0][0]["policy/kl"] == pytest.approx(0, abs=1e-6)
  assert all(m["policy/kl"] > 1e-6 for m in measured[0][1:] + measured[1] + measured[2])
  loop, last = batches[-1]
  place = lambda x, like: jax.device_put(x, like.sharding)
  with jax.set_mesh(loop.context.mesh):
    params = jax.tree.map(place, before[0], loop.state.params)
    np.testing.assert_array_equal(last.reference_logprobs, loop._score(params, last))
  for row, step in zip(rows_of(finished), measured):  # logged: the mean of the updates
    mean = np.mean([m["policy/kl"] for m in step])
    assert row["policy/kl"] == pytest.approx(mean, rel=1e-5)
  cut = trained = 0
  for (pack, credit), fields in packed:
    assert len(credit.trained) == 16  # two groups of eight, whole: tests/loops/test_rollouts.py
    assert fields["mask"].sum() == (pack.drawn & credit.trained[:, None]).sum()
    cut, trained = cut + (~credit.trained).sum(), trained + credit.trained.sum()
  for (episodes,), credit in credits:
    assert (np.diff(episodes.groups) >= 0).all() and len(np.unique(episodes.groups)) == 4
    np.testing.assert_array_equal(credit.trained, ~episodes.truncated)
  assert cut > 0 and trained > 0


def nan_from(monkeypatch, step):
  """Advantages are NaN from this step on, as a reward model or an overflow would make them."""
  real, calls = online.assign_credit, iter(range(1, 1000))

  def assign_credit(*args, **options):
    credit = real(*args, **options)
    bad = next(calls) >= step
    return dataclasses.replace(credit, advantages=credit.advantages * (np.nan if bad else 1))

  monkeypatch.setattr(online, "assign_credit", assign_credit)


@pytest.mark.parametrize("step", [4, 6])
def test_a_loss_that_is_nan_stops_before_the_checkpoint(tmp_path, monkeypatch, step):
  """Checkpoints are behind steps 3 and 6: of 4 it shows one step later, of 6 at the checkpoint."""
  nan_from(monkeypatch, step)
  with pytest.raises(
    ValueError, match=rf"^stage rl: step {step}: metric .*: expected a finite num"
  ):
    run(tmp_path, letters.experiment())
  folder = tmp_path / "letters" / "0"
  assert [path.name for path in (folder / "checkpoints" / "rl").iterdir()] == ["3"]
  assert not (folder / "params").exists()
  logged_rows = metrics.read_jsonl(folder / "metrics.jsonl")
  assert [row["step"] for row in logged_rows] == [*range(1, step)]
  assert all(math.isfinite(row["loss"]) for row in logged_rows)


def test_evaluation_stages(tmp_path):
  """pass@1 and reward are means over the held-out problems; nothing is trained between the two."""
  make = lambda name: Evaluate(
    name, letters.problems, letters.rewards, letters.SAMPLING, count=16, slots=8
  )
  finished = run(tmp_path, letters.experiment(make("first"), make("second")))
  first, second = rows_of(finished, "eval/pass@1")
  samples = metrics.read_jsonl(finished.folder / "samples.jsonl")
  shown = [row for row in samples if row["stage"] == "first"]
  assert [row["problem"] for row in shown] == [problem.id for problem in letters.Words(16, 100)]
  assert first["eval/pass@1"] == np.mean(["a" in row["completion"] for row in shown])
  assert first["eval/reward"] == pytest.approx(np.mean([row["reward"] for row in shown]))
  assert finished.results["first"] == {k: v for k, v in first.items() if k not in PLACES}
  assert first["eval/greedy"] == second["eval/greedy"]


def no_correct():
  return RewardStack([Component("share", 1.0, letters.share_of_a)])


def long_problems(tokenizer):
  """The last word of 60 does not fit."""
  made = letters.problems(tokenizer)
  encode = lambda p: [1] * (12 if p.id == "word/59" else 2)
  return dataclasses.replace(made, encode=encode)


def test_a_prompt_that_is_too_long_is_named(tmp_path):
  stage = letters.stage(problems=long_problems)
  message = r"stage rl: problem word/59: expected 1 to 8 tokens \(8 of 16 are .*\), found 12"
  with pytest.raises(ValueError, match=f"^{message}$"):
    run(tmp_path, letters.experiment(stage))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rewards": no_correct}, "stage rl: expected a reward component named 'correct'"),
    ({"evaluate_problems": 17}, "stage rl: held-out problems: expected .*17, found 16"),
    ({"row_length": 8}, "stage rl: problem word/0: expected 1 to 0 tokens"),
  ],
)
def test_stages_that_cannot_run(tmp_path, changes, message):
  with pytest.raises(ValueError, match=rf"^{message}") as error:
    run(tmp_path, letters.experiment(letters.stage(**changes)))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"optimizer": letters.AdamW(0.1, steps=7)}, "optimizer.steps is 7, expected 20"),
    ({"minibatches": 3}, "minibatches (3) must divide prompts (4)"),
    ({"group_size": 0}, "group_size must be positive"),
    ({"resample_limit": 0}, "resample_limit must be positive"),
  ],
)
def test_stages_that_contradict_themselves(changes, message):
  with pytest.raises(ValueError) as error:
    letters.stage(**changes)
  assert str(error.value).startswith(f"stage rl: {message}")
