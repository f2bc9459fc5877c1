"""Two processes joined by `jax.distributed` train to the losses of one, through the real loop."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from pt_jax.metrics import read_jsonl

REPOSITORY = pathlib.Path(__file__).parent.parent
SECONDS = 200
FLAGS = "--xla_backend_optimization_level=0"  # as in conftest.py, with devices of each its own


def start(*arguments, devices=1):
  """A process with CPU devices of its own; gloo carries what crosses to the other one."""
  return subprocess.Popen(
    [sys.executable, "-m", "tests.distributed_sft", *map(str, arguments)],
    cwd=REPOSITORY,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(processes) -> list[str]:
  """The last line of each; kills all of them when one is late."""
  try:
    outputs = [process.communicate(timeout=SECONDS) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert all(process.returncode == 0 for process in processes), outputs
  return [out.splitlines()[-1] for out, _ in outputs]


def logged(runs) -> list[dict]:
  """The metrics of every step and evaluation, without what a clock measured."""
  rows = read_jsonl(runs / "tiny" / "0" / "metrics.jsonl")
  numbers = lambda row: {k: v for k, v in row.items() if not k.startswith(("perf/", "stage"))}
  return [numbers(row) for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Metrics of one process with one device."""
  runs = tmp_path_factory.mktemp("alone")
  assert finish([start(runs, 1)]) == ["1 1 1"]
  return logged(runs)


@pytest.mark.parametrize(("zero", "devices"), [(1, 1), (3, 2)])
def test_two_processes_train_to_the_losses_of_one(alone, tmp_path, zero, devices):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  pair = [start(tmp_path, zero, port, 2, index, devices=devices) for index in range(2)]
  assert finish(pair) == [f"2 {devices} {2 * devices}"] * 2
  together = logged(tmp_path)
  assert len(together) == len(alone) > 12
  losses = [row["loss"] for row in alone if "loss" in row]
  assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
  for got, want in zip(together, alone):
    assert got.keys() == want.keys()
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
