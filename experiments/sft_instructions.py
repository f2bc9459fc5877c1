"""Supervised fine-tuning on 1000 short instructions, stopped when the held-out loss rises.

  python -m launch.local experiments.sft_instructions
  python -m launch.local experiments.sft_instructions --checkpoint FOLDER --lr 1e-5

The default trains a byte-level decoder of 0.8 M parameters from scratch. It begins to overfit after
180 steps, 7 epochs, and stops. On 2 CPU cores it takes 1m53s beside another job. Seed 0:
eval/nats_per_token (a token is a byte) falls to 1.550 at step 180 and rises to 1.561 at step 210,
where it stops, with 58.8 % of held-out bytes right. Rows are 98 % full.

The parameters that it leaves are the last ones, one evaluation past the best.

Other objectives, after 60 steps of plain SFT that all of them start from:

  python -m launch.local experiments.sft_instructions:objectives
  python -m launch.local experiments.sft_instructions:psft --coefficient 1.0

Seed 0, after 60 more steps; nats, eval/kl from the start, entropy of the prediction, on held-out
bytes (at the start: 2.155, 0, 2.31):

  nll              1.922   0.208   2.00
  psft             1.979   0.061   2.15
  psft_clipped     1.953           2.01
  label_smoothed   2.031   0.342   2.61
  dft              5.104   1.196   0.21   trains what it knows already, so a weak start collapses

All six stages took 9m38s on 2 CPU cores beside three other jobs, 5 minutes of CPU time.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from pt_jax import recipes
from pt_jax.data.messages import Message
from pt_jax.data.pipeline import Layout
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import EarlyStop, Experiment, Supervised
from pt_jax.losses import supervised
from pt_jax.losses.supervised import ReferenceKl, SupervisedObjective
from pt_jax.steps.optimizer import AdamW

# 1100 rows {"instruction", "input", "output"} of "Build a Large Language Model (From Scratch)".
ROWS = "../shared/data/llms_from_scratch/instruction-data.json"


def messages(row: Mapping[str, Any]) -> list[Message]:
  """The instruction, its input on the next line where there is one, and the output."""
  question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
  return [
    {"role": "user", "content": question},
    {"role": "assistant", "content": row["output"]},
  ]


def config(
  *,
  rows: str = ROWS,
  held_out: int = 100,
  checkpoint: str | None = None,
  template: str | None = None,
  steps: int = 240,
  lr: float = 3e-3,
  weight_decay: float = 0.1,
  batch_size: int = 8,
  row_length: int = 512,
  patience: int = 1,
  width: int = 128,
  layers: int = 4,
  seed: int = 0,
) -> Experiment:
  """A byte-level decoder from scratch, or a checkpoint with its own tokenizer and template.

  Args:
    rows: instructions (.json, .jsonl or .array_record).
    held_out: random rows that are evaluated on, never trained on.
    checkpoint: a folder in HF format with its tokenizer; by default a small model from scratch.
    template: of the chat; by default "plain" from scratch, and a checkpoint's own.
    steps: optimizer updates at most.
    lr: peak learning rate (3e-3 suits the small model; 1e-5 a checkpoint).
    weight_decay: of the matrices.
    batch_size: packed rows per update, on all hosts.
    row_length: tokens per row.
    patience: evaluations in a row, of 8, that may be worse than the best before it stops.
    width: of the residual stream of the small model.
    layers: of the small model.
    seed: of initialisation, data order and samples.
  """
  tokenizer = functools.partial(load_tokenizer, checkpoint or "bytes")
  template = template or ("tokenizer" if checkpoint else "plain")
  small = functools.partial(recipes.small_decoder, width=width, layers=layers)
  every = max(1, steps // 8)
  stage = Supervised(
    name="sft",
    data=functools.partial(
      recipes.conversations,
      train=rows,
      messages=messages,
      fields=("instruction", "input", "output"),
      template=template,
      held_out=held_out,
      samples=8,
      seed=seed,
    ),
    layout=Layout(batch_size, row_length),
    optimizer=AdamW(lr, steps=steps, warmup=steps // 10, weight_decay=weight_decay),
    evaluate_every=every,
    checkpoint_every=every,
    sample_every=every,
    sampling=recipes.until_turn_ends(tokenizer(), template, max_tokens=128, temperature=0.7),
    stop=(EarlyStop("eval/nats_per_token", rises=True, patience=patience),),
  )
  return Experiment(
    name="sft_instructions",
    stages=(stage,),
    tokenizer=tokenizer,
    model=None if checkpoint else small(tokenizer().vocab_size, max_length=2 * row_length),
    checkpoint=checkpoint,
    seed=seed,
  )


MEASURED = ReferenceKl(0.0)  # in the log, not in the loss


def _continued(
  name: str, objectives: Mapping[str, SupervisedObjective], rows: str, steps: int, seed: int
) -> Experiment:
  """Plain SFT for 60 steps, then a stage for each objective that starts from what it left."""
  base = config(rows=rows, steps=60, seed=seed)
  (first,) = base.stages
  assert isinstance(first, Supervised)
  first = dataclasses.replace(first, sample_every=0, evaluate_every=0, stop=())
  later = (
    dataclasses.replace(
      first,
      name=stage,
      objective=objective,
      optimizer=AdamW(1e-3, steps=steps, warmup=steps // 10, weight_decay=0.1),
      evaluate_every=max(1, steps // 4),
      start="sft",
    )
    for stage, objective in objectives.items()
  )
  return dataclasses.replace(base, name=f"sft_instructions_{name}", stages=(first, *later))


def objectives(*, rows: str = ROWS, steps: int = 60, seed: int = 0) -> Experiment:
  """Every supervised objective from one start, their divergence from it beside their loss.

  Args:
    rows: instructions.
    steps: updates of each.
    seed: of initialisation and data order.
  """
  each = {
    "nll": SupervisedObjective(kl=MEASURED),
    "psft": supervised.psft(1.0),
    "psft_clipped": supervised.psft_clipped(),
    "dft": dataclasses.replace(supervised.dft(), kl=MEASURED),
    "label_smoothed": dataclasses.replace(supervised.label_smoothed(), kl=MEASURED),
  }
  return _continued("objectives", each, rows, steps, seed)


def psft(
  *,
  coefficient: float = 1.0,
  form: supervised.KlForm = "exact",
  rows: str = ROWS,
  steps: int = 60,
  seed: int = 0,
) -> Experiment:
  """SFT that a KL holds near what it starts from.

  Args:
    coefficient: of the KL.
    form: over the vocabulary, or a penalty on the targets' log-probs.
    rows: instructions.
    steps: updates.
    seed: of initialisation and data order.
  """
  return _continued("psft", {"psft": supervised.psft(coefficient, form)}, rows, steps, seed)


def psft_clipped(
  *,
  clip: float = 0.28,
  refresh_every: int = 8,
  rows: str = ROWS,
  steps: int = 60,
  seed: int = 0,
) -> Experiment:
  """SFT by PPO's clipped ratio to the policy of some updates ago.

  Args:
    clip: a target gains until it is 1 + clip times as likely as it was.
    refresh_every: updates for which that policy stays the same.
    rows: instructions.
    steps: updates.
    seed: of initialisation and data order.
  """
  chosen = supervised.psft_clipped(clip, refresh_every)
  return _continued("psft_clipped", {"psft_clipped": chosen}, rows, steps, seed)


def dft(*, rows: str = ROWS, steps: int = 60, seed: int = 0) -> Experiment:
  """Dynamic fine-tuning: the loss of a target times its probability.

  Args:
    rows: instructions.
    steps: updates.
    seed: of initialisation and data order.
  """
  return _continued(
    "dft", {"dft": dataclasses.replace(supervised.dft(), kl=MEASURED)}, rows, steps, seed
  )


def label_smoothed(
  *, share: float = 0.1, rows: str = ROWS, steps: int = 60, seed: int = 0
) -> Experiment:
  """A share of every target is given to all tokens alike.

  Args:
    share: of the target.
    rows: instructions.
    steps: updates.
    seed: of initialisation and data order.
  """
  chosen = dataclasses.replace(supervised.label_smoothed(share), kl=MEASURED)
  return _continued("label_smoothed", {"label_smoothed": chosen}, rows, steps, seed)
