"""Experiments of several stages: each starts from what the one before left, crash or not."""

import dataclasses
import json

import jax
import pytest

from pt_jax import metrics, sharding
from pt_jax.experiment import Supervised
from pt_jax.loops import pipeline
from pt_jax.models import hf
from tests.loops import tiny
from tests.loops.runs import Interrupted, bits, interrupted_at, logged, run

STAGES = (tiny.stage(name="first"), tiny.stage(name="second", sample_every=0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Two stages that nothing interrupted."""
  return run(tmp_path_factory.mktemp("whole"), tiny.experiment(*STAGES))


def evaluations(folder, stage):
  rows = metrics.read_jsonl(folder / "metrics.jsonl")
  return [r["eval/nats_per_token"] for r in rows if r["stage"] == stage and "eval/accuracy" in r]


def test_the_second_stage_starts_from_what_the_first_left(whole):
  first, second = (evaluations(whole.folder, stage.name) for stage in STAGES)
  assert second[0] == first[-1]
  assert second[-1] < second[0] < first[0]


def test_the_report_has_the_results_of_all_stages_and_pictures(whole):
  text = (whole.folder / "report.md").read_text()
  assert "| figure | first | second |" in text
  loss = whole.results["second"]["eval/nats_per_token"]
  assert f"{loss:.4g}" in text
  for picture in ("loss", "accuracy", "entropy", "samples"):
    assert f"({picture}.png)" in text
    assert (whole.folder / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
  config = json.loads((whole.folder / "config.json").read_text())["config"]
  assert config["stages"][0]["data"] == "tests.loops.tiny.data"


def test_interrupted_in_the_second_stage_the_first_is_not_run_again(whole, tmp_path, monkeypatch):
  experiment = tiny.experiment(*STAGES)
  with monkeypatch.context() as patch:
    interrupted_at(12 + 6, patch)
    with pytest.raises(Interrupted):
      run(tmp_path, experiment)
  started = []
  real = pipeline.run_supervised
  monkeypatch.setattr(
    pipeline, "run_supervised", lambda s, c: (started.append(s.name), real(s, c))[1]
  )
  resumed = run(tmp_path, experiment)
  assert started == ["second"]
  assert bits(resumed.params) == bits(whole.params)
  assert resumed.results == whole.results
  assert logged(resumed.folder) == logged(whole.folder)


def test_a_finished_experiment_gives_its_results_again(whole, monkeypatch):
  monkeypatch.setattr(pipeline, "run_supervised", None)  # whatever calls it fails
  before = logged(whole.folder)
  again = run(whole.folder.parents[1], tiny.experiment(*STAGES))
  assert bits(again.params) == bits(whole.params)
  assert again.results == whole.results
  assert logged(again.folder) == before


def test_it_starts_from_a_checkpoint_in_hf_format(whole, tmp_path):
  with jax.set_mesh(sharding.make_mesh()):
    hf.save(tmp_path / "model", whole.params, tiny.MODEL)
  assert hf.read_config(tmp_path / "model") == tiny.MODEL
  changes = {"model": None, "checkpoint": str(tmp_path / "model")}
  run(tmp_path, tiny.experiment(STAGES[1], **changes))
  start = evaluations(tmp_path / "tiny" / "0", "second")[0]
  assert start == evaluations(whole.folder, "second")[-1]


def test_a_stage_starts_from_the_one_it_names(tmp_path):
  """Three stages; the third from the first: it repeats the second bit for bit."""
  first, second = tiny.stage(name="first"), tiny.stage(name="second")
  other = tiny.stage(name="third", start="first")
  finished = run(tmp_path, tiny.experiment(first, second, other))
  assert finished.results["second"] == finished.results["third"]
  assert finished.results["first"] != finished.results["second"]


def test_an_unknown_start_is_named():
  message = r"stage sft: start: expected a stage before it, one of \[\], found 'x'"
  with pytest.raises(ValueError, match=message):
    tiny.experiment(tiny.stage(start="x"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aside(Supervised):
  """A stage that leaves something else than a policy, as a reward model is."""

  leaves_policy = False


def test_no_stage_starts_from_one_that_leaves_no_policy(tmp_path):
  first, third = tiny.stage(name="first"), tiny.stage(name="third", sample_every=0)
  aside = Aside(**{f.name: getattr(first, f.name) for f in dataclasses.fields(first)})
  aside = dataclasses.replace(aside, name="second")
  finished = run(tmp_path, tiny.experiment(first, aside, third))
  assert finished.results["second"] != finished.results["first"]
  assert (
    evaluations(finished.folder, "third")[0]
    == evaluations(finished.folder, "second")[0]
    == evaluations(finished.folder, "first")[-1]
  )
  ended = run(tmp_path, tiny.experiment(first, aside), id="1")
  assert ended.results == {name: finished.results[name] for name in ("first", "second")}
  run(tmp_path, tiny.experiment(first), id="2")
  again = run(tmp_path, tiny.experiment(first), id="2")
  assert bits(ended.params) == bits(again.params)
  message = r"stage third: start: expected a stage before it, one of \['first'\], found 'second'"
  with pytest.raises(ValueError, match=message):
    tiny.experiment(first, aside, dataclasses.replace(third, start="second"))
