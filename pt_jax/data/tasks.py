"""Tasks: where verifiable problems come from, and the proof that held-out ones were not trained on.

A task has a length and gives the same `Problem` for the same index, always: the procedural
`ReasoningGymTask` derives every random draw from seed and index, `JsonlTask` reads a file.
"""

import abc
import dataclasses
import difflib
import hashlib
import importlib
import pathlib
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pt_jax.data.sources import JsonlSource, Row


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with a reference answer."""

  id: str  # unique in its task and stable across runs
  prompt: str  # what the model is given
  answer: str  # what a verifier compares with
  metadata: dict[str, Any]  # what a verifier or a report needs besides; the keys depend on the task


class Task(abc.ABC):
  """Problems by index, from 0."""

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def problem(self, index: int) -> Problem:
    """The problem at an index that is known to be in range."""

  def __getitem__(self, index: int) -> Problem:
    if not 0 <= index < len(self):
      raise IndexError(f"problem {index} of a task of {len(self)}")
    return self.problem(index)

  def __iter__(self) -> Iterator[Problem]:
    return (self.problem(index) for index in range(len(self)))


class ReasoningGymTask(Task):
  """A weighted mix of reasoning-gym families (reasoning_gym 0.1.25), generated on demand.

  `families` maps a label to the configuration of its family, for example
  `{"chain_sum": {"weight": 2, "max_terms": 3}, "products/long": {"min_digits": 4}}`. The part of a
  label before "/" names the family; `weight` (default 1) is its share of the problems. Which family
  problem `i` comes from depends on `(seed, i)`, the problem then on `(seed, label, i)`.

  Metadata: `label`, `family`, `config` (both needed to score with the family's own scorer),
  `question` (the original text) and `entry` (the family's own metadata).

  Beware of `basic_arithmetic` with `allow_parentheses=False`: it evaluates from left to right, so
  its reference answers are wrong wherever `*` or `/` follows `+` or `-` ("4 + 2 * 2" is 12 there).

  Args:
    families: label to configuration, as above.
    seed: of all draws; two seeds share problems only by chance.
    size: number of problems.
    prompt: rewrites a problem's prompt (`scratchpads.compact_prompt`); the original question stays
      in the metadata.

  Raises:
    ValueError: unknown family or configuration key, a value the family refuses, a weight that is
      not positive, an empty mix, a size below 1.
  """

  def __init__(
    self,
    families: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    size: int,
    prompt: Callable[[Problem], str] | None = None,
  ):
    if size < 1:
      raise ValueError(f"ReasoningGymTask: size must be at least 1, found {size}")
    if not families:
      raise ValueError("ReasoningGymTask: families is empty, expected at least one family")
    self._seed, self._size, self._prompt = seed, size, prompt
    self._labels = list(families)
    self._weights = [_weight(label, config) for label, config in families.items()]
    self._configs = [_without_weight(config) for config in families.values()]
    self._datasets = [
      open_family(_family(label), config, seed=_label_seed(seed, label), size=size)
      for label, config in zip(self._labels, self._configs)
    ]

  def __len__(self) -> int:
    return self._size

  def problem(self, index: int) -> Problem:
    draw = random.Random(f"{self._seed}/{index}")
    which = draw.choices(range(len(self._labels)), self._weights)[0]
    label, entry = self._labels[which], self._datasets[which][index]
    metadata = {
      "label": label,
      "family": _family(label),
      "config": self._configs[which],
      "question": entry["question"],
      "entry": entry["metadata"],
    }
    identity = f"{label}/{self._seed}/{index}"
    problem = Problem(identity, entry["question"], str(entry["answer"]), metadata)
    if self._prompt is None:
      return problem
    return dataclasses.replace(problem, prompt=self._prompt(problem))


class JsonlTask(Task):
  """One problem a line of a JSON-lines file, for example gsm8k.

  Metadata: `source` (file name), `index` (of the row) and `fields` (the whole row).

  Args:
    path: the file, UTF-8.
    prompt: the field that holds the question.
    answer: the field that holds the reference answer (a string, or a number).
    answer_pattern: regular expression whose only group is the answer within that field; its last
      match counts. gsm8k: `r"#### (.+)"`. None takes the whole field.

  Raises:
    ValueError: naming file and line, for a line that is not a JSON object, a field that is missing,
      empty or neither text nor number, an answer without a match; a missing or empty file; a
      pattern without exactly one group.
  """

  def __init__(
    self,
    path: str | pathlib.Path,
    *,
    prompt: str = "question",
    answer: str = "answer",
    answer_pattern: str | None = None,
  ):
    pattern = None if answer_pattern is None else re.compile(answer_pattern)
    if pattern is not None and pattern.groups != 1:
      raise ValueError(
        f"answer_pattern {answer_pattern!r}: expected exactly one group, found {pattern.groups}"
      )
    source = JsonlSource(path, fields=(prompt, answer))
    self._problems = [
      _jsonl_problem(source, index, pathlib.Path(path), prompt, answer, pattern)
      for index in range(len(source))
    ]

  def __len__(self) -> int:
    return len(self._problems)

  def problem(self, index: int) -> Problem:
    return self._problems[index]


@dataclasses.dataclass(frozen=True)
class Subset(Task):
  """Some problems of a task, in the order of `indices`."""

  task: Task
  indices: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.indices)

  def problem(self, index: int) -> Problem:
    return self.task[self.indices[index]]


def question_key(problem: Problem) -> str:
  """The normalised question: NFKC, case folded, all whitespace removed.

  Two problems with one key count as the same question. Taken from `metadata["question"]` where a
  task rewrites prompts, else from the prompt. Stricter than equality on purpose: it may drop a
  training problem that differs only in spaces, it never keeps one.
  """
  text = problem.metadata.get("question", problem.prompt)
  return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def exclude(task: Task, held_out: Iterable[Problem]) -> Subset:
  """The problems of `task` whose question is none of `held_out`'s; repeats within `task` stay.

  Reads the whole task once.

  Raises:
    ValueError: nothing is left.
  """
  banned = {question_key(problem) for problem in held_out}
  kept = tuple(i for i, problem in enumerate(task) if question_key(problem) not in banned)
  if not kept:
    raise ValueError(f"all {len(task)} problems are held out, nothing is left to train on")
  return Subset(task, kept)


def split_disjoint(task: Task, held_out: int) -> tuple[Subset, Subset]:
  """`(train, held_out)`: the first `held_out` distinct questions, and all problems but those.

  No question is in both (checked with `assert_disjoint`), and none is twice in `held_out`.

  Raises:
    ValueError: `held_out` is below 1, or the task has not more distinct questions than that.
  """
  if held_out < 1:
    raise ValueError(f"held_out must be at least 1, found {held_out}")
  first: dict[str, int] = {}
  for index, problem in enumerate(task):
    first.setdefault(question_key(problem), index)
    if len(first) == held_out:
      break
  if len(first) < held_out:
    raise ValueError(f"held_out is {held_out}, the task has only {len(first)} distinct questions")
  chosen = Subset(task, tuple(first.values()))
  rest = exclude(task, chosen)
  assert_disjoint(rest, chosen)
  return rest, chosen


def assert_disjoint(train: Iterable[Problem], held_out: Iterable[Problem]) -> None:
  """Proves that no held-out question is trained on, by `question_key`.

  Raises:
    ValueError: one line with the first overlap and the number of them.
  """
  seen = {question_key(problem): problem for problem in held_out}
  overlaps = [(p, seen[key]) for p in train if (key := question_key(p)) in seen]
  if overlaps:
    trained, held = overlaps[0]
    raise ValueError(
      f"train problem {trained.id!r} repeats held-out {held.id!r}: {_shorten(held.prompt)!r}"
      f" ({len(overlaps)} train problems overlap)"
    )


def open_family(family: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
  """The reasoning-gym data set of a family; it has `__getitem__` and `score_answer(answer, entry)`.

  Raises:
    ValueError: unknown family or configuration key, or a value that the family refuses.
  """
  # Imported here: reasoning_gym loads all its families, 2 to 5 s.
  factory = importlib.import_module("reasoning_gym").factory
  if family not in factory.DATASETS:
    close = difflib.get_close_matches(family, factory.DATASETS, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"reasoning_gym has no family {family!r}{hint}")
  _, config_class = factory.DATASETS[family]
  known = {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
  unknown = sorted(set(config) - known)
  if unknown:
    raise ValueError(
      f"family {family!r}: unknown config key {unknown[0]!r}, expected one of {sorted(known)}"
    )
  try:
    return factory.create_dataset(family, seed=seed, size=size, **config)
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(f"family {family!r}: {error or 'refuses'} (config {dict(config)})") from error


def _family(label: str) -> str:
  return label.split("/", 1)[0]


def _weight(label: str, config: Mapping[str, Any]) -> float:
  weight = config.get("weight", 1.0)
  if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
    raise ValueError(f"family {label!r}: weight must be a positive number, found {weight!r}")
  return float(weight)


def _without_weight(config: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in config.items() if key != "weight"}


def _label_seed(seed: int, label: str) -> int:
  """A seed in [0, 2^31): some families hand it to NumPy, which takes 32 bits.

  Families draw problem i from `Random(seed + i)`, so neighbouring seeds would give shifted copies
  of the same problems; hashing puts them far apart.
  """
  digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
  return int.from_bytes(digest[:4], "big") >> 1


def _jsonl_problem(
  source: JsonlSource,
  index: int,
  path: pathlib.Path,
  prompt: str,
  answer: str,
  pattern: re.Pattern[str] | None,
) -> Problem:
  where, fields = source.where(index), source[index]
  question, reference = _text_field(where, fields, prompt), _text_field(where, fields, answer)
  if pattern is not None:
    matches = pattern.findall(reference)
    if not matches or not matches[-1].strip():
      raise ValueError(
        f"{where}: field {answer!r} has no match of {pattern.pattern!r}: {_shorten(reference)!r}"
      )
    reference = matches[-1]
  metadata = {"source": path.name, "index": index, "fields": fields}
  return Problem(f"{path.stem}/{index}", question, reference.strip(), metadata)


def _text_field(where: str, fields: Row, name: str) -> str:
  """The field as text; numbers as Python writes them."""
  value = fields[name]
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = repr(value)
  if not isinstance(value, str) or not value.strip():
    found = _shorten(repr(value))
    raise ValueError(f"{where}: field {name!r}: expected non-empty text, found {found}")
  return value


def _shorten(text: str, limit: int = 60) -> str:
  return text if len(text) <= limit else text[: limit - 3] + "..."
