"""Reports: the numbers in the tables, the lines in the pictures, the samples that are shown."""

import re

import numpy as np
import pytest
from PIL import Image

from pt_jax.loops import report
from pt_jax.loops.run import Run


def make_run(root, id, **config):
  with Run.open(root, "quick", id, {"model": "tiny", "train": {"lr": 0.1, **config}}) as run:
    for step in range(1, 51):
      run.stage("sft").log(step, {"loss": 3 / step, "perf/tokens_per_second": 100.0})
    stage = run.stage("grpo")
    for step in (2, 4, 6):
      rewards = {"reward": step / 10, "reward/correct": step / 20, "reward/format": 1.0}
      stage.log(step, {"loss": 0.0, **rewards, "stop/token": 0.75, "stop/length": 0.25})
      stage.samples(
        step,
        [{"prompt": f"p{step}", "completion": f"c{step}.{i}", "reward": 0.5} for i in range(5)],
      )
  return run.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  return [make_run(root, "a"), make_run(root, "b", lr=0.2), make_run(root, "c", warmup=5)]


def test_report(runs):
  rows = [{"stage": "SFT", "pass@1": 0.123456}, {"stage": "GR|PO", "pass@1": None, "tokens": 12345}]
  path = report.write_report(runs[0], "Quickstart", rows)
  text = path.read_text()
  assert path == runs[0] / "report.md" and text.startswith("# Quickstart\n\n`quick/a` · ")
  table = """
| stage | pass@1 | tokens |
| --- | ---: | ---: |
| SFT | 0.1235 |  |
| GR\\|PO |  | 12345 |
"""
  assert table in text
  pictures = re.findall(r"!\[.*\]\((.*)\)", text)
  assert pictures == ["loss.png", "reward.png", "stop.png", "speed.png"]  # only what was logged
  for picture in pictures:
    with Image.open(runs[0] / picture) as image:
      assert image.format == "PNG" and len(image.convert("L").getcolors()) > 20  # not blank
  assert re.findall("## Samples: (.*)", text) == ["grpo, step 2", "grpo, step 6"]
  assert [c in text for c in ("c2.1", "c2.2", "c4.0", "c6.0")] == [True, False, False, True]
  assert "| train.lr | 0.1 |" in text


def test_curves_are_those_that_were_logged(runs):
  curves = report.read_curves(runs[0])
  assert list(curves) == ["sft", "grpo"]
  np.testing.assert_array_equal(curves["sft"]["loss"][0], np.arange(1, 51))
  np.testing.assert_array_equal(curves["sft"]["loss"][1], 3 / np.arange(1, 51))
  pictures = {picture.name: picture for picture in report.PICTURES}
  assert report.draw(pictures["kl"], curves) is None
  loss = report.draw(pictures["loss"], curves)
  assert [axes.get_xlabel() for axes in loss.axes] == ["sft step", "grpo step"]
  raw, mean = loss.axes[0].get_lines()  # 50 points: thin, and their running mean
  np.testing.assert_array_equal(raw.get_ydata(), 3 / np.arange(1, 51))
  assert (raw.get_alpha(), mean.get_label()) == (0.3, "loss")
  (axes,) = report.draw(pictures["reward"], curves).axes
  assert axes.get_ylabel() == "mean per completion"
  labels = [line.get_label() for line in axes.get_lines()]
  assert labels == ["reward", "reward/correct", "reward/format"]
  (axes,) = report.draw(pictures["stop"], curves).axes
  assert axes.get_ylim() == (0, 1)
  assert axes.get_legend_handles_labels()[1] == ["token", "length"]  # without what they share


def test_a_stage_that_only_evaluates_is_where_the_next_one_begins():
  point = lambda *pairs: tuple(np.array(x, float) for x in zip(*pairs))
  curves = {
    "sft": {"eval/accuracy": point((0, 0.1), (9, 0.8))},
    "cold_start": {"eval/pass@1": point((0, 0.25)), "eval/greedy": point((0, 0.5))},
    "grpo": {"eval/pass@1": point((5, 0.5), (8, 0.75)), "eval/greedy": point((5, 0.6), (8, 0.9))},
    "end": {"eval/pass@1": point((0, 0.75))},
    "other": {"eval/pass@1": point((0, 0.5))},
  }
  picture = next(p for p in report.PICTURES if p.name == "accuracy")
  figure = report.draw(picture, curves)
  assert [axes.get_xlabel().removesuffix(" step") for axes in figure.axes] == [
    "sft",
    "grpo",
    "end",
    "other",
  ]
  lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].get_lines()}
  assert lines == {
    "pass@1": [[0, 0.25], [5, 0.5], [8, 0.75]],
    "greedy": [[0, 0.5], [5, 0.6], [8, 0.9]],
  }
  assert figure.axes[2].get_xlim() == (-1, 1)


def test_running_mean():
  values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
  expected = [1.5, 1.5, 3.0, 5.0, 5.0]  # of the three around each, NaN left out, two at the ends
  np.testing.assert_allclose(report.running_mean(values), expected)
  noise = np.random.default_rng(0).normal(size=600)
  window = np.array([noise[max(0, i - 20) : i + 21].mean() for i in range(600)])
  np.testing.assert_allclose(report.running_mean(noise), window, atol=1e-12)
  assert np.isnan(report.running_mean(np.full(3, np.nan))).all()
