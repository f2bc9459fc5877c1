"""The first engine of this repository, one dense cache of N slots, on requests of unlike lengths.

Its code is taken from the history into a temporary folder and run by our own interpreter. It knew
one limit for all requests of a call; its device side had one for each slot, which is set here.
"""

import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time

COMMIT = "aedf08f"  # the last with this engine


def _unpack(folder: str) -> None:
  """The packages of that commit. Raises CalledProcessError outside of a clone that has it."""
  packed = subprocess.run(
    ["git", "archive", COMMIT, "pt_jax", "kernels", "launch"],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    check=True,
  )
  with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
    files.extractall(folder, filter="data")


def _measure(spec: dict) -> list[float]:
  """Seconds of each timing."""
  import jax
  import numpy as np

  from launch import bench_tasks, host
  from pt_jax import sharding
  from pt_jax.rollout import engine, schedule
  from pt_jax.rollout.rollouts import SamplingParams, StopReason

  counts = spec["mixed"]["new_tokens"]

  class Limited(schedule.Schedule):
    """One limit for each request."""

    def seat(self):
      fill = super().seat()
      if fill is not None:
        for slot, index in enumerate(self._seated):
          if index is not None:
            fill.end[slot] = len(self._prompts[index]) + counts[index]
      return fill

    def _stop(self, request, token):
      full = len(request.tokens) == counts[request.prompt]
      return StopReason.LENGTH if full else super()._stop(request, token)

  engine.Schedule = Limited
  if host.choose_platform() == "cpu":
    host.use_cpu(spec["threads"])
  with jax.set_mesh(sharding.make_mesh(data=-1)):
    config, _, state = bench_tasks._start()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, k).tolist() for k in spec["mixed"]["prompts"]]
    length = max(map(len, prompts)) + max(counts)
    own = engine.Engine(config, state.params, slots=len(prompts), max_length=length)
    seconds = []
    for i in range(spec["warmup"] + spec["repeats"]):
      start = time.perf_counter()
      sampling = SamplingParams(max_tokens=max(counts))
      rollouts = own.generate(prompts, sampling, key=jax.random.key(i))
      seconds.append(time.perf_counter() - start)
      assert (rollouts.length - rollouts.prompt_length == counts).all()
  return seconds[spec["warmup"] :]


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = json.load(sys.stdin)
  with tempfile.TemporaryDirectory() as folder:
    _unpack(folder)
    sys.path[:] = [folder, *sys.path[1:]]  # before the packages of today
    seconds = _measure(spec)
  tokens = sum(spec["mixed"]["new_tokens"])
  line = {"peer": "first engine", "task": "mixed", "seconds": seconds, "tokens": tokens}
  print(json.dumps(line | {"settings": f"commit {COMMIT}, all requests in one call"}))


if __name__ == "__main__":
  main()
