"""Reading answers: what counts as a number or a tagged answer, and nothing hostile gets through."""

import time
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from pt_jax.rewards.answers import (
  answer_tag,
  has_foreign_digits,
  last_number,
  normalise,
  parse_number,
)

DETERMINISTIC = hypothesis.settings(max_examples=200, deadline=None, derandomize=True)


@pytest.mark.parametrize(
  "text, value",
  [
    ("5", 5),
    (" +5. ", 5),
    ("-0.50", Fraction(-1, 2)),
    ("\u22125", -5),  # the minus sign that typesetters use
    (".5", Fraction(1, 2)),
    ("007", 7),
    ("1,234,567.5", Fraction(2469135, 2)),
    ("$1,000", 1000),
    ("-$20", -20),
    ("3/4", Fraction(3, 4)),
    ("-6 / 8", Fraction(-3, 4)),
    ("0.5/2", Fraction(1, 4)),
    ("25%", Fraction(1, 4)),
    ("12.5 %", Fraction(1, 8)),
    ("25\\%", Fraction(1, 4)),
    ("1e3", 1000),
    ("2.5E-1", Fraction(1, 4)),
    ("1e999", 10**999),
    ("9" * 400, int("9" * 400)),
  ],
)
def test_numbers_that_are_read(text, value):
  assert parse_number(text) == value


NOT_NUMBERS = [
  "", " ", "-", ".", "$", "%", ",", "five", "nan", "NaN", "inf", "-Infinity", "1_000", "0x10", "1e",
  "1,23", "12,34,567", "1234,567", ",123", "1.2.3", "1 2", "5 apples", "--5", "1/0", "1/2/3", "1/",
  "/2", "9**9**9", "2^10", "(5)", "1e99999999", "1e1000", "\u0663", "\uff15", "\u00b2", "1\u0663",
  "9" * 401,
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_no_number(text):
  assert parse_number(text) is None


def test_percent_as_a_unit():
  assert parse_number("25%", percent=False) == 25
  assert parse_number("25", percent=False) == parse_number("25") == 25


@DETERMINISTIC
@hypothesis.given(st.integers(-(10**30), 10**30), st.integers(1, 10**9))
def test_numbers_come_back_as_written(number, denominator):
  assert parse_number(f"{number:,}") == number
  assert parse_number(f"${number}" if number >= 0 else f"-${-number}") == number
  assert parse_number(f"{number}/{denominator}") == Fraction(number, denominator)
  assert parse_number(f"{number}.25%") == (
    Fraction(abs(number) * 100 + 25, 10000) * (-1 if number < 0 else 1)
  )


@hypothesis.given(st.text(alphabet="0123456789+-.,eE/$% _\u0663\u2212nainf", max_size=12))
@DETERMINISTIC
def test_agrees_with_python_where_both_read(text):
  value = parse_number(text)
  try:
    python = float(text)
  except ValueError:
    return
  if value is not None:
    assert python in (float("inf"), float("-inf")) if abs(value) > 1e308 else float(value) == python
  elif text.isascii() and "_" not in text and python == python and abs(python) < 1e99:
    # Python reads more only in exponents of four digits and more ("1e0001").
    assert len(text.lower().partition("e")[2].strip().lstrip("+-")) > 3


@DETERMINISTIC
@hypothesis.given(st.text(max_size=200))
def test_any_text_is_survived(text):
  value = parse_number(text)
  assert value is None or any(c in "0123456789" for c in text)
  found = last_number(text)
  assert found is None or found in text
  answer = answer_tag(text)
  assert answer is None or answer in text
  assert normalise(normalise(text)) == normalise(text) or text.rstrip().endswith("..")


@pytest.mark.parametrize(
  "text, number",
  [
    ("She pays $1,234.50 for 3 of them", "3"),
    ("so the total is $1,234.50.", "$1,234.50"),
    ("= -5", "-5"),
    ("12-5", "5"),
    ("(2)-5", "5"),
    ("x-5", "5"),
    ("from 3 to -4.", "-4."),
    ("one half is 1/2!", "1/2"),
    ("that is 25%", "25%"),
    ("**18**", "18"),
    ("\\boxed{18}", "18"),
    ("1,2,3", "3"),
    ("10,000,5", "5"),
    ("1e5 kg", "1e5"),
    ("none", None),
    ("٣", None),
    ("", None),
  ],
)
def test_last_number(text, number):
  assert last_number(text) == number
  assert number is None or parse_number(number) is not None


@pytest.mark.parametrize(
  "text, answer",
  [
    ("<think>2+2</think><answer> 4 </answer>", "4"),
    ("<answer>4</answer> trailing", "4"),
    ("<answer></answer>", ""),
    ("<answer>a\nb</answer>", "a\nb"),
    ("4", None),
    ("<answer>4", None),
    ("4</answer>", None),
    ("</answer>4<answer>", None),
    ("<answer>4</answer><answer>5</answer>", None),
    ("<answer><answer>4</answer></answer>", None),
    ("<answer>4</answer></answer>", None),
    ("<ANSWER>4</ANSWER>", None),
    ("<answer >4</answer>", None),
  ],
)
def test_answer_tag(text, answer):
  assert answer_tag(text) == answer


def test_normalise_keeps_what_changes_the_meaning():
  assert normalise("  The\n Cat. ") == "the cat"
  assert normalise("e\u0301") == normalise("\u00e9")  # one letter, written in two ways
  assert normalise("2\u00b2") != "22"  # which compatibility forms (NFKC) would make of it
  assert normalise("-5") != normalise("5")
  assert normalise("1,5") != normalise("15")


def test_foreign_digits():
  assert has_foreign_digits("1\u0663")
  assert not has_foreign_digits("12 \u00e9\u00b2")


@pytest.mark.parametrize(
  "unit", ["9", "1,", "1,111", "<answer>", "-", "1/", " ", ".", "1e", "$", "\\%", "\u0663"]
)
def test_a_megabyte_takes_no_time(unit):
  text = unit * (1_000_000 // len(unit))
  start = time.perf_counter()
  parse_number(text), last_number(text), answer_tag(text), normalise(text), has_foreign_digits(text)
  assert time.perf_counter() - start < 5  # 0.3 s on an idle core; quadratic takes hours
