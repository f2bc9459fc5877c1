"""A run folder: what is in it, what opening it again gives, what it refuses."""

import dataclasses
import enum
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from pt_jax import metrics
from pt_jax.loops import record
from pt_jax.loops.run import Run

REPOSITORY = Path(__file__).parents[2]


class Kind(enum.Enum):
  FAST = 1


@dataclasses.dataclass(frozen=True)
class Train:
  lr: float = 1e-3
  kind: Kind = Kind.FAST
  betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Config:
  train: Train = Train()
  data: Path = Path("data/train.jsonl")
  reward: object = json.dumps
  seed: int = 0


def like(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def snapshot(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_config_is_recorded_plainly(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  data = tmp_path / "data" / "train.jsonl"
  data.parent.mkdir()
  data.touch()
  config = {
    "a": Config(data=data),
    "text": str(data),
    "tag": "/answer",
    "partial": functools.partial(json.dumps, indent=np.int64(2)),
    "dtype": np.dtype("float32"),
    "runs": [{"n": 1}, {"n": 2}],
    "none": None,
  }
  with Run.open("runs", "sft", "seed0", config):
    pass
  text = (tmp_path / "runs" / "sft" / "seed0" / "config.json").read_text()
  assert str(tmp_path) not in text  # no path of this machine
  assert json.loads(text)["config"] == {
    "a": {
      "train": {"lr": 0.001, "kind": "FAST", "betas": [0.9, 0.95]},
      "data": "data/train.jsonl",
      "reward": "json.dumps",
      "seed": 0,
    },
    "text": "data/train.jsonl",
    "tag": "/answer",
    "partial": {"function": "json.dumps", "indent": 2},
    "dtype": "float32",
    "runs": [{"n": 1}, {"n": 2}],
    "none": None,
  }
  flat = record.read_config("runs/sft/seed0")
  assert (flat["a.train.lr"], flat["a.train.betas"], flat["runs.1.n"]) == (0.001, [0.9, 0.95], 2)


def test_the_environment_is_recorded(tmp_path):
  with Run.open(tmp_path, "sft", "0", {}) as run:
    (here,) = json.loads((run.folder / "config.json").read_text())["environments"]
  assert here["versions"]["jax"] == jax.__version__
  assert (here["platform"], here["devices"], here["processes"]) == ("cpu", jax.device_count(), 1)
  head = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
  )
  if head.returncode == 0:
    assert re.fullmatch("[0-9a-f]{40}", here["commit"]) and here["commit"] == head.stdout.strip()


def test_a_config_that_cannot_be_recorded(tmp_path):
  with pytest.raises(
    ValueError, match=r"config.train.x: expected a value that config.json can hold"
  ):
    Run.open(tmp_path / "runs", "sft", "0", {"train": {"x": object()}})
  assert not list(tmp_path.iterdir())


def test_another_config_is_refused(tmp_path):
  with Run.open(tmp_path, "sft", "0", Config()) as run:
    run.stage("sft").log(1, {"loss": 1.0})
  before = snapshot(tmp_path)
  changed = Config(train=Train(lr=2e-3))
  where = re.escape(str(tmp_path / "sft" / "0" / "config.json"))
  with pytest.raises(
    ValueError, match=rf"^{where}: train.lr: recorded 0.001, given 0.002; another"
  ):
    Run.open(tmp_path, "sft", "0", changed)
  with pytest.raises(ValueError, match=r"seed: recorded 0, given nothing"):
    Run.open(tmp_path, "sft", "0", {k: v for k, v in vars(Config()).items() if k != "seed"})
  with pytest.raises(ValueError, match=r"train.lr: recorded"):
    Run.open(tmp_path, "sft", "0", changed, may_differ=["trai", "train.l", "seed"])
  assert snapshot(tmp_path) == before
  with Run.open(tmp_path, "sft", "0", changed, may_differ=["train"]) as run:
    assert record.read_config(run.folder)["train.lr"] == 0.002


@pytest.mark.parametrize("part", ["", ".", "..", "a/b", ".hidden"])
def test_names_are_plain(tmp_path, part):
  for name, id in ((part, "0"), ("sft", part)):
    with pytest.raises(ValueError, match="run: expected a plain folder name, found"):
      Run.open(tmp_path, name, id, {})
  assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_left_alone(tmp_path):
  folder = tmp_path / "sft" / "0"
  folder.mkdir(parents=True)
  (folder / "thesis.tex").write_text("mine")
  before = snapshot(tmp_path)
  with pytest.raises(ValueError, match=r"0: expected a run or nothing, found 'thesis.tex'"):
    Run.open(tmp_path, "sft", "0", {})
  assert snapshot(tmp_path) == before


def test_one_writer_at_a_time(tmp_path):
  with Run.open(tmp_path, "sft", "0", {}):
    before = snapshot(tmp_path)
    with pytest.raises(
      ValueError, match=r"0: expected a free run, found another process writing it"
    ):
      Run.open(tmp_path, "sft", "0", {})
    assert snapshot(tmp_path) == before
  with Run.open(tmp_path, "sft", "0", {}):
    pass
  with pytest.raises(RuntimeError), Run.open(tmp_path, "sft", "0", {}):
    raise RuntimeError  # a loop that fails frees the run too
  Run.open(tmp_path, "sft", "0", {}).close(succeeded=True)


def test_other_processes_of_a_pod_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with Run.open(tmp_path / "runs", "sft", "0", Config()) as run:
    run.stage("sft").log(1, {"loss": 1.0})
    run.stage("sft").samples(1, [{"completion": "a"}])
  assert not list(tmp_path.iterdir())


def test_a_cut_log_is_found_before_anything_is_written(tmp_path):
  with Run.open(tmp_path, "sft", "0", {}) as run:
    stage = run.stage("sft")
    stage.log(1, {"loss": 1.0})
    stage.save(1, {"w": jnp.ones(2)}, {})
  log = tmp_path / "sft" / "0" / metrics.METRICS
  log.write_bytes(log.read_bytes()[:-1])
  before = snapshot(tmp_path)
  with pytest.raises(ValueError, match=r"metrics.jsonl: the checkpoint expects \d+ bytes, found"):
    Run.open(tmp_path, "sft", "0", {})
  assert snapshot(tmp_path) == before


# Two stages of 6 steps, a checkpoint every 2, each starting from the result of the one before.
PIPELINE = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from pt_jax.loops.run import Run

def loop(stage, state, steps, beats):
  saved = stage.restore(state)
  state, start = (saved.state, saved.step) if saved else (state, 0)
  unseeded = np.random.default_rng()
  for step in range(start + 1, steps + 1):
    noise_of_step = jax.random.normal(jax.random.fold_in(state["key"], step))
    state = {**state, "w": state["w"] * 1.5 + noise_of_step}
    stage.log(step, {"loss": state["w"].mean(), "perf/seconds": unseeded.uniform()})
    stage.samples(step, [{"completion": "x" * step}])
    stage.histogram(step, "w", state["w"])
    beats(stage.name)
    if step % 2 == 0:
      stage.save(step, state, {"rows": step * 7})
      beats(stage.name)
  stage.log(steps + 1, {"eval/loss": state["w"].sum()})
  beats(stage.name)
  return state["w"]

def main(root, kill_at):
  count = [0]
  def beats(where):
    count[0] += 1
    if count[0] == kill_at:
      print(where, flush=True)
      os.kill(os.getpid(), signal.SIGKILL)
  with Run.open(root, "pipeline", "0", {"steps": 6}) as run:
    params = jnp.ones(3)
    for name in ("sft", "grpo"):
      stage = run.stage(name)
      if stage.finished:
        params = stage.params(params)
        continue
      params = loop(stage, {"w": params, "key": jax.random.key(1)}, 6, beats)
      stage.finish(params)
      beats(f"{name} finished")

if __name__ == "__main__":
  for kill_at in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
      main(sys.argv[1], kill_at)
      os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if kill_at else 0), status
"""


def run_pipeline(root, *kills):
  """Runs the pipeline again and again, killed after so many beats each time (0: never); says where.

  One child of this process forks the runs, so that Python and JAX are imported once; it touches no
  device before.
  """
  command = [sys.executable, "-c", PIPELINE, root, *map(str, kills)]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=True
  )
  return done.stdout.splitlines()


def outcome(root):
  """Everything a run leaves behind but wall times and metrics under perf/."""
  folder = root / "pipeline" / "0"
  events = []
  for event in EventFileLoader(str(folder / metrics.EVENTS)).Load():
    event.wall_time = 0
    for value in event.summary.value:
      if "/perf/" in value.tag:
        value.tensor.Clear()
      if value.tag.startswith("_hparams_"):  # holds the time
        value.metadata.Clear()
    events.append(event.SerializeToString(deterministic=True))
  rows = [
    {k: v for k, v in row.items() if not k.startswith("perf/")}
    for row in metrics.read_jsonl(folder / metrics.METRICS)
  ]
  with Run.open(root, "pipeline", "0", {"steps": 6}) as run:
    leaf = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.ones(3).sharding)
    params = [np.asarray(run.stage(name).params(leaf)).tobytes() for name in ("sft", "grpo")]
  return {
    "events": events,
    "rows": rows,
    "samples": (folder / metrics.SAMPLES).read_bytes(),
    "params": params,
  }


def test_killed_anywhere_ends_like_never_killed(tmp_path):
  run_pipeline(tmp_path / "whole", 0)
  where = run_pipeline(tmp_path / "killed", 1, 5, 3, 8, 4, 2, 3, 11, 4, 2, 0)
  # How far each gets depends on whether the background had written the checkpoint by then.
  assert len(where) >= 7 and {"sft", "grpo"} <= set(where), where
  whole, resumed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
  assert [(row["stage"], row["step"]) for row in whole["rows"]] == [
    (stage, step) for stage in ("sft", "grpo") for step in range(1, 8)
  ]
  assert len(whole["events"]) == 3 + 2 * (6 * 3 + 1)  # version, session start and end; the stages
  for what, found in resumed.items():
    assert found == whole[what], what
