"""What config functions hand to stages: data, problems, rewards, small models.

Bind their options with `functools.partial`; the tokenizer comes when the stage starts.
"""

import functools
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np

from pt_jax.data.chat import encode_prompt
from pt_jax.data.chat_templates import load_template
from pt_jax.data.groups import MISMATCHED, Group
from pt_jax.data.masks import encode_chat, stop_tokens
from pt_jax.data.messages import Message
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.scratchpads import compact_prompt, demonstration, solve
from pt_jax.data.sources import MemorySource, Row, Source, Subset, open_source, split
from pt_jax.data.tasks import JsonlTask, Problem, ReasoningGymTask, assert_disjoint, exclude
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import ComparisonData, Problems, SupervisedData
from pt_jax.models.config import ModelConfig
from pt_jax.rewards.answers import last_number
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rewards.verifiers import family_score, numeric, think_answer
from pt_jax.rollout.rollouts import SamplingParams

Families = Mapping[str, Mapping[str, Any]]
LABELLED = {"row", "side", "other"}  # the fields of `LabelledRows`


def problems(
  tokenizer: Tokenizer,
  *,
  families: Families,
  template: str,
  size: int,
  held_out: int,
  seed: int,
  levels: Sequence[Families] = (),
) -> Problems:
  """Procedural problems in their compact form, held-out ones removed from the others by their text.

  Args:
    tokenizer: encodes prompts.
    families: of `ReasoningGymTask`.
    template: name of the chat template.
    size: problems drawn to train on; those that are held out are then taken from them.
    held_out: problems never trained on.
    seed: of the draws; held-out problems are those of `seed + 1`.
    levels: families of ever more difficult levels for a curriculum, `size` problems each.
  """
  draw = functools.partial(ReasoningGymTask, prompt=compact_prompt)
  kept_back = draw(families, seed=seed + 1, size=held_out)
  train, *ladder = (exclude(draw(f, seed=seed, size=size), kept_back) for f in (families, *levels))
  assert_disjoint(train, kept_back)
  chat = load_template(template, tokenizer=tokenizer)

  def encode(problem: Problem) -> list[int]:
    turn: Message = {"role": "user", "content": problem.prompt}
    return encode_prompt([turn], tokenizer, chat, where=problem.id).tolist()

  return Problems(train, kept_back, encode, ladder)


def demonstrations(
  tokenizer: Tokenizer,
  *,
  families: Families,
  template: str,
  size: int,
  held_out: int,
  seed: int,
  samples: int,
  direct: float = 0.0,
) -> SupervisedData:
  """Solutions of the problems of `problems` (same arguments): a cold start imitates them.

  Args:
    tokenizer: encodes.
    families, template, size, held_out, seed: as in `problems`; held-out rows are the held-out ones.
    samples: held-out prompts that periodic samples answer.
    direct: share of the solutions that answer without working, `<think></think>`.
  """
  task = problems(
    tokenizer, families=families, template=template, size=size, held_out=held_out, seed=seed
  )
  chat = load_template(template, tokenizer=tokenizer)

  def row(problem: Problem) -> dict[str, str]:
    blurted = random.Random(problem.id).random() < direct
    answer = f"<think></think><answer>{solve(problem)[1]}</answer>"
    return {
      "id": problem.id,
      "prompt": problem.prompt,
      "answer": answer if blurted else demonstration(problem),
    }

  def encode(row: Mapping[str, Any]) -> Example:
    turns: list[Message] = [
      {"role": "user", "content": row["prompt"]},
      {"role": "assistant", "content": row["answer"]},
    ]
    encoded = encode_chat(turns, tokenizer, chat, where=row["id"])
    return Example(encoded.tokens, encoded.mask)

  train = Mixture({"demonstrations": MemorySource([row(p) for p in task.train])}, seed=seed)
  kept_back = MemorySource([row(p) for p in task.held_out])
  prompts = [task.encode(task.held_out[i]) for i in range(samples)]
  return SupervisedData(train, kept_back, encode, prompts)


