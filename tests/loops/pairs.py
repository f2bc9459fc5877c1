"""A preference experiment of a few seconds: a byte model learns to prefer words spelled backwards.

Every run with one objective shares the compiled programs of this one model and shape.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from pt_jax.data.groups import MISMATCHED, Group
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.data.tokenizers import ByteTokenizer, Tokenizer
from pt_jax.experiment import ComparisonData, Experiment, Preference
from pt_jax.losses.preference_objective import dpo
from tests.loops import tiny

ADAM = dataclasses.replace(tiny.ADAM, learning_rate=0.003)


def completion(word: str, answer: str) -> Example:
  """The prompt is the word and an arrow; what is judged is the answer and the end."""
  tokenizer = ByteTokenizer()
  prompt, target = tokenizer.encode(word + ">"), [*tokenizer.encode(answer), tiny.END]
  mask = np.r_[np.zeros(len(prompt)), np.ones(len(target))].astype(np.float32)
  return Example(np.array([*prompt, *target], np.int32), mask)


def encode(row: Mapping[str, str]) -> Group:
  """Backwards is better than forwards; where a row says `right`, that one alone, and the answer to
  another word."""
  word = row["word"]
  answers = (word[::-1], word + "e")
  if "right" not in row:
    return Group(tuple(completion(word, answer) for answer in answers), (1.0, 0.0))
  own = completion(word, answers[0 if row["right"] else 1])
  return Group((own, completion(word, row["other"])), (float(row["right"]), MISMATCHED))


def initial(row: Mapping[str, str]) -> str:
  """The first letter."""
  return row["word"][0]


def data(tokenizer: Tokenizer) -> ComparisonData:
  """200 words to train on and 20 others."""
  train = Mixture({"words": MemorySource(tiny.words(200, 1), "train")}, seed=0)
  held_out = MemorySource(tiny.words(20, 2), "held_out")
  prompts = [tokenizer.encode(f"{word}>") for word in ("ab", "abc")]
  return ComparisonData(train, held_out, encode, prompts, slice=initial)


def unpaired(tokenizer: Tokenizer) -> ComparisonData:
  """Every other word with the right answer, the others with the wrong one."""
  rows = tiny.words(200, 1)
  rows = [
    {"word": row["word"], "right": i % 2, "other": rows[(i + 50) % 200]["word"]}
    for i, row in enumerate(rows)
  ]
  train = Mixture({"words": MemorySource(rows, "train")}, seed=0)
  return dataclasses.replace(data(tokenizer), train=train)


def stage(**changes) -> Preference:
  """The stage of `experiment`, with changes."""
  default = Preference(
    name="dpo",
    data=data,
    layout=Layout(batch_size=4, row_length=32, window=32),
    optimizer=ADAM,
    objective=dpo(),
    microbatches=2,
    evaluate_every=6,
    checkpoint_every=4,
  )
  return dataclasses.replace(default, **changes)


def experiment(*stages: Preference, **changes) -> Experiment:
  """An experiment of these stages (default: `stage()`), with changes."""
  return tiny.experiment(*(stages or (stage(),)), **({"name": "pairs"} | changes))
