"""Running experiments in tests, crashing them, and comparing what they left."""

import json

import jax
import numpy as np

from pt_jax import metrics
from pt_jax.loops import offline, pipeline


class Interrupted(Exception):
  """Stands for a crash."""


def run(folder, experiment, id="0"):
  """Runs or resumes `folder/NAME/id`."""
  return pipeline.run_experiment(experiment, runs=folder, id=id, quiet=True)


def interrupted_at(step, monkeypatch):
  """Makes the offline loop crash where it would dispatch its `step`-th update from now."""
  calls = iter(range(1, 1000))
  real = offline.device_batch

  def device_batch(*args):
    if next(calls) == step:
      raise Interrupted
    return real(*args)

  monkeypatch.setattr(offline, "device_batch", device_batch)


def logged(folder):
  """metrics.jsonl as lines, without what a clock measured."""
  rows = metrics.read_jsonl(folder / "metrics.jsonl")
  return [json.dumps({k: v for k, v in r.items() if not k.startswith("perf/")}) for r in rows]


def bits(params):
  """Every parameter as bytes."""
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def snapshot(folder):
  """Every file below a folder and what is in it, [] if there is no such folder."""
  return sorted((str(p), p.read_bytes()) for p in folder.rglob("*") if p.is_file())
