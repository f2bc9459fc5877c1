"""Runs that are made to fail: each mode is recognised before the run is over, and a run that goes
well raises none."""

import pytest

from pt_jax import metrics
from pt_jax.loops import pipeline
from pt_jax.loops.diagnose import PREFIX, diagnose
from pt_jax.loops.report import read_curves
from tests.loops import failing
from tests.loops.runs import run

MODES = {  # mode: the stage that provokes it
  "kl_explosion": "kl_explosion",
  "reward_collapse": "reward_collapse",
  "length_drift": "paid by length",
  "entropy_collapse": "entropy_collapse",
  "format_collapse": "paid by length",
  "value_overfit": "value_overfit",
  "gradient_vacuum": "gradient_vacuum",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """All stages, once."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield run(tmp_path_factory.mktemp("failing"), failing.experiment())


@pytest.fixture(scope="module")
def found(finished):
  """{stage: {mode: the step at which it was recognised, during the run}}."""
  stages = {stage.name: {} for stage in failing.experiment().stages}
  for row in metrics.read_jsonl(finished.folder / "metrics.jsonl"):
    modes = [name.removeprefix(PREFIX) for name in row if name.startswith(PREFIX)]
    stages[row["stage"]] |= dict.fromkeys(modes, row["step"])
  return stages


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_fails_is_recognised_before_its_end(found, mode):
  modes = found[MODES[mode]]
  print(f"{mode}: recognised at step {modes.get(mode)} of {failing.STEPS}")
  assert modes[mode] < failing.STEPS


@pytest.mark.parametrize("stage", ["healthy", "healthy_ppo"])
def test_a_run_that_goes_well_raises_nothing(finished, found, stage):
  assert found[stage] == {}
  rewards = read_curves(finished.folder)[stage]["reward"][1]
  assert stage != "healthy" or rewards[-3:].mean() > 1.5 * rewards[:3].mean()  # it learned


def test_afterwards_the_logs_say_the_same(finished, found):
  for stage, curves in read_curves(finished.folder).items():
    assert {finding.name: finding.step for finding in diagnose(curves)} == found[stage]
