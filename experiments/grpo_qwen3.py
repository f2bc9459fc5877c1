"""GRPO (arXiv 2402.03300) on mathematical problems with Qwen3-32B, or with Qwen3-0.6B on a host.

  python -m launch.plan experiments.grpo_qwen3 --topology v5p:8x8x4
  python -m launch.plan experiments.grpo_qwen3:small --topology v5e:2x4
  python -m launch.local experiments.grpo_qwen3:small --checkpoint FOLDER --train TRAIN --test TEST

Hardware: a v5p of 256 chips for `config`, a v5e host of 8 for `small`. Both have been compiled for
those slices and not run: docs/results.md has what `launch.plan` says of them. Without a checkpoint
they have the published sizes and random weights, which is what a plan needs.
"""

import dataclasses
import functools

from pt_jax import recipes
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Experiment, MeshShape, Online
from pt_jax.losses import objective as objectives
from pt_jax.models.config import Remat
from pt_jax.models.zoo import ZOO
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.steps.optimizer import AdamW

STOPS = (151_645, 151_643)  # <|im_end|> and <|endoftext|> of every Qwen 3 tokenizer


def config(
  *,
  model: str = "qwen3-32b",
  checkpoint: str | None = None,
  tokenizer: str | None = None,
  train: str = "../shared/data/gsm8k/train.jsonl",
  test: str = "../shared/data/gsm8k/test.jsonl",
  steps: int = 200,
  lr: float = 1e-6,
  prompts: int = 128,
  group_size: int = 16,
  max_tokens: int = 7168,
  row_length: int = 8192,
  rows: int = 256,
  slots: int = 2048,
  share_prompts: bool = False,
  temperature: float = 1.0,
  held_out: int = 512,
  remat: Remat = "block",
  context: int = 1,
  tensor: int = 4,
  zero: int = 3,
  seed: int = 0,
) -> Experiment:
  """GRPO with the k3 KL to the checkpoint, one update a step.

  Args:
    model: a size of `models.zoo`.
    checkpoint: a folder in HF format; by default random weights.
    tokenizer: a folder with tokenizer.json; by default that of the checkpoint.
    train: problems, rows {"question", "answer"} whose answers end in "#### number".
    test: problems that are evaluated.
    steps: batches of fresh rollouts, one update each.
    lr: peak learning rate.
    prompts: problems per step.
    group_size: completions per problem.
    max_tokens: of a completion.
    row_length: tokens of a problem and its completion together, and of a packed row.
    rows: packed rows of a microbatch, on all devices.
    slots: completions decoded at once.
    share_prompts: a problem is computed once for its completions instead of for each, which is
      worth it where several of them fit into a row.
    temperature: of sampling.
    held_out: test problems per evaluation.
    remat: what a block keeps for its backward pass.
    context: chips that a row is split over.
    tensor: chips that each layer is split over; the others are data-parallel.
    zero: ZeRO stage.
    seed: of data order and sampling.
  """
  stage = Online(
    name="grpo",
    problems=functools.partial(
      recipes.jsonl_problems,
      train=train,
      held_out=test,
      template="tokenizer",
      answer_pattern=r"#### (.+)",
      instruction="Think step by step, and end with the answer as a number.",
    ),
    rewards=recipes.last_number_correct,
    objective=objectives.grpo(),
    sampling=SamplingParams(max_tokens, temperature=temperature, stop_tokens=STOPS),
    optimizer=AdamW(lr, steps=steps, warmup=min(10, steps)),
    steps=steps,
    prompts=prompts,
    group_size=group_size,
    rows=rows,
    row_length=row_length,
    share_prompts=share_prompts,
    slots=slots,
    evaluate_every=20,
    evaluate_problems=held_out,
    checkpoint_every=20,
  )
  return Experiment(
    name="grpo_qwen3",
    stages=(stage,),
    tokenizer=functools.partial(load_tokenizer, tokenizer or checkpoint or "bytes"),
    model=dataclasses.replace(ZOO[model], compute_dtype="bfloat16", remat=remat),
    checkpoint=checkpoint,
    mesh=MeshShape(context=context, tensor=tensor),
    zero=zero,
    seed=seed,
  )


def small(
  *,
  checkpoint: str | None = None,
  tokenizer: str | None = None,
  train: str = "../shared/data/gsm8k/train.jsonl",
  test: str = "../shared/data/gsm8k/test.jsonl",
  steps: int = 200,
  lr: float = 1e-6,
  rows: int = 32,
  seed: int = 0,
) -> Experiment:
  """Qwen3-0.6B with short answers, for one host of 8 chips.

  Args:
    checkpoint: a folder in HF format; by default random weights.
    tokenizer: a folder with tokenizer.json; by default that of the checkpoint.
    train: problems, rows {"question", "answer"} whose answers end in "#### number".
    test: problems that are evaluated.
    steps: batches of fresh rollouts, one update each.
    lr: peak learning rate.
    rows: packed rows of a microbatch, on all devices.
    seed: of data order and sampling.
  """
  base = config(
    model="qwen3-0.6b",
    checkpoint=checkpoint,
    tokenizer=tokenizer,
    train=train,
    test=test,
    steps=steps,
    lr=lr,
    prompts=64,
    group_size=8,
    max_tokens=1536,
    row_length=2048,
    rows=rows,
    slots=256,
    tensor=1,
    seed=seed,
  )
  return dataclasses.replace(base, name="grpo_qwen3_small")