def conversations(
  tokenizer: Tokenizer,
  *,
  train: str,
  messages: Callable[[Mapping[str, Any]], list[Message]],
  fields: Sequence[str],
  template: str,
  held_out: int,
  held_out_path: str | None = None,
  samples: int = 0,
  train_on: str | Mapping[str, float] = "assistant",
  weight: Callable[[Mapping[str, Any]], float] | None = None,
  seed: int = 0,
) -> SupervisedData:
  """Rows of a file as chats, of which the assistant's turns are trained.

  Args:
    tokenizer: encodes.
    train: a .jsonl, .json or .array_record file.
    messages: a row to its chat, with the assistant's turn last.
    fields: that every row must have.
    template: name of the chat template; "tokenizer" is the one that came with the tokenizer.
    held_out: rows to evaluate on: the first of `held_out_path`, else random ones of `train` that
      are then not trained on.
    held_out_path: a file of the same kind.
    samples: held-out prompts that periodic samples answer.
    train_on: the kind of text that is trained, or weights of kinds; see `masks.encode_chat`.
    weight: of a row among the others; by default all weigh the same.
    seed: of the data order. The split does not depend on it.
  """
  chat = load_template(template, tokenizer=tokenizer)
  source = open_source(train, fields)
  if held_out_path is None:
    source, kept_back = split(source, held_out)
  else:
    whole = open_source(held_out_path, fields)
    kept_back = Subset(whole, range(min(held_out, len(whole))))

  def encode(row: Mapping[str, Any]) -> Example:
    encoded = encode_chat(messages(row), tokenizer, chat, train_on=train_on)
    return Example(encoded.tokens, encoded.mask, weight(row) if weight else 1.0)

  questions = [messages(kept_back[i])[:-1] for i in range(samples)]
  prompts = [encode_prompt(question, tokenizer, chat).tolist() for question in questions]
  return SupervisedData(Mixture({"train": source}, seed=seed), kept_back, encode, prompts)


def preference_pairs(
  tokenizer: Tokenizer,
  *,
  train: str,
  chats: Callable[[Mapping[str, Any]], tuple[list[Message], list[Message]]],
  fields: Sequence[str],
  template: str,
  held_out: int,
  held_out_path: str | None = None,
  samples: int = 0,
  turns: Literal["last", "all"] = "last",
  unpaired: bool = False,
  drop_equal: bool = False,
  weight: Callable[[Mapping[str, Any]], float] | None = None,
  margin: Callable[[Mapping[str, Any]], float] | None = None,
  slice: Callable[[Mapping[str, Any]], str] | None = None,
  seed: int = 0,
) -> ComparisonData:
  """Rows of a file as pairs of chats, the better one first; what the assistant wrote is compared.

  Args:
    tokenizer: encodes.
    train: a .jsonl or .json file (or either .gz), or .array_record.
    chats: a row to its chosen and its rejected chat, each with the assistant's turn last.
    fields: that every row must have.
    template: name of the chat template; "tokenizer" is the one that came with the tokenizer.
    held_out: pairs to evaluate on: the first of `held_out_path`, else random ones of `train` that
      are then not trained on.
    held_out_path: a file of the same kind.
    samples: held-out prompts that periodic samples answer.
    turns: which assistant turns count, the last one or all (trajectories).
    unpaired: train on single completions that are right or wrong (KTO), two of each row, each with
      a mismatched one: the answer to another row's prompt. Held-out rows stay pairs.
    drop_equal: leave out rows whose two chats are the same, which are an error otherwise.
    weight: of a pair among the others, such as the confidence in it; by default 1.
    margin: by which the chosen one is better (reward models); by default 0.
    slice: names the part of the held-out data that a row belongs to.
    seed: of the data order. The split does not depend on it.
  """
  chat = load_template(template, tokenizer=tokenizer)
  open_file = lambda path: _different(open_source(path, fields), chats, drop_equal)
  source = open_file(train)
  if held_out_path is None:
    source, kept_back = split(source, held_out)
  else:
    whole = open_file(held_out_path)
    kept_back = Subset(whole, range(min(held_out, len(whole))))

  def example(messages: list[Message]) -> Example:
    encoded = encode_chat(messages, tokenizer, chat, turns=turns)
    return Example(encoded.tokens, encoded.mask)

  def encode(row: Mapping[str, Any]) -> Group:
    if row.keys() == LABELLED:
      side, other = row["side"], chats(row["other"])
      row = row["row"]
      own = chats(row)[side]
      completions = example(own), example([*own[:-1], other[side][-1]])
      labels = 1.0 - side, MISMATCHED
    else:
      chosen, rejected = chats(row)
      completions, labels = (example(chosen), example(rejected)), (1.0, 0.0)
    given = {"weight": weight(row) if weight else 1.0, "margin": margin(row) if margin else 0.0}
    return Group(completions, labels, **given)

  questions = [chats(kept_back[i])[0][:-1] for i in range(samples)]
  prompts = [encode_prompt(question, tokenizer, chat).tolist() for question in questions]
  trained = LabelledRows(source) if unpaired else source
  return ComparisonData(Mixture({"train": trained}, seed=seed), kept_back, encode, prompts, slice)


