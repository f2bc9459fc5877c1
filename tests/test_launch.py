"""The command line: arguments are those of the config function, and a sweep is their grid."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import metadata

from launch import host, local, sweep
from pt_jax.data.pipeline import Layout
from pt_jax.experiment import MeshShape
from pt_jax.loops import record
from pt_jax.loops.pipeline import Finished
from tests.loops import tiny

TINY = "tests.loops.tiny"
FLAGS = "--xla_backend_optimization_level=0"  # as in conftest.py, and nothing about devices


@pytest.fixture(autouse=True)
def this_process(monkeypatch):
  """A run in this process leaves its devices and its memory as they are."""
  monkeypatch.setattr(host, "prepare", lambda *_: None)


def test_arguments_are_those_of_the_config_function():
  command = local.parse([TINY, "--lr", "3e-3", "--runs", "elsewhere", "--quiet"])
  assert command.arguments == {"lr": 3e-3, "steps": 12, "batch_size": 4, "seed": 0}
  assert (str(command.launch.runs), command.launch.quiet) == ("elsewhere", True)
  assert record.plain(command.experiment()) == record.plain(tiny.config(lr=3e-3))


def test_help_explains_every_argument(capsys):
  with pytest.raises(SystemExit) as caught:
    local.parse([TINY, "--help"])
  text = capsys.readouterr().out
  assert caught.value.code == 0
  for words in (
    "Words spelled backwards",
    "--lr FLOAT",
    "peak learning rate",
    "--batch-size",
    "--id",
  ):
    assert words in text


def test_an_unknown_argument_is_named(capsys):
  with pytest.raises(SystemExit) as caught:
    local.parse([TINY, "--learning-rate", "1"])
  assert caught.value.code == 2
  assert "--learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ([], "seed=0"),
    (["--lr", "0.02"], "seed=0"),  # the default
    (["--seed", "3", "--lr", "3e-5"], "lr=3e-05,seed=3"),
    (["--id", "mine", "--lr", "1"], "mine"),
  ],
)
def test_the_folder_is_named_by_what_differs(arguments, expected):
  assert local.parse([TINY, *arguments]).id == expected


def test_names_of_folders_are_plain_and_tell_arguments_apart():
  def function(*, path: str = "a", other: int = 0):
    """No seed here."""

  name = lambda **arguments: local.default_id(function, {"path": "a", "other": 0, **arguments})
  assert name() == "default"
  slash, dash = name(path="../data/x.jsonl"), name(path="..-data-x.jsonl")
  assert slash.startswith("path=x.jsonl-") and "/" not in slash
  assert slash != dash
  long = [name(path="x" * 200 + end) for end in "ab"]
  assert long[0] != long[1] and max(map(len, long)) < 120


@pytest.mark.parametrize(
  "argv, expected",
  [
    (
      ["tests.loops.tinny"],
      "error: experiment 'tests.loops.tinny': no such module; tests.loops has",
    ),
    (["nowhere"], "error: experiment 'nowhere': no such module\n"),
    ([f"{TINY}:confg"], "error: experiment 'tests.loops.tiny': expected a function 'confg' in it"),
    ([TINY, "--lr", "-1"], "error: optimizer: learning_rate and clip_norm must be positive"),
    ([TINY, "--batch-size", "0"], "error: batch_size must be at least 1, got 0"),
    ([TINY, "--id", "../x"], "error: run: expected a plain folder name, found '../x'"),
  ],
)
def test_errors_are_one_line(argv, expected, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert local.main(argv) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(expected)
  assert captured.err.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(capsys):
  assert local.main([TINY, "--lr", "-1", "--debug"]) == 2
  assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(local, "run_experiment", interrupt)
  assert local.main([TINY]) == 130
  assert "the same command goes on" in capsys.readouterr().err


def test_results_are_printed_as_a_table(capsys, monkeypatch, tmp_path):
  results = {"sft": {"steps": 2.0}, "grpo": {"eval/pass@1": 0.123456}}
  finished = Finished(tmp_path, results, None)
  monkeypatch.setattr(local, "run_experiment", lambda *_, **__: finished)
  assert local.main([TINY]) == 0
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["figure", "sft", "grpo"] in lines
  assert ["eval/pass@1", "0.1235"] in lines
  assert [str(tmp_path / "report.md")] in lines


def test_the_platform_is_left_alone_where_it_is_chosen(monkeypatch):
  before = jax.config.jax_platforms
  monkeypatch.setenv("JAX_PLATFORMS", "tpu")
  host.choose_platform()
  assert jax.config.jax_platforms == before


def test_an_accelerator_is_left_to_jax(monkeypatch):
  before = jax.config.jax_platforms
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(host, "ACCELERATORS", ("null",))  # /dev/null is there everywhere
  assert host.choose_platform() == ""
  assert jax.config.jax_platforms == before


@pytest.mark.skipif(
  any(Path("/dev", name).exists() for name in host.ACCELERATORS), reason="has an accelerator"
)
def test_without_an_accelerator_nobody_looks_for_a_tpu():
  """In a process of its own: libtpu, which compiles for TPUs, is not loaded and says nothing."""
  program = """
