"""SIGKILL at random moments: what is resumed ends with the same bits as what was never killed.

Each case is a command line of launch.local, so an online experiment is one more entry. The moments
are drawn over the rows of metrics.jsonl, anew in every run of the test. One run is killed at all of
them, one after the other; after each a copy of its folder is resumed to the end.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pt_jax import checkpoint, metrics, sharding, weights
from pt_jax.models import decoder
from tests.loops import letters, tiny
from tests.loops.runs import bits, logged

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
KILLS = 10
CASES = {
  "supervised": ["tests.loops.tiny", "--steps", "60"],
  "online": ["tests.loops.letters", "--steps", "60"],
  "ppo": ["tests.loops.letters:ppo", "--steps", "40"],
  "online_preference": ["tests.loops.letters:online_preference", "--steps", "60"],
}
MODELS = {
  "supervised": tiny.MODEL,
  "online": letters.MODEL,
  "ppo": letters.MODEL,
  "online_preference": letters.PAIR_MODEL,
}


def start(case, runs, cache):
  """A process that runs or resumes the case in the folder `runs`."""
  settings = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "launch.local",
      *CASES[case],
      "--id",
      "0",
      "--runs",
      str(runs),
      "--quiet",
    ],
    cwd=REPOSITORY,
    env={**os.environ, **settings},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  error = process.communicate(timeout=900)[1]
  assert process.returncode == 0, error


def folder_of(runs):
  return next(path.parent for path in runs.glob("*/0/config.json"))


def arrays(folder, model):
  """The parameters that every stage left: {stage: bytes of each}."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  like = weights.abstract(decoder.table(model), sharding.USE, mesh, np.dtype("float32"))
  return {
    stage.name: bits(checkpoint.restore_params(stage, like))
    for stage in sorted((folder / "params").iterdir())
  }


@pytest.mark.parametrize("case", CASES)
def test_killed_at_ten_moments_it_ends_with_the_same_bits(case, tmp_path):
  cache = tmp_path / "cache"
  finish(start(case, tmp_path / "whole", cache))
  rng = np.random.default_rng()
  moments = np.sort(rng.integers(0, int(0.9 * rows_logged(tmp_path / "whole")), KILLS))
  for number, after in enumerate(moments):
    found = kill(case, tmp_path / "killed", cache, after, rng)
    print(f"{case}: killed when it had logged {found} rows", flush=True)
    copy = tmp_path / f"resumed{number}"
    shutil.copytree(tmp_path / "killed", copy)
    finish(start(case, copy, cache))
    check_same(case, copy, tmp_path / "whole")
  finish(start(case, tmp_path / "killed", cache))
  check_same(case, tmp_path / "killed", tmp_path / "whole")


def check_same(case, resumed, whole):
  """Parameters, metrics and samples of two runs, to the last bit."""
  resumed, whole = folder_of(resumed), folder_of(whole)
  assert arrays(resumed, MODELS[case]) == arrays(whole, MODELS[case])
  assert logged(resumed) == logged(whole)
  samples = "samples.jsonl"
  assert (resumed / samples).read_bytes() == (whole / samples).read_bytes()


def kill(case, runs, cache, after, rng):
  """Starts the run, kills it soon after row `after` of its log; returns how many there were."""
  before = time.time()
  process = start(case, runs, cache)
  while process.poll() is None and not (goes_on(runs, before) and rows_logged(runs) >= after):
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 0.5))
  process.send_signal(signal.SIGKILL)
  error = process.communicate()[1]
  assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {error}"
  return rows_logged(runs)


def goes_on(runs, since):
  """Whether something was logged since then, and not only by the process before."""
  return any(path.stat().st_mtime > since for path in runs.glob("*/0/metrics.jsonl"))


def rows_logged(runs):
  """How far a run has come."""
  return sum(len(metrics.read_jsonl(path)) for path in runs.glob("*/0/metrics.jsonl"))