def outcomes(
  tokenizer: Tokenizer,
  *,
  train: str,
  messages: Callable[[Mapping[str, Any]], list[Message]],
  label: Callable[[Mapping[str, Any]], float],
  fields: Sequence[str],
  template: str,
  held_out: int,
  slice: Callable[[Mapping[str, Any]], str] | None = None,
  seed: int = 0,
) -> ComparisonData:
  """Rows of a file as chats that are right or wrong: what outcome reward models are trained on.

  Args:
    tokenizer: encodes.
    train: a .jsonl or .json file (or either .gz), or .array_record.
    messages: a row to its chat, with the assistant's turn last.
    label: of a row, 1 right, 0 wrong, or a probability between.
    fields: that every row must have.
    template: name of the chat template; "tokenizer" is the one that came with the tokenizer.
    held_out: random rows to evaluate on, which are then not trained on.
    slice: names the part of the held-out data that a row belongs to.
    seed: of the data order. The split does not depend on it.
  """
  chat = load_template(template, tokenizer=tokenizer)
  source, kept_back = split(open_source(train, fields), held_out)

  def encode(row: Mapping[str, Any]) -> Group:
    encoded = encode_chat(messages(row), tokenizer, chat, turns="last")
    return Group((Example(encoded.tokens, encoded.mask),), (float(label(row)),))

  return ComparisonData(Mixture({"train": source}, seed=seed), kept_back, encode, slice=slice)


def marked_steps(
  tokenizer: Tokenizer,
  *,
  train: str,
  template: str,
  held_out: int,
  prompt: str = "prompt",
  steps: str = "steps",
  labels: str = "labels",
  separator: str = "\n",
  slice: Callable[[Mapping[str, Any]], str] | None = None,
  seed: int = 0,
) -> ComparisonData:
  """Rows of a file as solutions in labelled steps: what process reward models are trained on.

  A step is tokenized by itself, with the separator behind it, and its last token is its mark.

  Args:
    tokenizer: encodes.
    train: a .jsonl or .json file (or either .gz), or .array_record.
    template: name of the chat template; "tokenizer" is the one that came with the tokenizer.
    held_out: random rows to evaluate on, which are then not trained on.
    prompt: field with the question, a string.
    steps: field with the steps, a list of strings.
    labels: field with a number of 0..1 for every step: whether it is right, or how likely.
    separator: stands behind every step.
    slice: names the part of the held-out data that a row belongs to.
    seed: of the data order. The split does not depend on it.
  """
  chat = load_template(template, tokenizer=tokenizer)
  source, kept_back = split(open_source(train, (prompt, steps, labels)), held_out)

  def encode(row: Mapping[str, Any]) -> Group:
    if not row[steps] or len(row[steps]) != len(row[labels]):
      count = len(row[labels])
      raise ValueError(f"expected a label for each of 1 or more steps, found {count} labels")
    turn: Message = {"role": "user", "content": row[prompt]}
    parts = [encode_prompt([turn], tokenizer, chat)]
    marks, label = [np.zeros(len(parts[0]))], [np.zeros(len(parts[0]))]
    for step, right in zip(row[steps], row[labels]):
      tokens = tokenizer.encode(step + separator)
      parts.append(np.asarray(tokens, np.int32))
      last = np.arange(len(tokens)) == len(tokens) - 1
      marks.append(last)
      label.append(last * float(right))
    mask = np.concatenate(marks).astype(np.float32)
    return Group((Example(np.concatenate(parts), mask),), (np.concatenate(label),))

  return ComparisonData(Mixture({"train": source}, seed=seed), kept_back, encode, slice=slice)


