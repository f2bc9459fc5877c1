"""Reward models of seconds: words with more "a" are better, and that is there to be learned."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pt_jax.data.groups import Group
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.data.tokenizers import ByteTokenizer, Tokenizer
from pt_jax.experiment import ComparisonData, Experiment, Reward
from pt_jax.losses.reward import Kind, RewardObjective
from pt_jax.steps.optimizer import AdamW
from tests.loops import tiny

COUNTS = {"pairwise": 2, "listwise": 3, "outcome": 1, "process": 1}


def rows(kind: Kind, count: int, seed: int) -> list[dict[str, Any]]:
  """As many words as a row of this kind compares, of 3 to 6 letters; no two have as many "a"."""
  rng = np.random.default_rng(seed)
  made = []
  while len(made) < count:
    size = COUNTS[kind]
    words = ["".join(rng.choice([*"aabc"], rng.integers(3, 7))) for _ in range(size)]
    if len({word.count("a") for word in words}) == size:
      made.append({"words": sorted(words, key=lambda word: -word.count("a"))})
  return made


def encode(row: Mapping[str, Any], kind: Kind) -> Group:
  """A step of `process` is a letter, 0.9 right if it is "a"; a word is right with two of them."""
  completions, labels = [], []
  for rank, word in enumerate(row["words"]):
    tokens = np.array(ByteTokenizer().encode(">" + word), np.int32)
    completions.append(Example(tokens, (np.arange(len(tokens)) > 0).astype(np.float32)))
    label: Any = float(rank == 0)
    if kind == "outcome":
      label = float(word.count("a") > 1)
    if kind == "process":
      label = np.array([0, *(0.9 * (letter == "a") for letter in word)])
    labels.append(label)
  return Group(tuple(completions), tuple(labels))


def data(tokenizer: Tokenizer, *, kind: Kind) -> ComparisonData:
  """200 rows to train on and 40 others; slices are the lengths of the first word."""
  del tokenizer
  return ComparisonData(
    Mixture({"words": MemorySource(rows(kind, 200, 1), "train")}, seed=0),
    MemorySource(rows(kind, 40, 2), "held_out"),
    Encode(kind),
    slice=length_of_the_first,
  )


@dataclasses.dataclass(frozen=True)
class Encode:
  """`encode` of a kind."""

  kind: Kind

  def __call__(self, row: Mapping[str, Any]) -> Group:
    return encode(row, self.kind)


def length_of_the_first(row: Mapping[str, Any]) -> str:
  return str(len(row["words"][0]))


@dataclasses.dataclass(frozen=True)
class Data:
  """`data` of a kind."""

  kind: Kind

  def __call__(self, tokenizer: Tokenizer) -> ComparisonData:
    return data(tokenizer, kind=self.kind)


def stage(kind: Kind = "pairwise", *, steps: int = 12, **changes) -> Reward:
  """A stage of this kind, with changes."""
  default = Reward(
    name="reward",
    data=Data(kind),
    objective=RewardObjective(kind),
    layout=Layout(batch_size=4, row_length=32, window=32),
    optimizer=AdamW(0.02, steps=steps, warmup=2),
    evaluate_every=6,
    checkpoint_every=4,
  )
  return dataclasses.replace(default, **changes)


def experiment(*stages, **changes) -> Experiment:
  """Of these stages (default: `stage()`) on the model of `tests/loops/tiny.py`."""
  return tiny.experiment(*(stages or (stage(),)), **changes)
