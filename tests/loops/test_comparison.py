"""Several runs side by side: the table, the curves, what they cost."""

import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from pt_jax.loops import comparison, report
from pt_jax.loops.run import Run
from tests.loops.test_report import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  return [make_run(root, "a"), make_run(root, "b", lr=0.2), make_run(root, "c", warmup=5)]


def test_comparison(runs, tmp_path):
  folder = runs[0].parent
  path = comparison.write_comparison(folder, "Sweep", runs, ["grpo/reward", "sft/loss"])
  text = path.read_text()
  table = """
| run | train.lr | train.warmup | grpo/reward | sft/loss |
| --- | ---: | ---: | ---: | ---: |
| a | 0.1 |  | 0.6 | 0.06 |
| b | 0.2 |  | 0.6 | 0.06 |
| c | 0.1 | 5 | 0.6 | 0.06 |
"""
  assert table in text
  assert re.findall(r"!\[.*\]\((.*)\)", text) == ["compare_grpo_reward.png", "compare_sft_loss.png"]
  events = EventAccumulator(str(folder)).Reload()
  content = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
  experiment = metadata.parse_experiment_plugin_data(content)
  assert [info.name.tag for info in experiment.metric_infos] == ["grpo/reward", "sft/loss"]
  assert [i.name for i in experiment.hparam_infos if i.differs] == ["train.lr", "train.warmup"]
  with pytest.raises(ValueError, match="metric 'grpo/rewards': expected at least one run to have"):
    comparison.write_comparison(tmp_path / "new", "Sweep", runs, ["grpo/rewards"])
  assert not (tmp_path / "new").exists()


def test_a_comparison_draws_a_line_for_each_run(runs):
  series = {run.name: report.read_curves(run)["grpo"]["reward"] for run in runs}
  (axes,) = comparison.draw_comparison("grpo/reward", series).axes
  assert [line.get_label() for line in axes.get_lines()] == ["a", "b", "c"]
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("grpo step", "reward")
  assert len({line.get_color() for line in axes.get_lines()}) == 3


def online_run(root, id, config):
  with Run.open(root, "rl", id, config) as run:
    stage = run.stage("rl")
    for step in (1, 2, 3):
      stage.log(step, {"reward": step / 10, "rollout/tokens": 100.0 * step, "perf/step_seconds": 2})
    stage.log(3, {"eval/pass@1": 0.5 + len(config) / 100})
  return run.folder


def test_what_runs_cost(tmp_path):
  """Tokens are counted on, seconds added up; many differing fields have a table of their own."""
  many = {f"option{i}": i for i in range(13)}
  ids = ("algorithm=ppo,lr=0.1,seed=0-0123abcd", "algorithm=grpo,lr=0.1,seed=0-4567abcd")
  folders = [online_run(tmp_path, ids[0], many), online_run(tmp_path, ids[1], {"option0": 5})]
  text = comparison.write_comparison(
    tmp_path / "rl", "Sweep", folders, ["rl/eval/pass@1", "rl/reward"]
  ).read_text()
  assert f"| {ids[0]} | 0.63 | 0.3 | 300 | 6 |" in text
  assert "tokens sampled | seconds |" in text and "option3" not in text.split("##")[0]
  assert "| argument | ppo | grpo |" in text
  assert "| option0 | 0 | 5 |" in text


def test_single_values_are_bars():
  """In order of size, under the short names of the runs."""
  point = lambda value: (np.array([9]), np.array([value]))
  (axes,) = comparison.draw_comparison("a/b", {"x": point(2.0), "y": point(1.0)}).axes
  assert [bar.get_width() for bar in axes.patches] == [1.0, 2.0]
  assert [label.get_text() for label in axes.get_yticklabels()] == ["y", "x"]
  short = comparison.short_names(["a=1,b=2-0123abcd", "a=1,b=3-4567abcd", "a=1,b=3,c=0"])
  assert list(short.values()) == ["b=2", "b=3", "b=3,c=0"]
  assert comparison.short_names(["only"]) == {"only": "only"}
