"""Verifiers: plain functions from a completion to a score in [0, 1].

They compare with the problem's reference answer; none of them hangs, and none raises on what a
model wrote. A reference that is itself unusable is a ValueError, since that is the data's fault.
Options are bound with `functools.partial(numeric, relative=0.01)`.
"""

import dataclasses
import functools
import pickle
import re
from fractions import Fraction
from typing import Any

from pt_jax.data.tasks import Problem, open_family
from pt_jax.rewards.answers import (
  TAGS,
  Extract,
  answer_tag,
  has_foreign_digits,
  last_number,
  normalise,
  parse_number,
)
from pt_jax.rewards.sandbox import Sandbox
from pt_jax.rollout.rollouts import StopReason

MAX_EXPRESSION = 1000  # characters of an answer that computer algebra is asked to read
MAX_FAMILY_ANSWER = 1 << 16  # characters of an answer that a family's scorer is asked to read


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled answer to a problem."""

  problem: Problem
  text: str  # decoded, tags kept, without the stop token
  tokens: int  # length, the stop token included
  stop: StopReason


def exact(completion: Completion, *, extract: Extract = answer_tag) -> float:
  """1 if the answer equals the reference after `normalise` (case, spaces, final full stop)."""
  answer = extract(completion.text)
  return float(answer is not None and normalise(answer) == normalise(completion.problem.answer))


def numeric(
  completion: Completion,
  *,
  extract: Extract = answer_tag,
  relative: float = 0.0,
  absolute: float = 0.0,
  percent: bool = True,
) -> float:
  """1 if |answer - reference| <= max(relative * |reference|, absolute), in exact arithmetic.

  Both are read by `parse_number`: thousands separators, `$`, fractions, percent. The default is
  equality, so that 1000001 is not 1000000.

  Args:
    completion: what to score.
    extract: finds the answer in the text.
    relative: tolerance as a share of the reference.
    absolute: tolerance in the reference's unit.
    percent: whether "25%" is 0.25; False reads it as 25.

  Raises:
    ValueError: the reference answer is not a number.
  """
  problem = completion.problem
  reference = parse_number(problem.answer, percent=percent)
  if reference is None:
    raise ValueError(f"problem {problem.id!r}: reference answer {problem.answer!r} is no number")
  answer = extract(completion.text)
  value = None if answer is None else parse_number(answer, percent=percent)
  if value is None:
    return 0.0
  allowed = max(Fraction(relative) * abs(reference), Fraction(absolute))
  return float(abs(value - reference) <= allowed)


last_number_equals = functools.partial(numeric, extract=last_number)
"""`numeric` on the last number of the whole text; for gsm8k bind `percent=False` as well."""


def think_answer(completion: Completion, *, graded: bool = False) -> float:
  """1 if the text is `<think>...</think>`, then `<answer>...</answer>`, and nothing else.

  Each tag exactly once, in that order, something between both pairs; whitespace around is allowed.
  Graded: one fifth for each tag that occurs exactly once, one fifth for the whole shape.
  """
  text = completion.text
  single = [text.count(tag) == 1 for tag in TAGS]
  whole = all(single) and _has_shape(text.strip())
  return (sum(single) + whole) / 5 if graded else float(whole)


def family_score(
  completion: Completion, *, extract: Extract = answer_tag, strict: bool = False
) -> float:
  """The reasoning-gym family's own score of the answer, cut to [0, 1]; 0 without an answer.

  Most families give partial credit to an answer that merely contains the reference, which a policy
  learns to exploit; `strict` keeps only scores of exactly 1. (Not more: spell_backward adds up a
  floating-point share for each letter, 1.0000000000000002 for some right words with more behind.)
  Families that score by comparing strings or decimals run here, the others in the sandbox. Answers
  with digits of other scripts score 0 where the reference has none.

  Raises:
    ValueError: the problem is not from a `ReasoningGymTask`.
  """
  problem = completion.problem
  family = problem.metadata.get("family")
  if family is None:
    raise ValueError(f"problem {problem.id!r}: no 'family' in its metadata")
  answer = extract(completion.text)
  if answer is None or len(answer) > MAX_FAMILY_ANSWER:
    return 0.0
  if problem.answer.isascii() and has_foreign_digits(answer):
    return 0.0
  score = _score_by_family(family, problem, answer)
  return float(score == 1.0) if strict else min(1.0, max(0.0, score))


def math_equal(
  completion: Completion, *, extract: Extract = answer_tag, sandbox: Sandbox | None = None
) -> float:
  """1 if the answer means the same as the reference by math_verify: LaTeX, sets, intervals, units.

  It reads "25%" as both 25 and 0.25. Runs in `sandbox` (default `math_sandbox()`), which counts
  what did not finish. An answer of several `$...$` parts scores 0: it would be a choice.
  """
  answer = extract(completion.text)
  if answer is None or len(answer) > MAX_EXPRESSION:
    return 0.0
  answer = answer.strip().strip("$").strip()
  if not answer or "$" in answer:
    return 0.0
  return (sandbox or math_sandbox()).score(completion.problem.answer.strip("$ "), answer)


def _has_shape(text: str) -> bool:
  """For a text that holds each tag exactly once."""
  think, close_think, rest = text.partition("</think>")
  between, answer_open, answer = rest.partition("<answer>")
  return bool(
    close_think
    and answer_open
    and think.startswith("<think>")
    and think.removeprefix("<think>").strip()
    and not between.strip()
    and answer.endswith("</answer>")
    and answer.removesuffix("</answer>").strip()
  )


@functools.cache
def math_sandbox() -> Sandbox:
  """The workers that `math_equal` shares."""
  return Sandbox("math")


@functools.cache
def family_sandbox() -> Sandbox:
  """The workers that `family_score` shares."""
  return Sandbox("family")


# Families whose scorer hands the answer to `eval` or to sympy's `parse_expr`, which evaluates it.
EVALUATED = frozenset({
  "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
  "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
})  # fmt: skip
# Code rather than mathematics: attributes, dunders, keywords, calls and subscripts of other names.
_CODE = re.compile(
  r"__|\.\s*[^\W\d]|\b(?:import|lambda|for|if|yield|await)\b|:="
  r"|\b(?!(?:sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs)\b)"
  r"[^\W\d]\w+\s*[\(\[]"
)


# Families with a scorer of their own that only compares decimals or letters.
COMPARED = frozenset({"chain_sum", "products", "spell_backward"})


def _score_by_family(family: str, problem: Problem, answer: str) -> float:
  metadata = problem.metadata
  config = metadata["config"]
  entry = {
    "question": metadata["question"],
    "answer": problem.answer,
    "metadata": metadata["entry"],
  }
  data_set = _data_set(family, pickle.dumps(config))
  # The scorer that families inherit only compares strings.
  inherited = type(data_set).score_answer.__module__ == "reasoning_gym.dataset"
  if inherited or family in COMPARED:
    return float(data_set.score_answer(answer, entry))
  if family in EVALUATED and _CODE.search(answer):
    return 0.0
  return family_sandbox().score(family, config, entry, answer)


@functools.lru_cache(maxsize=256)
def _data_set(family: str, config: bytes) -> Any:
  return open_family(family, pickle.loads(config), seed=0, size=1)