from pathlib import Path
from launch import host
chosen = host.choose_platform()
import jax
print(chosen, jax.default_backend(), "libtpu.so" in Path("/proc/self/maps").read_text())
"""
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  found = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
  )
  assert (found.stdout.split(), found.stderr) == (["cpu", "cpu", "False"], "")


@pytest.mark.parametrize(
  ("cores", "rows", "width", "expected"),
  [(2, 4, 16, 2), (8, 4, 16, 4), (6, 64, 64, 4), (16, 12, 16, 4), (8, 3, 16, 1), (16, 32, 6, 2)],
)
def test_a_cpu_has_as_many_devices_as_divide_the_batches(cores, rows, width, expected, monkeypatch):
  monkeypatch.setattr(host, "_cores", lambda: cores)
  model = dataclasses.replace(tiny.MODEL, width=width)
  stage = tiny.stage(layout=Layout(batch_size=2 * rows, row_length=32), microbatches=2)
  assert host.devices_for(tiny.experiment(stage, model=model)) == expected


@pytest.mark.parametrize(
  ("mesh", "expected"),
  [
    (MeshShape(tensor=2), 4),
    (MeshShape(tensor=8), 8),
    (MeshShape(data=2, context=3), 6),
    (MeshShape(expert=2), 4),
    (MeshShape(expert=4), 4),
    (MeshShape(data=1, tensor=-1), 1),
  ],
)
def test_a_mesh_that_says_its_size_gets_it(mesh, expected, monkeypatch):
  monkeypatch.setattr(host, "_cores", lambda: 4)
  assert host.devices_for(tiny.experiment(mesh=mesh)) == expected


def test_a_cpu_is_split_and_keeps_what_is_freed():
  """In a process of its own: 200 MB that are written, freed and written again are not faulted in
  twice. Without `use_cpu` they are, which the second run shows."""
  program = """
import resource, sys
import numpy as np
from launch import host
if sys.argv[1] == "prepared":
  host.use_cpu(2)
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = np.ones(25_000_000)
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
  del block
import jax
print(faults, len(jax.devices()))
"""
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
  options: Any = {"env": environment, "text": True, "capture_output": True, "check": True}
  run = lambda how: subprocess.run([sys.executable, "-c", program, how], **options)
  faults, devices = map(int, run("prepared").stdout.split())
  without, one = map(int, run("as it is").stdout.split())
  assert (devices, one) == (2, 1)
  assert faults < without / 10 and without > 100


def test_a_run_keeps_its_number_of_devices(tmp_path):
  """Chosen, then resumed by a process that would choose one; asked for and not to be had."""
  run = lambda *options, **environment: subprocess.run(
    [sys.executable, "-m", "launch.local", TINY, "--runs", tmp_path, "--quiet", *options],
    env=os.environ | {"XLA_FLAGS": FLAGS} | environment,
    text=True,
    capture_output=True,
  )
  counts = lambda: [
    environment["devices"]
    for environment in json.loads((tmp_path / "tiny" / "seed=0" / "config.json").read_text())[
      "environments"
    ]
  ]
  assert run("--cpu-devices", "2").returncode == 0
  assert counts() == [2]
  assert run().returncode == 0
  assert counts() == [2]
  flags = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=1"}
  refused = run("--cpu-devices", "4", **flags)
  assert refused.returncode == 2
  assert refused.stderr == "error: --cpu-devices: expected 4 CPU devices, found 1\n"
  assert counts() == [2]


def test_a_sweep_is_the_grid_of_its_arguments():
  options = sweep.read_options(["--lr", "1", "2", "--packed", "--seed=3"])
  assert options == {"--lr": ["1", "2"], "--packed": [], "--seed": ["3"]}
  assert sweep.grid(options) == [
    ["--lr", "1", "--packed", "--seed", "3"],
    ["--lr", "2", "--packed", "--seed", "3"],
  ]
  assert len(sweep.grid({"--lr": ["1", "2"], "--seed": ["0", "1", "2"]})) == 6


@pytest.mark.parametrize(
  "argv, expected",
  [
    (["--lr", "1", "--lr", "2"], "--lr: expected once with all its values"),
    (["3", "--lr", "1"], "expected --ARGUMENT before its values, found '3'"),
    (["--lr", "1e-2", "0.01"], "expected a folder for each run"),
  ],
)
def test_a_wrong_sweep_runs_nothing(argv, expected, capsys, monkeypatch):
  monkeypatch.setattr(sweep, "start", None)
  assert sweep.main([TINY, *argv]) == 2
  assert expected in capsys.readouterr().err


def test_a_sweep_compares_its_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sweep, "start", local.main)  # in this process, which has compiled it
  grid = ["--seed", "0", "1", "--runs", str(tmp_path), "--quiet"]
  assert sweep.main([TINY, *grid]) == 0
  folder = tmp_path / "tiny"
  assert {p.name for p in folder.iterdir() if p.is_dir()} == {"seed=0", "seed=1"}
  text = (folder / "report.md").read_text()
  for run in ("seed=0", "seed=1"):
    rows = (folder / run / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(r) for r in rows if "eval/accuracy" in r][-1]
    assert f"{last['eval/nats_per_token']:.4g}" in text
  assert _differing(folder) >= {"seed"}
  assert "learning_rate" not in " ".join(_differing(folder))


def test_a_run_that_fails_does_not_stop_the_sweep(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sweep, "start", lambda c: local.main(c) if "1" in c else 2)
  grid = ["--seed", "0", "1", "--runs", str(tmp_path), "--quiet"]
  assert sweep.main([TINY, *grid]) == 1
  assert "failed: tests.loops.tiny --seed 0" in capsys.readouterr().err
  assert "seed=1" in (tmp_path / "tiny" / "report.md").read_text()


def _differing(folder):
  """The arguments that TensorBoard's HPARAMS tab marks as different between the runs."""
  for event in EventFileLoader(str(folder / "events.out.tfevents.pt_jax")).Load():
    for value in event.summary.value:
      if value.tag == metadata.EXPERIMENT_TAG:
        parsed = metadata.parse_experiment_plugin_data(value.metadata.plugin_data.content)
        return {info.name for info in parsed.hparam_infos if info.differs}
  return set()
