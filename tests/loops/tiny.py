"""A supervised experiment of a few seconds: a byte model learns to spell words backwards.

Every run of it shares the compiled programs of this one model and shape.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.data.tokenizers import ByteTokenizer, Tokenizer
from pt_jax.experiment import Experiment, Supervised, SupervisedData
from pt_jax.models.config import ModelConfig
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.steps.optimizer import AdamW

MODEL = ModelConfig(
  vocab_size=272, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=32, max_length=64
)
END = ByteTokenizer().token_id("<|endoftext|>")
ADAM = AdamW(0.02, steps=12, warmup=2)


def encode(row: Mapping[str, str]) -> Example:
  """The prompt is the word and an arrow; what is trained is the word backwards and the end."""
  tokenizer = ByteTokenizer()
  prompt = tokenizer.encode(row["word"] + ">")
  answer = [*tokenizer.encode(row["word"][::-1]), END]
  mask = np.r_[np.zeros(len(prompt)), np.ones(len(answer))].astype(np.float32)
  return Example(np.array([*prompt, *answer], np.int32), mask)


def words(count: int, seed: int) -> list[dict[str, str]]:
  """Rows with random words of two to five letters."""
  rng = np.random.default_rng(seed)
  return [{"word": "".join(rng.choice([*"abcd"], rng.integers(2, 6)))} for _ in range(count)]


def data(tokenizer: Tokenizer, *, seed: int = 0) -> SupervisedData:
  """200 words to train on and 20 others."""
  train = Mixture({"words": MemorySource(words(200, 1), "train")}, seed=seed)
  prompts = [tokenizer.encode(f"{word}>") for word in ("ab", "abc", "dcba", "a")]
  return SupervisedData(train, MemorySource(words(20, 2), "held_out"), encode, prompts)


def stage(**changes) -> Supervised:
  """The stage of `config`, with changes."""
  default = Supervised(
    name="sft",
    data=data,
    layout=Layout(batch_size=4, row_length=32, window=32),
    optimizer=ADAM,
    evaluate_every=6,
    checkpoint_every=4,
    sample_every=6,
    sampling=SamplingParams(max_tokens=8, stop_tokens=(END,)),
  )
  return dataclasses.replace(default, **changes)


def experiment(*stages: Supervised, **changes) -> Experiment:
  """An experiment of these stages (default: `stage()`), with changes."""
  fields = {"name": "tiny", "tokenizer": ByteTokenizer, "model": MODEL}
  return Experiment(**{**fields, "stages": stages or (stage(),), **changes})


def config(*, lr: float = 0.02, steps: int = 12, batch_size: int = 4, seed: int = 0) -> Experiment:
  """Words spelled backwards.

  Args:
    lr: peak learning rate.
    steps: updates.
    batch_size: rows.
    seed: of everything.
  """
  return experiment(
    stage(
      data=functools.partial(data, seed=seed),
      optimizer=dataclasses.replace(ADAM, learning_rate=lr, steps=steps),
      layout=Layout(batch_size=batch_size, row_length=32, window=32),
    ),
    seed=seed,
  )
