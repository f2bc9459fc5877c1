"""Verifiers: right answers score 1, wrong and hostile ones 0, in any thread, in bounded time."""

import concurrent.futures
import functools
import inspect
import pathlib
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from pt_jax.data.tasks import Problem, ReasoningGymTask
from pt_jax.rewards import verifiers
from pt_jax.rewards.sandbox import Sandbox
from pt_jax.rewards.verifiers import (
  Completion,
  exact,
  family_score,
  last_number_equals,
  math_equal,
  numeric,
  think_answer,
)
from pt_jax.rollout.rollouts import StopReason

DETERMINISTIC = hypothesis.settings(max_examples=200, deadline=None, derandomize=True)

HOSTILE = [
  "",
  "9**9**9",
  "9" * 100_000,
  "5" * 10_000_000,
  "<answer>" * 1000,
  "</answer>5<answer>",
  "<answer>5</answer><answer>5</answer>",
  "<answer>nan</answer>",
  "<answer>inf</answer>",
  "<answer>-Infinity</answer>",
  "<answer>sNaN</answer>",
  "<answer>\u0665</answer>",
  "<answer>\uff15</answer>",
  "<answer>1e999999999</answer>",
  "<answer>1 2 3 4 6 7</answer>",
  "<answer>" + "(" * 100_000 + "</answer>",
  "<answer>\x00</answer>",
  "<answer>\ud800</answer>",
]


def _completion(text: str, reference: str = "5", **metadata) -> Completion:
  return Completion(Problem("p1", "?", reference, metadata), text, len(text), StopReason.TOKEN)


def _tagged(answer: str, reference: str = "5", **metadata) -> Completion:
  return _completion(f"<think>so</think><answer>{answer}</answer>", reference, **metadata)


def _gcd(answer: str) -> Completion:
  problem = ReasoningGymTask({"gcd": {"max_value": 50}}, seed=0, size=1)[0]
  return Completion(problem, f"<answer>{answer}</answer>", 1, StopReason.TOKEN)


@pytest.fixture(scope="module")
def sandbox():
  with_workers = Sandbox("math", workers=2, timeout=1.5)
  yield with_workers
  with_workers.close()


@pytest.mark.parametrize(
  "answer, reference, score",
  [
    ("Paris.", "paris", 1),
    ("New  York", "new york", 1),
    ("5", "5.0", 0),
    ("", "5", 0),
    ("55", "5", 0),
  ],
)
def test_exact(answer, reference, score):
  assert exact(_tagged(answer, reference)) == score


@pytest.mark.parametrize(
  "answer, reference, score",
  [
    ("1,000", "1000", 1),
    ("$5.00", "5", 1),
    ("1/2", "0.5", 1),
    ("50%", "0.5", 1),
    ("50%", "50", 0),
    ("1000001", "1000000", 0),
    ("0.333", "1/3", 0),
    ("-5", "5", 0),
    ("5 or 6", "5", 0),
    ("5kg", "5", 0),
  ],
)
def test_numeric(answer, reference, score):
  assert numeric(_tagged(answer, reference)) == score


def test_numeric_tolerances():
  close = _tagged("101", "-100"), _tagged("-101", "-100"), _tagged("-101.01", "-100")
  assert [numeric(c, relative=0.01) for c in close] == [0, 1, 0]
  assert [numeric(c, absolute=1) for c in close] == [0, 1, 0]
  assert numeric(_tagged("0.001", "0"), relative=0.5) == 0
  assert numeric(_tagged("25%", "25"), percent=False) == 1
  # beyond the range of float64
  assert numeric(_tagged("1.005e400", "1e400"), relative=0.01) == 1
  assert numeric(_tagged("-1e400", "1e400"), relative=0.01) == 0


def test_numeric_refuses_a_reference_that_is_no_number():
  with pytest.raises(ValueError, match="problem 'p1': reference answer 'blue' is no number"):
    numeric(_tagged("5", "blue"))


def test_last_number_reads_the_whole_text():
  assert last_number_equals(_completion("3 and 2 make 5.")) == 1
  assert last_number_equals(_completion("5 is 3 and 2")) == 0
  assert last_number_equals(_completion("no idea")) == 0


WHOLE = "<think>a</think> <answer>b</answer>"


