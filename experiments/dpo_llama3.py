"""DPO (arXiv 2305.18290) of Llama-3.1-70B (arXiv 2407.21783) on pairs of up to 8k tokens.

  python -m launch.plan experiments.dpo_llama3 --topology v6e:16x16
  python -m launch.local experiments.dpo_llama3 --checkpoint FOLDER --train PAIRS.jsonl

Hardware: a v6e of 256 chips. It has been compiled for that slice and not run: docs/results.md has
what `launch.plan` says of it. Without a checkpoint it has the published sizes and random weights,
which is what a plan needs.

Two chips share a row and every layer's weights are gathered: with 4,096 tokens a chip that takes
less time than the sums of activations that a split of the layers needs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from pt_jax import recipes
from pt_jax.data.messages import Message
from pt_jax.data.pipeline import Layout
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Experiment, MeshShape, Preference
from pt_jax.losses import preference_objective
from pt_jax.models.config import Remat
from pt_jax.models.zoo import ZOO
from pt_jax.steps.optimizer import AdamW


def chats(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
  """A row has both chats, in the fields `chosen` and `rejected`."""
  return row["chosen"], row["rejected"]


def config(
  *,
  model: str = "llama3.1-70b",
  checkpoint: str | None = None,
  tokenizer: str | None = None,
  train: str = "pairs.jsonl",
  held_out: int = 512,
  steps: int = 500,
  lr: float = 5e-7,
  beta: float = 0.1,
  batch_size: int = 128,
  microbatches: int = 1,
  row_length: int = 8192,
  reference: Literal["online", "cached"] = "online",
  param_dtype: Literal["float32", "bfloat16"] = "float32",
  remat: Remat = "block",
  context: int = 2,
  tensor: int = 1,
  zero: int = 3,
  seed: int = 0,
) -> Experiment:
  """Full fine-tuning, bfloat16 compute, the reference in memory beside the policy.

  Args:
    model: a size of `models.zoo`.
    checkpoint: a folder in HF format; by default random weights.
    tokenizer: a folder with tokenizer.json; by default that of the checkpoint.
    train: pairs, rows {"chosen": chat, "rejected": chat}.
    held_out: random pairs that are evaluated and not trained on.
    steps: optimizer updates.
    lr: peak learning rate.
    beta: implicit reward per nat.
    batch_size: packed rows per update, on all hosts.
    microbatches: parts that a batch is computed in, to save memory.
    row_length: tokens per row, in which a pair stands side by side.
    reference: whether its log-probs come with every batch or are computed once.
    param_dtype: of the parameters that are stored; Adam's moments are float32.
    remat: what a block keeps for its backward pass.
    context: chips that a row is split over.
    tensor: chips that each layer is split over; the others are data-parallel.
    zero: ZeRO stage.
    seed: of data order.
  """
  stage = Preference(
    name="dpo",
    data=functools.partial(
      recipes.preference_pairs,
      train=train,
      chats=chats,
      fields=("chosen", "rejected"),
      template="tokenizer",
      held_out=held_out,
      drop_equal=True,
      seed=seed,
    ),
    objective=preference_objective.dpo(beta),
    layout=Layout(batch_size, row_length, too_long="drop"),
    optimizer=AdamW(lr, steps=steps, warmup=steps // 10),
    microbatches=microbatches,
    reference=reference,
    evaluate_every=max(1, steps // 10),
    checkpoint_every=max(1, steps // 10),
  )
  return Experiment(
    name="dpo_llama3",
    stages=(stage,),
    tokenizer=functools.partial(load_tokenizer, tokenizer or checkpoint or "bytes"),
    model=dataclasses.replace(
      ZOO[model], param_dtype=param_dtype, compute_dtype="bfloat16", remat=remat
    ),
    checkpoint=checkpoint,
    mesh=MeshShape(context=context, tensor=tensor),
    zero=zero,
    seed=seed,
  )
