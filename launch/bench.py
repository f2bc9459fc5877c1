"""SFT step, decoding and a whole GRPO step, beside the peers: the same model, batch and lengths.

  make bench
  PT_JAX_TRL_PYTHON=... PT_JAX_TUNIX_PYTHON=... python -m launch.bench --tasks sft grpo

A benchmark, not a test: medians of five in one run, to be read as ratios. What a peer measures
and how it gets its interpreter stands in `launch/bench_peers/spec.py`; a peer without one is left
out with a note.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro

from launch import host
from launch.bench_peers.spec import SPEC
from pt_jax import sharding
from pt_jax.data.batch import Batch
from pt_jax.data.tasks import Problem
from pt_jax.loops.rollouts import Judged, drawn_tokens, pack_policy
from pt_jax.losses import objective as objectives
from pt_jax.losses.credit import Episodes, assign_credit
from pt_jax.losses.supervised import SupervisedObjective
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from pt_jax.steps import policy, supervised
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.state import TrainState, Updater

Task = Literal["sft", "generate", "grpo"]
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
  "grpo": {"trl_grpo.py": "PT_JAX_TRL_PYTHON", "tunix_grpo.py": "PT_JAX_TUNIX_PYTHON"},
}


def main(tasks: tuple[Task, ...] = ("sft", "generate", "grpo")) -> None:
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
      interpreter = os.environ.get(variable)
      if not interpreter:
        print(f"{task:9} {script:28} left out: {variable} names no interpreter")
        continue
      for seconds, their_tokens, name in _peer(interpreter, script):
        _row(task, name, seconds, their_tokens, tokens / ours)


def measure(task: Task) -> tuple[float, float]:
  """Median seconds of one timing of ours, and the tokens that it covers."""
  run = {"sft": _sft, "generate": _generate, "grpo": _grpo}[task]
  with jax.set_mesh(sharding.make_mesh(data=-1)):
    once = run()
    timings = []
    for i in range(SPEC["warmup"] + SPEC["repeats"]):
      started = time.perf_counter()
      tokens = once(i)
      timings.append(time.perf_counter() - started)
  return statistics.median(timings[SPEC["warmup"] :]), float(tokens)


def _config() -> ModelConfig:
  return ModelConfig(**SPEC["model"], qk_norm=True, tied_embeddings=True, remat="none", unroll=True)


def _start() -> tuple[ModelConfig, Updater, TrainState]:
  config = _config()
  layout = sharding.zero(1)
  updater = Updater(
    AdamW(SPEC["learning_rate"], steps=1000, final_scale=1.0), decoder.table(config), layout
  )
  make = lambda key: updater.create(decoder.init(key, config, layout.params))
  return config, updater, jax.jit(make)(jax.random.key(0))


def _sft() -> Callable[[int], int]:
  """`steps` updates on full rows."""
  config, updater, state = _start()
  spec = SPEC["sft"]
  shape = (1, spec["batch"], spec["length"])
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
  positions = np.broadcast_to(np.arange(spec["length"], dtype=np.int32), shape)
  mask, ones = (positions > 0).astype(np.float32), np.ones(shape, np.float32)
  fields: Any = (tokens, positions, np.zeros_like(tokens), mask, ones)
  batch = Batch(*fields)
  batch = sharding.put(batch, sharding.batch_spec(1), jax.sharding.get_mesh())
  step = functools.partial(
    supervised.sft_step, config=config, updater=updater, objective=SupervisedObjective()
  )
  step = jax.jit(step, donate_argnums=0)
  box = [state]

  def once(_: int) -> int:
    for _ in range(spec["steps"]):
      box[0], _ = jax.block_until_ready(step(box[0], batch))
    return spec["batch"] * spec["length"] * spec["steps"]

  return once


def _prompts(count: int, length: int, vocab: int) -> list[list[int]]:
  return np.random.default_rng(0).integers(0, vocab, (count, length)).tolist()


def _generate() -> Callable[[int], int]:
  """One batch of sampled completions, none of which stops early."""
  config, _, state = _start()
  spec = SPEC["generate"]
  prompts = _prompts(spec["batch"], spec["prompt"], config.vocab_size)
  length = spec["prompt"] + spec["new_tokens"]
  engine = Engine(config, state.params, slots=spec["batch"], max_length=length)
  sampling = SamplingParams(max_tokens=spec["new_tokens"])

  def once(i: int) -> int:
    rollouts = engine.generate(prompts, sampling, key=jax.random.key(i))
    return int((rollouts.length - rollouts.prompt_length).sum())

  return once


def _even(completion: Completion) -> float:
  """A reward that varies: the share of even characters."""
  return sum(ord(c) % 2 == 0 for c in completion.text) / max(len(completion.text), 1)


def _grpo() -> Callable[[int], int]:
  """Sample, score, one update, new weights to the engine."""
  config, updater, state = _start()
  spec = SPEC["grpo"]
  prompts = _prompts(spec["prompts"], spec["prompt"], config.vocab_size)
  length, count = spec["prompt"] + spec["new_tokens"], spec["prompts"] * spec["samples"]
  engine = Engine(config, state.params, slots=count, max_length=length)
  sampling = SamplingParams(max_tokens=spec["new_tokens"])
  objective = dataclasses.replace(objectives.grpo(), kl=None)
  stack = RewardStack([Component("even", 1.0, _even)])
  step = jax.jit(
    functools.partial(
      policy.policy_step,
      config=config,
      updater=updater,
      objective=objective,
      temperature=1.0,
      first_update=True,
    ),
    donate_argnums=0,
  )
  groups = np.repeat(np.arange(spec["prompts"]), spec["samples"])
  problem = Problem("bench", "", "", {})
  box = [state]

  def once(i: int) -> int:
    rollouts = engine.generate(prompts, sampling, key=jax.random.key(i), n=spec["samples"])
    rows = [row[spec["prompt"] :] for row in rollouts.tokens]
    text = lambda row: "".join(map(chr, row))
    completions = [Completion(problem, text(row), len(row), StopReason.LENGTH) for row in rows]
    rewards = stack(completions)
    drawn = np.asarray(rollouts.length - rollouts.prompt_length)
    mask = drawn_tokens(rollouts)
    episodes = Episodes(rewards.total, np.ones(count, bool), groups, mask)
    credit = assign_credit(episodes, objective=objective)
    judged = Judged(completions, rollouts, rewards, groups)
    batch = pack_policy(judged, credit, rows=count, row_length=length)
    batch = sharding.put(batch, sharding.batch_spec(1), jax.sharding.get_mesh())
    box[0], _ = step(box[0], batch)
    engine.update(box[0].params, i + 1)
    jax.block_until_ready(box[0])
    return int(drawn.sum())

  return once


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
