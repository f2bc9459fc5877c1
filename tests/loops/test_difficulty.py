"""Difficulty: a curriculum follows a learner that is made up, problems outside the band of pass
rates are not trained on, and both go on after a crash as if there had been none."""

import dataclasses
import json
import math

import numpy as np
import pytest

from pt_jax import metrics
from pt_jax.data.tasks import Problem
from pt_jax.experiment import Curriculum, PassRate, Problems
from pt_jax.loops import difficulty, online, pipeline
from pt_jax.loops.difficulty import Levels
from pt_jax.loops.prompts import Prompts
from pt_jax.rewards.stack import Component, RewardStack
from tests.loops import letters
from tests.loops.runs import Interrupted, bits, logged, run

COUNT = 8  # problems per step of the made-up learner


@dataclasses.dataclass(frozen=True)
class Repeats(letters.Words):
  """Words whose right answers hold so many "a"."""

  need: int = 1

  def problem(self, index: int) -> Problem:
    made = super().problem(index)
    return dataclasses.replace(made, id=f"{self.need}/{index}", metadata={"need": self.need})


LADDER = [Repeats(20, need=need) for need in range(6)]


def level_of(problem):
  return problem.metadata["need"]


def simulate(options, skills, *, seed=0, levels=LADDER, stream=None):
  """A learner who solves a problem of level n with the probability 1 / (1 + exp(3 (n - skill))),
  8 completions each. Returns the logged rows, the problems, and the expected rate of each step."""
  stream = stream or Levels(levels, options, seed)
  rows, drawn, expected = [], [], []
  for step, skill in enumerate(skills):
    problems = stream.take(COUNT)
    chance = [1 / (1 + math.exp(3 * (level_of(p) - skill))) for p in problems]
    rates = np.random.default_rng((seed, step)).binomial(8, chance) / 8
    rows.append(stream.update(rates.tolist()))
    drawn += [problem.id for problem in problems]
    expected.append(float(np.mean(chance)))
  return rows, drawn, np.array(expected)


BAND = Curriculum(low=0.3, high=0.8, window=24)


def test_the_solve_rate_stays_in_the_band_while_skill_grows_and_falls():
  up = np.linspace(0, 5, 240)
  rows, _, expected = simulate(BAND, [*up, *up[::-1]])
  level = np.array([row["difficulty/level"] for row in rows])
  assert level[0] == 0 and level[230] >= 4 and level[-1] <= 1  # it rises, and falls again
  assert set(np.unique(level)) == {0, 1, 2, 3, 4, 5}
  assert np.abs(np.diff(level)).max() == 1
  inside = (expected > BAND.low - 0.1) & (expected < BAND.high + 0.1)
  print(f"solve rate in the band at {inside.mean():.3f} of the steps")
  assert inside.mean() > 0.85
  # Fixed problems, by contrast, are soon all solved, or not at all:
  for fixed in (0, 5):
    alone = dataclasses.replace(BAND, first=fixed, window=10**6)
    _, _, expected = simulate(alone, [*up, *up[::-1]])
    assert ((expected > 0.2) & (expected < 0.9)).mean() < 0.4


def test_a_steady_learner_stays_on_a_level():
  """Of skill 2.2: level 2 is solved at 0.65, in the middle of the band."""
  rows, _, _ = simulate(dataclasses.replace(BAND, first=2), [2.2] * 100)
  assert {row["difficulty/level"] for row in rows} == {2}


def rates_given(stream, *rates):
  """The levels after steps of two problems that were solved so often."""
  levels = []
  for rate in rates:
    stream.take(2)
    stream.update([rate, rate])
    levels.append(stream.level)
  return levels


