"""Diagnosis on histories made by hand: every mode, what comes near it, and runs that are well."""

import dataclasses
import json
import re
import time

import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import experiment, metrics
from pt_jax.loops import diagnose as diagnosis
from pt_jax.loops import report
from pt_jax.loops.diagnose import NOT_FINITE, RULES, Rule, Watch, diagnose
from pt_jax.loops.run import Run
from pt_jax.losses import objective, options
from pt_jax.rollout import rollouts
from pt_jax.steps import optimizer

STEPS = 40


def line(*points):
  """40 values, straight between (step, value) points, noise of 2 %."""
  steps, values = zip(*points)
  noise = 1 + 0.02 * np.random.default_rng(len(points)).normal(size=STEPS)
  return np.interp(np.arange(1, STEPS + 1), steps, values) * noise


def history(**metrics):
  """{metric: (steps, values)}; "__" stands for "/". A number is a constant, a tuple `line`s."""
  made = {}
  for name, given in metrics.items():
    values = line(*given) if isinstance(given, tuple) else np.full(STEPS, float(given))
    made[name.replace("__", "/")] = np.arange(1, STEPS + 1), values
  return made


def healthy(rng, steps):
  """What a run of reinforcement learning that goes well logs, with the noise of 32 completions."""
  progress = 1 - np.exp(-np.arange(steps) / (steps / 4))
  right = 0.2 + 0.65 * progress
  noisy = lambda mean, std: mean + std * rng.normal(size=steps)
  correct = rng.binomial(32, right) / 32
  formatted = rng.binomial(32, 0.5 + 0.48 * progress) / 32
  values = {
    "reward": correct + 0.1 * formatted,
    "reward/correct": correct,
    "reward/format": formatted,
    "length/mean": noisy(20 + 15 * progress, 2),
    "stop/length": rng.binomial(32, 0.02 + 0.05 * progress) / 32,
    "policy/entropy": np.exp(noisy(np.log(0.15) - 1.8 * progress, 0.2)),
    "policy/kl": np.abs(noisy(0.05 * progress, 0.02)),
    "policy/approx_kl": np.abs(noisy(0.01, 0.01)),
    "rollout/zero_variance": np.clip(noisy(0.6 * progress, 0.1), 0, 1),
    "rollout/groups_drawn": np.full(steps, 8.0),
    "rollout/groups_kept": np.full(steps, 8.0),
    "rollout/logprob_gap_mean": np.abs(noisy(0.008, 0.002)),
    "optimizer/grad_norm": np.exp(noisy(-1, 0.5)),
    "critic/explained_variance": noisy(0.1 + 0.5 * progress, 0.15),
    "critic/explained_variance_after": noisy(0.3 + 0.4 * progress, 0.1),
    "critic/loss": np.abs(noisy(0.1, 0.05)),
  }
  return {name: (np.arange(1, steps + 1), one) for name, one in values.items()}


SAMPLED = np.array([0, 5, 10, 15, 20, 25])  # steps


def sampled(formats, outputs, leakage):
  """What supervised training logs of its samples."""
  columns = {"format_diversity": formats, "distinct_outputs": outputs, "template_leakage": leakage}
  return {f"samples/{name}": (SAMPLED, np.array(values)) for name, values in columns.items()}


FALLING = (0.9, 0.8, 0.3, 0.2, 0.1, 0.1)
FLAT = (0.5,) * 6
NONE = (0.0,) * 6
UP = ((1, 0.3), (15, 0.8), (40, 0.9))
EXPLAINED = {"critic__explained_variance_after": ((1, 0.3), (8, 0.9), (40, 0.95))}

