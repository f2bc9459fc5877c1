"""From what a model wrote to the answer in it: tags, normalised text, numbers.

Model output is hostile: everything here takes time linear in the text, accepts ASCII digits only,
and gives None rather than a guess when the text does not say exactly one thing.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

Extract = Callable[[str], str | None]  # completion text -> answer text, None if there is none

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

MAX_NUMBER = 400  # characters; a longer one is no answer, and exact arithmetic stays cheap

_SIGN = r"[+\-\u2212]"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|(?<![0-9])\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
_NUMBER = rf"\$?({_DECIMAL})(?:\s?/\s?({_DECIMAL}))?\s?(\\?%)?"
_WHOLE = re.compile(rf"\s*({_SIGN})?\s?{_NUMBER}\s*")
_ANYWHERE = re.compile(rf"(?:(?<![\w)\]}}]){_SIGN}\s?)?{_NUMBER}")


def answer_tag(text: str) -> str | None:
  """What stands between `<answer>` and `</answer>`, stripped.

  None unless each tag occurs exactly once, in that order: two answers are not an answer.
  """
  if text.count("<answer>") != 1 or text.count("</answer>") != 1:
    return None
  before, _, after = text.partition("<answer>")
  return after.partition("</answer>")[0].strip() if "</answer>" not in before else None


def last_number(text: str) -> str | None:
  """The last number in the text as it is written, for example `-1,234.5`, `$3`, `1/2` or `25%`.

  A minus after a digit, a letter or a closing bracket is an operator: `12-5` ends in 5.
  """
  last = None
  for last in _ANYWHERE.finditer(text):  # noqa: B007, the last match is meant
    pass
  return None if last is None else last.group().strip()


def normalise(text: str) -> str:
  """Unicode NFC, case folded, runs of whitespace made one space, one final full stop dropped."""
  return " ".join(unicodedata.normalize("NFC", text).casefold().split()).removesuffix(".").rstrip()


def parse_number(text: str, *, percent: bool = True) -> Fraction | None:
  """The exact value of a number that is the whole text, else None.

  Read: sign, `$`, thousands separators in the right places, decimals, an exponent of at most three
  digits, a fraction `a/b`, `%`. Not read: NaN, infinity, expressions, digits of other scripts,
  more than `MAX_NUMBER` characters, a denominator of 0.

  Args:
    text: what may be a number.
    percent: whether `%` divides by 100; False drops it as a unit, so that "25%" is 25.
  """
  match = _WHOLE.fullmatch(text) if len(text) <= MAX_NUMBER else None
  if match is None:
    return None
  sign, numerator, denominator, per_cent = match.groups()
  value, divisor = _exact(numerator), _exact(denominator or "1")
  if divisor == 0:
    return None
  value /= divisor * (100 if per_cent and percent else 1)
  return -value if sign in ("-", "\u2212") else value


def has_foreign_digits(text: str) -> bool:
  """Whether the text has decimal digits outside ASCII; Python's `int` and `Decimal` take them."""
  return not text.isascii() and any(c.isdecimal() and not c.isascii() for c in text)


def _exact(text: str) -> Fraction:
  return Fraction(Decimal(text.replace(",", "")))