def test_when_the_level_moves():
  """By hand; the window is 4 problems, 2 steps."""
  options = Curriculum(low=0.25, high=0.75, window=4)
  new = lambda **changes: Levels(LADDER, dataclasses.replace(options, **changes), 0)
  assert rates_given(new(), 1, 1, 1, 1) == [0, 1, 1, 2]  # a new level is judged by its own rates
  assert rates_given(new(), 0.5, 1, 1) == [0, 0, 1]  # 0.75 is not over the band
  assert rates_given(new(first=2), 0, 0, 0, 0, 0, 0) == [2, 1, 1, 0, 0, 0]  # there is none below
  assert rates_given(new(first=5), 1, 1, 1) == [5, 5, 5]  # nor above
  assert rates_given(new(patience=2), 1, 1, 1) == [0, 0, 1]
  assert rates_given(new(patience=2, first=1), 1, 1, 0, 0, 0) == [1, 1, 1, 1, 0]
  stream = new()
  assert rates_given(stream, 1, 1) == [0, 1]
  stream.take(2)
  assert stream.update([0.5, 1]) == {"difficulty/level": 1.0, "difficulty/solve_rate": 0.75}
  with pytest.raises(ValueError, match="solve rates: expected 0, found 1"):
    stream.update([1.0])


def test_neighbours_have_their_shares():
  options = Curriculum(below=0.2, above=0.3, first=2, window=10**6)
  for first, expected in (
    (2, {1: 0.2, 2: 0.5, 3: 0.3}),
    (0, {0: 0.7, 1: 0.3}),
    (5, {4: 0.2, 5: 0.8}),
  ):
    stream = Levels(LADDER, dataclasses.replace(options, first=first), 0)
    found = [level_of(problem) for problem in stream.take(4000)]
    for level, share in expected.items():
      assert np.mean(np.array(found) == level) == pytest.approx(share, abs=0.03)
    assert set(found) == set(expected)
  stream = Levels(LADDER, options, 0)  # the neighbours' rates do not count
  levels = [level_of(problem) for problem in stream.take(50)]
  assert stream.update([float(n == 2) for n in levels])["difficulty/solve_rate"] == 1


MIXED = dataclasses.replace(BAND, below=0.2, above=0.1, patience=2)


@pytest.mark.parametrize("at", [1, 37, 100])
def test_a_state_goes_through_json_and_goes_on_exactly(at):
  skills = np.linspace(0, 4, 140)
  rows, drawn, _ = simulate(MIXED, skills)
  stream = Levels(LADDER, MIXED, 0)
  simulate(MIXED, skills[:at], stream=stream)
  resumed = Levels(LADDER, MIXED, 0)
  resumed.set_state(json.loads(json.dumps(stream.state())))
  more = [problem.id for problem in resumed.take(COUNT)]
  assert more == drawn[at * COUNT : (at + 1) * COUNT]
  assert resumed.level == rows[at]["difficulty/level"]
  assert resumed.take(100) == [*stream.take(COUNT + 100)][COUNT:]