FAILURES = {
  "kl to the reference": ("kl_explosion", history(policy__kl=((1, 0), (15, 0.1), (25, 4)))),
  "kl beyond the entropy": (
    "kl_explosion",
    history(policy__kl=((1, 0), (10, 0.5), (30, 9)), policy__entropy=2.0),
  ),
  "kl within a step": ("kl_explosion", history(policy__approx_kl=((1, 0.01), (10, 0.02), (15, 1)))),
  "reward lost": ("reward_collapse", history(reward=((1, 0.2), (20, 0.8), (30, 0.1)))),
  "negative reward": ("reward_collapse", history(reward=((1, -3), (20, -1), (30, -4)))),
  "cut": (
    "length_drift",
    history(length__mean=((1, 100), (30, 180)), stop__length=((1, 0.05), (30, 0.9)), reward=UP),
  ),
  "longer for nothing": (
    "length_drift",
    history(length__mean=((1, 100), (30, 300)), reward__correct=0.4, reward=UP),
  ),
  "shorter and worse": (
    "length_drift",
    history(length__mean=((1, 100), (30, 20)), reward__correct=((1, 0.6), (30, 0.3))),
  ),
  "certain and wrong": (
    "entropy_collapse",
    history(policy__entropy=((1, 1.0), (20, 0.01)), reward__correct=0.3),
  ),
  "certain, no task known": ("entropy_collapse", history(policy__entropy=((1, 1.0), (20, 0.01)))),
  "format lost": (
    "format_collapse",
    history(reward__answer_format=((1, 0.3), (12, 0.9), (25, 0.1))),
  ),
  "samples repeat": ("format_collapse", sampled(FALLING, FALLING, NONE)),
  "template leaks": ("format_collapse", sampled(FLAT, FLAT, (0, 0, 0.1, 0.3, 0.5, 0.6))),
  "critic memorises from a bad start": (
    "value_overfit",
    history(critic__explained_variance=((1, -5), (4, -1), (12, -0.2)), **EXPLAINED),
  ),
  "critic memorises": ("value_overfit", history(critic__explained_variance=-0.3, **EXPLAINED)),
  "all solved": (
    "gradient_vacuum",
    history(rollout__zero_variance=((1, 0.3), (20, 1)), reward__correct=0.98),
  ),
  "none solved": ("gradient_vacuum", history(rollout__zero_variance=1.0, reward__correct=0.0)),
  "none kept": ("gradient_vacuum", history(rollout__groups_kept=1, rollout__groups_drawn=32)),
  "another policy": ("rollout_mismatch", history(rollout__logprob_gap_mean=0.2)),
}

NEAR_MISSES = {
  "kl that sharpening explains": history(policy__kl=((1, 0), (30, 3.0)), policy__entropy=2.0),
  "kl that was there": history(policy__kl=2.0),
  "kl of one bad step": history(policy__kl=((1, 0), (19, 0), (20, 30), (21, 0))),
  "steps of a PPO": history(policy__approx_kl=0.03),
  "reward that dips": history(reward=((1, 0.2), (20, 0.8), (23, 0.3), (26, 0.8), (40, 0.8))),
  "reward that loses a third": history(reward=((1, 0.2), (20, 0.8), (30, 0.55))),
  "longer and better": history(length__mean=((1, 100), (30, 300)), reward__correct=UP),
  "always cut": history(length__mean=((1, 100), (40, 110)), stop__length=0.9, reward=UP),
  "shorter and as good": history(length__mean=((1, 100), (30, 20)), reward__correct=0.6),
  "certain and right": history(
    policy__entropy=((1, 1.0), (20, 0.01)), reward__correct=((1, 0.3), (15, 0.97))
  ),
  "entropy of a healthy run": history(policy__entropy=((1, 0.15), (20, 0.02)), reward__correct=UP),
  "a format that was never kept": history(reward__format=((1, 0.05), (12, 0.08), (25, 0.0))),
  "one format for many answers": sampled(FALLING, FLAT, NONE),
  "a leak that was there": sampled(FLAT, FLAT, FLAT),
  "a critic that still learns": history(
    critic__explained_variance=((1, -5), (4, 0.1), (12, 0.3)), **EXPLAINED
  ),
  "a small gap": history(
    critic__explained_variance=0.6, critic__explained_variance_after=((1, 0.5), (8, 0.9))
  ),
  "half a batch": history(rollout__zero_variance=0.6, reward__correct=0.9),
  "single samples with a critic": history(rollout__zero_variance=1.0, critic__loss=0.1),
  "dynamic sampling": history(rollout__groups_kept=8, rollout__groups_drawn=32),
  "bfloat16": history(rollout__logprob_gap_mean=0.012),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case):
  mode, given = FAILURES[case]
  (finding,) = diagnose(given)
  assert finding.name == mode and finding.step in range(6, STEPS)  # well before the end
  metrics = [name for name in given if name in finding.evidence]
  assert metrics and "\n" not in finding.evidence + finding.advice and finding.advice


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case):
  assert diagnose(NEAR_MISSES[case]) == []


def test_every_rule_has_a_case():
  """Each rule alone finds some case, so each would be missed."""
  for rule in RULES:
    if rule.name == "gradient_spikes":
      continue  # below
    found = 0
    for mode, given in FAILURES.values():
      found += mode == rule.name and [f.name for f in watched(given, (rule,))] == [mode]
    assert found, rule