@pytest.mark.parametrize(
  "text, strict, graded",
  [
    (WHOLE, 1, 1),
    (f"\n{WHOLE}\n", 1, 1),
    (f"well, {WHOLE}", 0, 0.8),
    (f"{WHOLE} done", 0, 0.8),
    ("<think>a</think> so <answer>b</answer>", 0, 0.8),
    ("<think> </think><answer>b</answer>", 0, 0.8),
    ("<think>a</think><answer></answer>", 0, 0.8),
    ("<answer>b</answer><think>a</think>", 0, 0.8),
    ("<think>a<answer>b</answer></think>", 0, 0.8),
    ("<answer><think>a</think></answer>", 0, 0.8),
    ("<think>a</think><answer>b", 0, 0.6),
    ("<think>a</think>b", 0, 0.4),
    ("<think>a</think><think>c</think><answer>b</answer>", 0, 0.4),
    ("<think><think>a</think></think><answer>b</answer>", 0, 0.4),
    (WHOLE + WHOLE, 0, 0),
    ("", 0, 0),
  ],
)
def test_think_answer(text, strict, graded):
  assert think_answer(_completion(text)) == strict
  assert think_answer(_completion(text), graded=True) == pytest.approx(graded)


def test_family_scores_as_the_family_does():
  reference = _gcd("").problem.answer
  assert family_score(_gcd(reference)) == 1
  # The family gives a longer answer that holds the reference its share of the characters.
  padded = f"{reference} or so"
  assert family_score(_gcd(padded)) == pytest.approx(len(reference) / len(padded))
  assert family_score(_gcd(padded), strict=True) == 0
  assert family_score(_gcd(reference), strict=True) == 1


def test_family_scorers_take_no_foreign_digits():
  """Decimal("\u0661") is 1 to Python, and to the scorer of chain_sum."""
  problem = ReasoningGymTask({"chain_sum": {}}, seed=0, size=1)[0]
  foreign = "".join(chr(0x0660 + int(c)) if c.isdigit() else c for c in problem.answer)
  for answer, score in ((problem.answer, 1), (foreign, 0)):
    text = f"<answer>{answer}</answer>"
    assert family_score(Completion(problem, text, 1, StopReason.TOKEN)) == score


def test_strict_takes_no_rounding_for_a_full_score():
  """spell_backward gives a nine-letter word with more after it 9 * (1/9) = 1.0000000000000002."""
  config = {"min_word_len": 9, "max_word_len": 9}
  problem = ReasoningGymTask({"spell_backward": config}, seed=0, size=1)[0]
  right, longer = (
    Completion(problem, f"<answer>{problem.answer}{more}</answer>", 1, StopReason.TOKEN)
    for more in ("", "x")
  )
  assert family_score(right, strict=True) == 1
  assert family_score(longer, strict=True) == 0


def test_family_score_needs_a_family():
  with pytest.raises(ValueError, match="problem 'p1': no 'family' in its metadata"):
    family_score(_tagged("5"))


def test_evaluated_families_are_all_known():
  """Families whose scoring code evaluates the answer must be guarded; this finds new ones."""
  from reasoning_gym.factory import DATASETS

  def evaluates(cls) -> bool:
    methods = inspect.getmembers(cls, inspect.isfunction)
    scoring = [f for name, f in methods if "score" in name or "pars" in name]
    source = "".join(map(inspect.getsource, scoring)).replace('eval(entry["answer"])', "")
    return any(call in source for call in (" eval(", "(eval(", "in eval(", ".parse_expr("))

  # countdown and puzzle24 import sympy's parse_expr by name; propositional_logic has its own.
  by_name = {"countdown", "puzzle24"}
  found = {name for name, (cls, _) in DATASETS.items() if evaluates(cls)}
  assert found | by_name == verifiers.EVALUATED


@pytest.mark.parametrize("family", ["spiral_matrix", "polynomial_multiplication", "countdown"])
def test_answers_are_not_run_as_code(family, tmp_path):
  target = tmp_path / "written"
  problem = ReasoningGymTask({family: {}}, seed=0, size=1)[0]
  for code in (
    f"__import__('pathlib').Path({str(target)!r}).touch()",
    f"open({str(target)!r}, 'w')",
    f"[open ({str(target)!r}, 'w')]",
    "().__class__.__base__",
    "exec('1')",
    "[c for c in (1,)]",
  ):
    completion = Completion(problem, f"<answer>{code}</answer>", 1, StopReason.TOKEN)
    assert family_score(completion, strict=True) == 0
  assert not pathlib.Path(target).exists()


