"""GRPO on GSM8K from a checkpoint in HF format, scored by the last number of the answer.

  python -m launch.local experiments.grpo_gsm8k --checkpoint PATH

Hardware: meant for a pod and a 0.5 B to 8 B instruct model. Published, not reproduced
here: Qwen2.5-0.5B-Instruct from 49.6 to 54.3 with GRPO and LoRA. What was run here is a tiny random
checkpoint for two steps (tests/test_experiments.py), which shows that the path works and no more.
"""

import functools

from pt_jax import recipes
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Experiment, MeshShape, Online
from pt_jax.losses import objective as objectives
from pt_jax.steps.optimizer import AdamW


def config(
  *,
  checkpoint: str,
  train: str = "../shared/data/gsm8k/train.jsonl",
  test: str = "../shared/data/gsm8k/test.jsonl",
  template: str = "tokenizer",
  steps: int = 200,
  lr: float = 1e-6,
  prompts: int = 64,
  group_size: int = 8,
  max_tokens: int = 512,
  row_length: int = 1024,
  rows: int = 16,
  slots: int = 128,
  share_prompts: bool = True,
  temperature: float = 1.0,
  held_out: int = 512,
  tensor: int = 1,
  zero: int = 3,
  seed: int = 0,
) -> Experiment:
  """GRPO with the k3 KL to the checkpoint.

  Args:
    checkpoint: folder with config.json, safetensors and tokenizer.json.
    train: questions to train on, with answers that end in "#### number".
    test: questions to evaluate on.
    template: chat template: "tokenizer" is the checkpoint's own.
    steps: batches of fresh rollouts, one update each.
    lr: peak learning rate.
    prompts: questions per step.
    group_size: completions per question.
    max_tokens: of a completion.
    row_length: tokens of a question and its completion together, and of a packed row.
    rows: packed rows of a microbatch, on all devices.
    slots: completions decoded at once.
    share_prompts: a question is computed once for its completions instead of for each.
    temperature: of sampling.
    held_out: test questions per evaluation.
    tensor: devices that each layer is split over; the others are data-parallel.
    zero: ZeRO stage.
    seed: of data order and sampling.
  """
  tokenizer = functools.partial(load_tokenizer, checkpoint)
  return Experiment(
    name="grpo_gsm8k",
    tokenizer=tokenizer,
    checkpoint=checkpoint,
    mesh=MeshShape(tensor=tensor),
    zero=zero,
    stages=(
      Online(
        name="grpo",
        problems=functools.partial(
          recipes.jsonl_problems,
          train=train,
          held_out=test,
          template=template,
          answer_pattern=r"#### (.+)",
          instruction="Think step by step, and end with the answer as a number.",
        ),
        rewards=recipes.last_number_correct,
        objective=objectives.grpo(),
        sampling=recipes.until_turn_ends(
          tokenizer(), template, max_tokens, temperature=temperature
        ),
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
      ),
    ),
    seed=seed,
  )
