"""Supervised fine-tuning of Qwen3-8B (arXiv 2505.09388) on chats of up to 32k tokens.

  python -m launch.plan experiments.sft_qwen3 --topology v5p:4x4x4
  python -m launch.local experiments.sft_qwen3 --checkpoint FOLDER --train CHATS.jsonl

Hardware: a v5p of 64 chips. It has been compiled for that slice and not run: docs/results.md has
what `launch.plan` says of it (memory, step time of the roofline). Without a checkpoint it has the
published sizes and random weights, which is what a plan needs.

Each chip holds whole rows, so attention communicates nothing. Parameters are split over 16 chips
and four groups of 16 hold the same ones (`expert`, an axis of the batch where there is no mixture):
a gathering over all chips of a closed torus is an all-reduce to XLA, see docs/results.md.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from pt_jax import recipes
from pt_jax.data.messages import Message
from pt_jax.data.pipeline import Layout
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Experiment, MeshShape, Supervised
from pt_jax.models.config import Remat
from pt_jax.models.zoo import ZOO
from pt_jax.steps.optimizer import AdamW


def messages(row: Mapping[str, Any]) -> list[Message]:
  """A row is a chat in the field `messages`."""
  return row["messages"]


def config(
  *,
  model: str = "qwen3-8b",
  checkpoint: str | None = None,
  tokenizer: str | None = None,
  train: str = "chats.jsonl",
  held_out: int = 512,
  steps: int = 1000,
  lr: float = 1e-5,
  batch_size: int = 64,
  microbatches: int = 1,
  row_length: int = 32_768,
  remat: Remat = "attention",
  context: int = 1,
  tensor: int = 1,
  expert: int = 4,
  zero: int = 3,
  seed: int = 0,
) -> Experiment:
  """Full fine-tuning, packed rows, float32 parameters and moments, bfloat16 compute.

  Args:
    model: a size of `models.zoo`.
    checkpoint: a folder in HF format; by default random weights.
    tokenizer: a folder with tokenizer.json; by default that of the checkpoint.
    train: chats, rows {"messages": [{"role", "content"}, ...]} (.jsonl, .json or .array_record).
    held_out: random chats that are evaluated and not trained on.
    steps: optimizer updates.
    lr: peak learning rate.
    batch_size: packed rows per update, on all hosts.
    microbatches: parts that a batch is computed in, to save memory.
    row_length: tokens per row; longer chats are cut.
    remat: what a block keeps for its backward pass.
    context: chips that a row is split over.
    tensor: chips that each layer is split over; the others are data-parallel.
    expert: groups of data-parallel chips that hold the same parameters.
    zero: ZeRO stage.
    seed: of data order.
  """
  stage = Supervised(
    name="sft",
    data=functools.partial(
      recipes.conversations,
      train=train,
      messages=messages,
      fields=("messages",),
      template="tokenizer",
      held_out=held_out,
      seed=seed,
    ),
    layout=Layout(batch_size, row_length, too_long="truncate"),
    optimizer=AdamW(lr, steps=steps, warmup=steps // 20, weight_decay=0.1),
    microbatches=microbatches,
    evaluate_every=max(1, steps // 10),
    checkpoint_every=max(1, steps // 10),
  )
  return Experiment(
    name="sft_qwen3",
    stages=(stage,),
    tokenizer=functools.partial(load_tokenizer, tokenizer or checkpoint or "bytes"),
    model=dataclasses.replace(ZOO[model], compute_dtype="bfloat16", remat=remat),
    checkpoint=checkpoint,
    mesh=MeshShape(context=context, tensor=tensor, expert=expert),
    zero=zero,
    seed=seed,
  )