def test_guard_leaves_mathematics_alone():
  for answer in (
    "x**2*sin(3*x) + 2.5*log(x) + C",
    "(4 + 3) * (2 - 1)",
    "[[1, 2], [3, 4]]",
    "4*x(2)",
  ):
    assert not verifiers._CODE.search(answer), answer


def test_families_that_evaluate_are_scored_and_cut_short(monkeypatch):
  sandbox = Sandbox("family", workers=1, timeout=1.0)
  monkeypatch.setattr(verifiers, "family_sandbox", lambda: sandbox)
  problem = ReasoningGymTask({"polynomial_multiplication": {}}, seed=0, size=1)[0]
  score = lambda text: family_score(Completion(problem, text, 1, StopReason.TOKEN))
  assert score(f"<answer>{problem.answer}</answer>") == 1
  assert score("<answer>x + 1</answer>") < 1
  assert sandbox.timeouts == 0
  assert score("<answer>9**9**9**9</answer>") == 0
  assert sandbox.timeouts + sandbox.crashes + sandbox.errors == 1
  sandbox.close()


@pytest.mark.parametrize(
  "answer, reference, score",
  [
    ("\\frac{1}{2}", "0.5", 1),
    ("$1/2$", "\\frac12", 1),
    ("(x+1)^2", "x^2+2x+1", 1),
    ("2\\sqrt{2}", "\\sqrt{8}", 1),
    ("\\{2, 1\\}", "\\{1,2\\}", 1),
    ("$1,234", "1234", 1),
    ("x=5", "5", 1),
    ("5 or 6", "5", 0),
    ("$6$ $5$", "5", 0),
    ("(x+1)^3", "x^2+2x+1", 0),
    ("nan", "5", 0),
    ("\u0665", "5", 0),
    ("", "5", 0),
  ],
)
def test_math_equal(sandbox, answer, reference, score):
  assert math_equal(_tagged(answer, reference), sandbox=sandbox) == score


def test_math_equal_off_the_main_thread_and_over_time(sandbox):
  """math_verify's own timeouts raise or do nothing in a thread; the sandbox's must hold."""
  answers = ["5", "2^{2^{40}}", "10/2", "9^{9^{9}}", "5.0", "6"]
  before, start = sandbox.timeouts, time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    scores = pool.map(lambda a: math_equal(_tagged(a), sandbox=sandbox), answers)
  assert list(scores) == [1, 0, 1, 0, 1, 0]
  assert sandbox.timeouts - before == 2
  assert time.perf_counter() - start < 60  # two workers are killed and started again


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:24]))
def test_hostile_text_scores_0_and_does_not_hang(text, sandbox):
  start = time.perf_counter()
  completion = _completion(text)
  for verify in (exact, numeric, think_answer, functools.partial(math_equal, sandbox=sandbox)):
    assert verify(completion) == 0
  assert 0 <= think_answer(completion, graded=True) < 1
  family = Completion(_gcd("").problem, text, 1, StopReason.TOKEN)
  assert family_score(family, strict=True) == 0
  assert time.perf_counter() - start < 30


@hypothesis.given(st.text(max_size=60), st.text(max_size=30))
@DETERMINISTIC
def test_any_text_gets_a_score(before, answer):
  gcd = _gcd("").problem
  for text in (before, f"{before}<answer>{answer}</answer>"):
    completion = _completion(text)
    family = Completion(gcd, text, 1, StopReason.LENGTH)
    for score in (
      exact(completion),
      numeric(completion),
      last_number_equals(completion),
      think_answer(completion, graded=True),
      family_score(family),
    ):
      assert 0 <= score <= 1


@DETERMINISTIC
@hypothesis.given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_only_the_right_integer_scores(value, reference):
  right = float(value == reference)
  assert numeric(_tagged(f"{value:,}", str(reference))) == right
  assert exact(_tagged(str(value), str(reference))) == right
  assert last_number_equals(_completion(f"it is {value}", str(reference))) == right