def watched(given, rules=RULES):
  """Findings of a watch that is fed row by row."""
  watch = Watch(rules)
  new = []
  for step in np.unique(np.concatenate([steps for steps, _ in given.values()])):
    row = {n: float(v[s == step][0]) for n, (s, v) in given.items() if step in s}
    new += watch.update(int(step), row)
  assert new == watch.findings
  return new


@pytest.mark.parametrize("steps", [20, 60, 400])
def test_healthy_runs_have_no_finding(steps):
  for seed in range(30):
    assert diagnose(healthy(np.random.default_rng(seed), steps)) == []


def test_noise_alone_is_no_finding():
  """A task that is hardly ever solved: means of 32 completions at 3 %, and a judge's scores."""
  for seed in range(30):
    rng = np.random.default_rng(seed)
    steps = np.arange(1, 401)
    rare, scores = rng.binomial(32, 0.03, 400) / 32, 0.1 * rng.normal(size=400)
    for values in (rare, scores):
      given = {"reward": (steps, values), "reward/format": (steps, rare)}
      assert diagnose(given) == []


@pytest.mark.parametrize("case", ["reward lost", "certain and wrong", "format lost", "all solved"])
def test_failures_show_through_a_healthy_run(case):
  mode, given = FAILURES[case]
  run = healthy(np.random.default_rng(3), STEPS)
  run = {name: series for name, series in run.items() if not name.startswith("critic/")}
  assert mode in [finding.name for finding in diagnose(run | given)]


def test_the_step_and_the_numbers():
  """By hand: levels are medians of 5. Of 0.8 up to step 20 and 0.1 behind it the median is 0.1 from
  step 23 on, and has been so five times at step 27."""
  values = np.where(np.arange(1, STEPS + 1) <= 20, 0.8, 0.1)
  (finding,) = diagnose({"reward": (np.arange(1, STEPS + 1), values)})
  assert (finding.name, finding.step) == ("reward_collapse", 27)
  assert finding.evidence == "reward 0.8 (step 5) -> 0.1 (steps 23-27)"
  assert str(finding).startswith("step 27: reward_collapse: reward 0.8 (step 5) -> 0.1")
  for bad in (3, 4, 5, 6):  # steps that are bad
    values = np.where((np.arange(STEPS) >= 20) & (np.arange(STEPS) < 20 + bad), 0.1, 0.8)
    assert len(diagnose({"reward": (np.arange(1, STEPS + 1), values)})) == (bad >= 5)


def test_a_value_that_is_not_finite():
  given = history(loss=1.0, optimizer__grad_norm=0.1)
  given["optimizer/grad_norm"][1][6] = np.nan
  (finding,) = diagnose(given)
  assert (finding.name, finding.step) == ("not_finite", 7)
  assert "optimizer/grad_norm" in finding.evidence


def test_gradient_spikes():
  given = history(optimizer__grad_norm=0.5)
  norms = given["optimizer/grad_norm"][1]
  norms[[15, 20]] = 20.0
  assert diagnose(given) == []
  norms[24] = 6.0
  (finding,) = diagnose(given)
  assert (finding.name, finding.step) == ("gradient_spikes", 25) and "3 times" in finding.evidence
  norms[[15, 20, 24]] = 0.9  # ten times nothing is still small
  norms[norms == 0.5] = 0.01
  assert diagnose(given) == []


def test_each_mode_is_reported_once():
  both = FAILURES["cut"][1] | FAILURES["longer for nothing"][1]
  assert [finding.name for finding in diagnose(both)] == ["length_drift"]


def test_row_by_row_is_the_whole_history():
  for _, given in FAILURES.values():
    assert watched(given) == diagnose(given)
  first = json.loads(json.dumps([dataclasses.asdict(f) for f in diagnose(given)]))
  assert first and set(first[0]) == {"name", "step", "evidence", "advice"}


def test_another_level_of_difficulty_begins_anew():
  """Harder problems make rewards fall: that is no collapse. A fall on one level is."""
  _, given = FAILURES["reward lost"]
  level = np.where(np.arange(STEPS) < 19, 0.0, 1.0)
  steps = np.arange(1, STEPS + 1)
  assert [f.name for f in diagnose(given | {"difficulty/level": (steps, 0 * level)})]
  step_down = {"reward": (steps, np.where(level > 0, 0.1, 0.8))}
  assert diagnose(step_down | {"difficulty/level": (steps, level)}) == []
  assert diagnose(step_down) != []


