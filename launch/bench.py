"""SFT and DPO steps, decoding, whole GRPO and PPO steps, beside the peers: one model and batch.

  make bench
  PT_JAX_TRL_PYTHON=... PT_JAX_TUNIX_PYTHON=... python -m launch.bench --tasks sft grpo

A benchmark, not a test: medians of five in one run, to be read as ratios. What a peer measures
and how it gets its interpreter stands in `launch/bench_peers/spec.py`; a peer without one is left
out with a note.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Sequence
from typing import Any, Literal

import jax
import tyro

from launch import bench_tasks, host
from launch.bench_peers.spec import SPEC
from pt_jax import sharding

Task = Literal["sft", "generate", "mixed", "grpo", "dpo", "ppo"]
TASKS: tuple[Task, ...] = typing.get_args(Task)
OURS = ""  # the interpreter that runs this
PEERS: dict[Task, dict[str, str]] = {  # task -> script -> variable that names its interpreter
  "sft": {
    "trl_sft.py": "PT_JAX_TRL_PYTHON",
    "transformers_sft.py": "PT_JAX_TRL_PYTHON",
    "tunix_sft.py": "PT_JAX_TUNIX_PYTHON",
  },
  "generate": {
    "transformers_generate.py": "PT_JAX_TRL_PYTHON",
    "tunix_generate.py": "PT_JAX_TUNIX_PYTHON",
  },
  "mixed": {
    "first_engine.py": OURS,
    "transformers_mixed.py": "PT_JAX_TRL_PYTHON",
    "tunix_mixed.py": "PT_JAX_TUNIX_PYTHON",
  },
  "grpo": {"trl_grpo.py": "PT_JAX_TRL_PYTHON", "tunix_grpo.py": "PT_JAX_TUNIX_PYTHON"},
  "dpo": {"trl_dpo.py": "PT_JAX_TRL_PYTHON"},
  "ppo": {},  # TRL 1.16 has none
}


def main(tasks: tuple[Task, ...] = TASKS) -> None:
  """Prints one row per measurement.

  Args:
    tasks: what to measure.
  """
  if host.choose_platform() == "cpu":
    host.use_cpu(SPEC["threads"])
  print(f"{'task':9} {'who':28} {'median s':>9} {'tokens/s':>9} {'ours / theirs':>14}")
  for task in tasks:
    ours, tokens = measure(task)
    _row(task, "pt_jax", ours, tokens, None)
    for script, variable in PEERS[task].items():
      interpreter = sys.executable if variable == OURS else os.environ.get(variable)
      if not interpreter:
        print(f"{task:9} {script:28} left out: {variable} names no interpreter")
        continue
      for seconds, their_tokens, name in _peer(interpreter, script):
        _row(task, name, seconds, their_tokens, tokens / ours)


def measure(task: Task) -> tuple[float, float]:
  """Median seconds of one timing of ours, and the tokens that it covers."""
  with jax.set_mesh(sharding.make_mesh(data=-1)):
    once = bench_tasks.STARTS[task]()
    timings = []
    for i in range(SPEC["warmup"] + SPEC["repeats"]):
      started = time.perf_counter()
      tokens = once(i)
      timings.append(time.perf_counter() - started)
  return statistics.median(timings[SPEC["warmup"] :]), float(tokens)


def _peer(interpreter: str, script: str) -> list[tuple[float, float, str]]:
  """(median seconds, tokens, name) of every line that a peer's script prints."""
  path = pathlib.Path(__file__).parent / "bench_peers" / script
  done = subprocess.run(
    [interpreter, str(path)], input=json.dumps(SPEC), text=True, capture_output=True, check=False
  )
  lines = [line for line in done.stdout.splitlines() if line.startswith("{") and '"peer"' in line]
  if done.returncode or not lines:
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"{script}: failed: {last}")
    return []
  found: Sequence[dict[str, Any]] = [json.loads(line) for line in lines]
  return [(statistics.median(f["seconds"]), f["tokens"], f["peer"]) for f in found]


def _row(task: str, who: str, seconds: float, tokens: float, ours: float | None) -> None:
  speed = tokens / seconds
  ratio = "" if ours is None else f"{ours / speed:13.2f}x"
  print(f"{task:9} {who:28} {seconds:9.3f} {speed:9.0f} {ratio:>14}", flush=True)


if __name__ == "__main__":
  sys.exit(tyro.cli(main))