class LabelledRows:
  """Rows of pairs as rows of single completions: 2 i is the chosen one of row i, 2 i + 1 the
  rejected; each with the row half the data away, whose answer does not belong to its prompt."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self) -> int:
    return 2 * len(self._source)

  def __getitem__(self, index: SupportsIndex, /) -> Row:
    number, side = divmod(index.__index__(), 2)
    other = self._source[(number + len(self._source) // 2) % len(self._source)]
    return {"row": self._source[number], "side": side, "other": other}

  def where(self, index: int) -> str:
    return self._source.where(index // 2)


def _different(source: Source, chats: Callable[[Any], tuple[Any, Any]], drop: bool) -> Source:
  """The source, if asked without the rows whose two chats are the same."""
  if not drop:
    return source
  keep = [i for i in range(len(source)) if operator.ne(*chats(source[i]))]
  return Subset(source, keep)


def small_decoder(vocab_size: int, *, width: int, layers: int, max_length: int) -> ModelConfig:
  """A decoder in the shape of Qwen 3 with heads of 64, for training from scratch on a CPU."""
  return ModelConfig(
    vocab_size=vocab_size,
    width=width,
    layers=layers,
    heads=width // 64,
    kv_heads=max(1, width // 128),
    head_dim=64,
    hidden=3 * width,
    max_length=max_length,
    qk_norm=True,
    tied_embeddings=True,
    remat="none",
    unroll=True,
  )


def jsonl_problems(
  tokenizer: Tokenizer,
  *,
  train: str,
  held_out: str,
  template: str,
  answer_pattern: str,
  instruction: str,
) -> Problems:
  """Questions with a reference answer from two files; no held-out question is trained on.

  Args:
    tokenizer: encodes prompts.
    train, held_out: JSON-lines files with the fields `question` and `answer`.
    template: name of the chat template.
    answer_pattern: of `JsonlTask`.
    instruction: stands behind every question, on a line of its own.
  """
  kept_back = JsonlTask(held_out, answer_pattern=answer_pattern)
  problems = exclude(JsonlTask(train, answer_pattern=answer_pattern), kept_back)
  chat = load_template(template, tokenizer=tokenizer)

  def encode(problem: Problem) -> list[int]:
    turn: Message = {"role": "user", "content": f"{problem.prompt}\n{instruction}"}
    return encode_prompt([turn], tokenizer, chat, where=problem.id).tolist()

  return Problems(problems, kept_back, encode)


def last_number_correct() -> RewardStack:
  """1 when the last number of the completion is the reference answer."""
  return RewardStack([Component("correct", 1.0, functools.partial(numeric, extract=last_number))])


def correct_and_shaped(shape: float = 0.1) -> RewardStack:
  """1 for the right answer by the family's own scorer, and `shape` for think and answer tags."""
  return RewardStack(
    [
      Component("correct", 1.0, functools.partial(family_score, strict=True)),
      Component("format", shape, think_answer),
    ]
  )


def until_turn_ends(
  tokenizer: Tokenizer, template: str, max_tokens: int, **options: Any
) -> SamplingParams:
  """Sampling that stops at the tokens that end an assistant's turn in this template."""
  ends = stop_tokens(tokenizer, load_template(template, tokenizer=tokenizer))
  return SamplingParams(max_tokens=max_tokens, stop_tokens=ends, **options)
