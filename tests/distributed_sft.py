"""One process of a supervised run; tests/test_distributed.py starts one or two of them.

python -m tests.distributed_sft RUNS ZERO [PORT PROCESSES INDEX]
"""

import dataclasses
import sys

import jax

from pt_jax.loops.pipeline import run_experiment
from tests.loops import tiny


def main(runs: str, zero: str, port: str = "", processes: str = "1", index: str = "0") -> None:
  """Runs all of it in the folder `runs`; prints how many processes and devices took part."""
  if port:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(index))
  # With 1e-8 in its place the update of a gradient that is nearly 0 is all rounding.
  optimizer = dataclasses.replace(tiny.ADAM, epsilon=1e-3)
  stage = tiny.stage(microbatches=1, sample_every=0, sampling=None, optimizer=optimizer)
  run_experiment(tiny.experiment(stage, zero=int(zero)), runs=runs, id="0", quiet=True)
  print(jax.process_count(), jax.local_device_count(), jax.device_count())


if __name__ == "__main__":
  main(*sys.argv[1:])