def test_what_is_kept_does_not_grow_and_rows_are_cheap():
  watch = Watch()
  given = healthy(np.random.default_rng(0), 2000)
  rows = [{name: float(values[i]) for name, (_, values) in given.items()} for i in range(2000)]
  sizes = []
  started = time.perf_counter()
  for i, row in enumerate(rows):
    watch.update(i + 1, row)
    if i + 1 in (100, 2000):
      sizes.append(sum(len(series.values) for series in watch._seen.values()))
  assert sizes[0] == sizes[1]
  assert (time.perf_counter() - started) / 2000 < 0.005  # measured 0.0002 s


def test_a_rule_of_ones_own():
  slow = Rule(
    "slow", "perf/seconds", lambda seen, m: seen[m].moved() * (seen[m].recent > 9), "wait"
  )
  given = {"perf/seconds": (np.arange(1, 21), np.full(20, 10.0))}
  (finding,) = watched(given, (slow,))
  assert (finding.name, finding.step, finding.advice) == ("slow", 5, "wait")
  assert diagnose(given) == []


def test_advice_names_options_that_there_are():
  homes = (experiment, objective, options, optimizer, rollouts)
  named = {
    name for rule in (*RULES, NOT_FINITE) for name in re.findall(r"[A-Z]\w+\.\w+", rule.advice)
  }
  assert len(named) > 10
  for name in named:
    owner, field = name.split(".")
    (found,) = {getattr(home, owner) for home in homes if hasattr(home, owner)}
    assert field in {f.name for f in dataclasses.fields(found)}, name


def test_what_a_finding_is_logged_as():
  (finding,) = diagnose(FAILURES["reward lost"][1])
  assert diagnosis.logged([finding]) == {"diagnosis/reward_collapse": 1.0}
  assert Watch().update(1, {"diagnosis/reward_collapse": float("nan")}) == []


def train(folder, steps, *, save_at=None):
  """A run that logs a reward that collapses behind step 20, from where its checkpoint is; what was
  told, and the folder."""
  told = []
  with Run.open(folder, "made", "0", {}) as run:
    stage = run.stage("rl")
    stage.tell = told.append
    state = {"x": jnp.zeros(1)}
    saved = stage.restore(state)
    for step in range(saved.step + 1 if saved else 1, steps + 1):
      stage.log(step, {"reward": 0.8 if step <= 20 else 0.1, "length/mean": 10})
      if step == save_at:
        stage.save(step, state, {})
  return told, run.folder


def test_within_a_run_a_finding_is_told_and_logged_once(tmp_path):
  told, folder = train(tmp_path, 40)
  (line,) = told
  assert line.startswith("step 27: reward_collapse: reward 0.8") and "\n" not in line
  rows = metrics.read_jsonl(folder / "metrics.jsonl")
  assert [r["step"] for r in rows if "diagnosis/reward_collapse" in r] == [27]
  events = (folder / metrics.EVENTS).read_bytes()
  assert events.count(b"rl/diagnosis/reward_collapse") == 1
  (finding,) = diagnose(report.read_curves(folder)["rl"])
  assert str(finding) == line


@pytest.mark.parametrize("save_at, killed_at", [(22, 25), (22, 30), (26, 26), (28, 33)])
def test_a_resumed_run_has_the_findings_of_one_that_was_not_killed(tmp_path, save_at, killed_at):
  _, whole = train(tmp_path / "whole", 40)
  first, _ = train(tmp_path / "killed", killed_at, save_at=save_at)
  second, folder = train(tmp_path / "killed", 40)
  name = "metrics.jsonl"
  assert (folder / name).read_bytes() == (whole / name).read_bytes()
  assert len(first) == (killed_at >= 27) and len(second) == (save_at < 27)


def test_the_report_has_what_was_found_or_that_nothing_was(tmp_path):
  _, folder = train(tmp_path, 40)
  text = report.write_report(folder, "A run", [], ()).read_text()
  section = text.split("## Diagnosis")[1].split("##")[0]
  row = "| rl | reward_collapse | 27 | reward 0.8 (step 5) -> 0.1 (steps 23-27) | go back to the"
  assert row in section
  _, folder = train(tmp_path / "short", 20)
  assert "## Diagnosis\n\nNothing found.\n" in report.write_report(folder, "B", [], ()).read_text()