@pytest.mark.parametrize(
  "changes",
  [
    {"low": 0.6},
    {"high": 0.5},
    {"first": 1},
    {"window": 8},
    {"patience": 5},
    {"below": 0.3},
    {"above": 0.3},
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_a_curriculum_changes_what_is_drawn(changes):
  skills = [*np.linspace(0, 3, 60), *np.linspace(3, 0, 60)]
  assert simulate(dataclasses.replace(BAND, **changes), skills)[1] != simulate(BAND, skills)[1]
  names = {"low", "high", "first", "window", "patience", "below", "above"}
  assert {field.name for field in dataclasses.fields(Curriculum)} == names


def test_another_seed_is_another_order_of_the_same_problems():
  drawn = [Levels(LADDER, BAND, seed).take(20) for seed in (0, 1)]
  assert drawn[0] != drawn[1]
  assert {p.id for p in drawn[0]} == {p.id for p in drawn[1]} == {p.id for p in LADDER[0]}


def test_problems_that_are_kept():
  stream = Prompts(letters.Words(60), 0)
  stream.keep([3, 5, 8])
  drawn = [problem.id for problem in stream.take(9)]
  for epoch in range(3):
    assert sorted(drawn[3 * epoch : 3 * epoch + 3]) == ["word/3", "word/5", "word/8"]
  resumed = Prompts(letters.Words(60), 0)
  resumed.set_state(json.loads(json.dumps(stream.state())))
  assert resumed.take(5) == stream.take(5)
  assert stream.update([0.5] * 14) == {}


class Answers:
  """Stands for judged completions: word i is solved i % 5 times of 4."""

  def __init__(self, problems):
    right = [int(p.id.split("/")[1]) % 5 for p in problems]
    scores = np.array([float(j < n) for n in right for j in range(4)])
    self.groups = np.repeat(np.arange(len(problems)), 4)
    self.rewards = type("Rewards", (), {"components": {"correct": scores}})


def test_pass_rates(monkeypatch):
  task, calls = letters.Words(60), []

  def answer(problems, call):
    calls.append((len(problems), call))
    return Answers(problems)

  monkeypatch.setattr(difficulty, "CHUNK", 25)
  tried, rates = difficulty.pass_rates(task, PassRate(), 0, answer)
  assert calls == [(25, 0), (25, 1), (10, 2)]
  np.testing.assert_array_equal(tried, np.arange(60))
  np.testing.assert_array_equal(rates, np.arange(60) % 5 / 4)
  keep = lambda low, high: difficulty.within(PassRate(low, high), tried, rates)
  np.testing.assert_array_equal(keep(0.1, 0.9), [i for i in range(60) if i % 5 in (1, 2, 3)])
  np.testing.assert_array_equal(keep(0.25, 0.5), [i for i in range(60) if i % 5 in (1, 2)])
  with pytest.raises(ValueError, match=r"rate in 0.3..0.4, found none of 60: 24 below, 36 above$"):
    keep(0.3, 0.4)
  some, rates = difficulty.pass_rates(task, PassRate(problems=7), 0, answer)
  assert len(set(some.tolist())) == 7 and (np.diff(some) > 0).all()
  np.testing.assert_array_equal(rates, some % 5 / 4)
  other, _ = difficulty.pass_rates(task, PassRate(problems=7), 1, answer)
  assert some.tolist() != other.tolist()
  assert len(difficulty.pass_rates(task, PassRate(problems=99), 0, answer)[0]) == 60


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Curriculum(low=0.8, high=0.8), "curriculum: expected 0 <= low < high <= 1, found low"),
    (lambda: Curriculum(high=1.1), "curriculum: expected 0 <= low < high <= 1"),
    (lambda: Curriculum(first=-1), "curriculum: first: expected at least 0, found -1"),
    (lambda: Curriculum(window=0), "curriculum: window: expected at least 1, found 0"),
    (lambda: Curriculum(patience=0), "curriculum: patience: expected at least 1, found 0"),
    (lambda: Curriculum(below=0.5, above=0.5), "curriculum: expected shares below and above"),
    (lambda: PassRate(low=0.9, high=0.1), "pass_rate: expected 0 <= low <= high <= 1"),
    (lambda: PassRate(samples=0), "pass_rate: samples: expected at least 1, found 0"),
    (lambda: PassRate(problems=0), "pass_rate: problems: expected at least 1, found 0"),
    (
      lambda: letters.stage(curriculum=Curriculum(), pass_rate=PassRate()),
      "stage rl: curriculum and pass_rate: expected one of them, found both",
    ),
  ],
)
def test_options_that_cannot_be(make, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    make()


# On real runs.


@pytest.fixture(autouse=True, scope="module")
def no_report():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


def problems(tokenizer):
  """Three levels of 20 words; 60 easy ones for those who use no levels."""
  encode = lambda p: tokenizer.encode(p.prompt)
  levels = [Repeats(20, need=need) for need in (1, 3, 5)]
  return Problems(letters.Words(60), letters.Words(16, first=100), encode, levels)


def enough(completion):
  """1 for as many "a" as are asked for."""
  return float(completion.text.count("a") >= completion.problem.metadata.get("need", 1))


def rewards():
  shaped = Component("share", 0.2, letters.share_of_a)
  return RewardStack([Component("correct", 1.0, enough), shaped])


CLIMB = {
  "problems": problems,
  "rewards": rewards,
  "curriculum": Curriculum(low=0.2, high=0.7, window=4, below=0.25),
  "steps": 10,
  "evaluate_every": 0,
}
SIFT = {"pass_rate": PassRate(low=0.2, high=0.6, samples=4), "steps": 6, "evaluate_every": 0}


def die_at(patch, step):
  """The run dies where it would make its `step`-th set of updates from now."""
  real, calls = online._Loop._learn, iter(range(1, 1000))

  def learn(self, *args):
    if next(calls) == step:
      raise Interrupted
    return real(self, *args)

  patch.setattr(online._Loop, "_learn", learn)


def interrupted(folder, experiment, steps):
  """The run of an experiment that dies before each of these steps, counted from the last resume."""
  for step in steps:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
      die_at(patch, step)
      run(folder, experiment)
  return run(folder, experiment)


def assert_same(resumed, whole):
  assert bits(resumed.params) == bits(whole.params)
  assert logged(resumed.folder) == logged(whole.folder)
  samples = [metrics.read_jsonl(run.folder / "samples.jsonl") for run in (resumed, whole)]
  assert samples[0] == samples[1]


def test_a_run_climbs_its_levels_and_resumes_bit_for_bit(tmp_path):
  made = letters.experiment(letters.stage(**CLIMB))
  whole = run(tmp_path / "whole", made)
  rows = [r for r in metrics.read_jsonl(whole.folder / "metrics.jsonl") if "loss" in r]
  level = [row["difficulty/level"] for row in rows]
  assert level[0] == 0 and level[-1] == 2 and sorted(level) == level
  assert all(0 <= row["difficulty/solve_rate"] <= 1 for row in rows if row["step"] > 1)
  samples = metrics.read_jsonl(whole.folder / "samples.jsonl")
  asked = {step: {row["problem"][0] for row in samples if row["step"] == step} for step in (1, 10)}
  assert asked[1] == {"1"} and asked[10] <= {"3", "5"}
  assert_same(interrupted(tmp_path / "killed", made, (2, 5, 3)), whole)


def test_a_run_trains_on_the_problems_in_the_band_and_resumes_bit_for_bit(tmp_path, monkeypatch):
  made = letters.experiment(letters.stage(**SIFT))
  whole = run(tmp_path / "whole", made)
  first = metrics.read_jsonl(whole.folder / "metrics.jsonl")[0]
  assert first["step"] == 0 and first["difficulty/tried"] == 60
  assert 0 < first["difficulty/kept"] < 60 and 0 < first["difficulty/pass_rate"] < 1
  measured, real = [], difficulty.pass_rates

  def pass_rates(*args):
    measured.append(real(*args))
    return measured[-1]

  monkeypatch.setattr(difficulty, "pass_rates", pass_rates)
  resumed = interrupted(tmp_path / "killed", made, (1, 5, 1))  # before a checkpoint, then behind 3
  assert_same(resumed, whole)
  assert len(measured) == 2  # the second run had no checkpoint to read them from, the others had
  tried, rates = measured[0]
  kept = {f"word/{i}" for i, rate in zip(tried, rates) if 0.2 <= rate <= 0.6}
  assert len(kept) == first["difficulty/kept"]
  assert first["difficulty/pass_rate"] == pytest.approx(rates.mean())
  assert set(4 * rates) >= {0, 1, 2} and set(4 * rates) <= {0, 1, 2, 3, 4}  # four samples of each
  trained = {row["problem"] for row in metrics.read_jsonl(whole.folder / "samples.jsonl")}
  assert trained <= kept


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"problems": letters.problems}, "curriculum: expected at least 2 levels of problems, found 0"),
    ({"curriculum": Curriculum(first=3)}, "curriculum: expected at least 4 levels .*, found 3"),
  ],
)
def test_a_curriculum_without_its_levels(tmp_path, changes, message):
  with pytest.raises(ValueError, match=f"^stage rl: {message}"):
    run(tmp_path, letters.experiment(letters.stage(**(CLIMB | changes))))
  assert not list(tmp_path.iterdir())
