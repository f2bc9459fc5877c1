"""What it saves to compute a prompt once for its completions: a GRPO update both ways.

  python -m launch.bench_prompts --group-size 8
  python -m launch.bench_prompts --prompts 2 --shots 2 --row-length 4096

Questions are those of GSM8K in bytes; the completions of one are answers that the data set has for
others, so that they have the lengths of answers. Both layouts have the same groups and row length
and take turns in one process. Live blocks are those of the TPU kernel at its block size, one head.
"""

import dataclasses
import functools
import statistics
import sys
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kernels.flash_attention.blocks import is_dead, live_blocks
from kernels.flash_attention.reference import Features
from launch import bench_tasks, host
from launch.bench_peers.spec import SPEC
from pt_jax import recipes, sharding
from pt_jax.data.sources import JsonlSource
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.loops.rollouts import Packed, pack_rollouts
from pt_jax.losses import objective as objectives
from pt_jax.losses.credit import Credit
from pt_jax.models.decoder import attention_ids
from pt_jax.rollout.rollouts import Rollouts
from pt_jax.steps import policy

BLOCK = 1024  # rows of queries and keys that the kernel on v5e and v6e fetches at once


def main(
  *,
  data: str = "../shared/data/gsm8k/train.jsonl",
  prompts: int = 4,
  group_size: int = 8,
  shots: int = 0,
  row_length: int = 2048,
  rows: int = 2,
  repeats: int = 5,
  seed: int = 0,
) -> None:
  """Prints tokens, rows, live blocks of attention and seconds of an update, and their ratios.

  Args:
    data: rows {"question", "answer"}.
    prompts: groups of an update.
    group_size: completions of a group.
    shots: solved questions before each question.
    row_length: bytes of a packed row.
    rows: of a microbatch.
    repeats: timings of each layout; 0 counts alone.
    seed: of which answers are drawn.
  """
  if host.choose_platform() == "cpu":
    host.use_cpu(SPEC["threads"])
  rollouts = sampled(data, prompts, group_size, shots, seed)
  packs = {share: pack_rollouts(rollouts, rows, row_length, share_prompts=share) for share in WAYS}
  print(
    f"{prompts} x {group_size}, prompts of {rollouts.prompt_length.mean():.0f} bytes, completions "
    f"of {(rollouts.length - rollouts.prompt_length).mean():.0f}, rows of {row_length}"
  )
  figures = {share: counted(pack) for share, pack in packs.items()}
  if repeats:
    with jax.set_mesh(sharding.make_mesh(data=-1)):
      for share, found in measured(packs, repeats).items():
        figures[share] |= found
  print(f"{'':16} {'a prompt each':>14} {'shared':>10} {'ratio':>7}")
  for name, each in figures[False].items():
    shared = figures[True][name]
    print(f"{name:16} {each:14.6g} {shared:10.6g} {each / shared:6.2f}x")


WAYS = (False, True)


def sampled(data: str, prompts: int, group_size: int, shots: int, seed: int) -> Rollouts:
  """Groups of questions of the file and answers to others."""
  tokenizer, rng, source = load_tokenizer("bytes"), np.random.default_rng(seed), JsonlSource(data)
  task = recipes.jsonl_problems(
    tokenizer,
    train=data,
    held_out=data.replace("train", "test"),
    template="plain",
    answer_pattern=r"#### (.+)",
    instruction="Think step by step, and end with the answer as a number.",
  )
  row = lambda: source[int(rng.integers(len(source)))]
  made = []
  for i in range(prompts):
    solved = "".join("{question}\n{answer}\n\n".format(**row()) for _ in range(shots))
    problem = task.train[i]
    prompt = task.encode(dataclasses.replace(problem, prompt=solved + problem.prompt))
    made += [(prompt, tokenizer.encode(row()["answer"])) for _ in range(group_size)]
  starts = np.array([len(prompt) for prompt, _ in made], np.int32)
  length = np.array([len(prompt) + len(answer) for prompt, answer in made], np.int32)
  tokens = np.zeros((len(made), length.max()), np.int32)
  for i, (prompt, answer) in enumerate(made):
    tokens[i, : length[i]] = [*prompt, *answer]
  logprobs = np.zeros(tokens.shape, np.float32)
  fields: Any = {"tokens": tokens, "prompt_length": starts, "length": length, "logprobs": logprobs}
  fields |= {"version": np.zeros_like(tokens), "stop": np.zeros(len(made), np.int8)}
  return Rollouts(**fields, forced=cast(Any, np.zeros(tokens.shape, bool)))


def counted(pack: Packed) -> dict[str, float]:
  """Tokens laid out, rows of microbatches that hold some, and blocks of attention that hold
  anything."""
  batch = pack.batch
  ids = [batch.segment_ids]
  if batch.prefix_ids is not None:
    ids = [attention_ids(batch.segment_ids, batch.prefix_ids), batch.prefix_ids]
  q_ids = jnp.stack([jnp.asarray(x).reshape(-1, pack.plan.row_length) for x in ids], 1)
  held = np.asarray(q_ids[:, 0])
  some = (held >= 0).any(1)
  q_ids = q_ids[some]
  ids = (q_ids, q_ids[:, :1], jnp.int32(0), Features(1.0))
  live = live_blocks(*ids, BLOCK, BLOCK, by_keys=False, parts=1)
  blocks = int(np.count_nonzero(~is_dead(live.flags)[: int(live.count)]))
  filled = np.count_nonzero(some.reshape(len(batch.tokens), -1).any(1))
  rows = int(filled) * batch.tokens.shape[1]
  return {"tokens": (held >= 0).sum(), "rows": rows, "live blocks": blocks}


def measured(packs: dict[bool, Packed], repeats: int) -> dict[bool, dict[str, float]]:
  """Median seconds of an update of each layout, and its loss."""
  config, updater, state = bench_tasks.start()
  step = jax.jit(
    functools.partial(
      policy.policy_step,
      config=config,
      updater=updater,
      objective=dataclasses.replace(objectives.grpo(), kl=None),
      temperature=1.0,
      first_update=True,
    )
  )
  batches, losses = {}, {}
  for share, pack in packs.items():
    drawn = pack.drawn
    advantages = np.random.default_rng(0).normal(size=(len(drawn), 1)) * np.ones(drawn.shape)
    trained = np.ones(len(drawn), bool)
    credit = Credit(trained, advantages, advantages, trained, trained)
    fields: Any = pack.fields(credit)
    batches[share] = bench_tasks.put(dataclasses.replace(pack.batch, **fields))
    losses[share] = float(step(state, batches[share])[1]["loss"])  # and compiles
  seconds: dict[bool, list[float]] = {share: [] for share in packs}
  for _ in range(repeats):
    for share, batch in batches.items():
      started = time.perf_counter()
      jax.block_until_ready(step(state, batch))
      seconds[share].append(time.perf_counter() - started)
  median = statistics.median
  return {way: {"seconds": median(seconds[way]), "loss": losses[way]} for way in packs}


if __name__ == "__main__":
  sys.exit(tyro.cli(main))
