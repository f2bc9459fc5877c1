"""Worked scratchpads: the school method, digit by digit, for some reasoning-gym families.

They are the demonstrations of a cold start. Every number in one is derived from what stands before
it (columns, carries, running counts); the reference answer is never read. `compact_prompt` shortens
a family's wordy question to a line that a byte-level model can afford. Prompt, working, answer:

  chain_sum        347+285-91=  347+285:7+5=12 4+8+1=13 3+2+1=6 632;
                                632-91:2-1=1 13-9=4 6-1=5 541  541
  products         47*83=  7*3=21 4*3+2=14 141;7*8=56 4*8+5=37 3760;
                           141+3760:1+0=1 4+6=10 1+7+1=9 3 3901  3901
  gcd              gcd(84,36)=  84-36*2=12;36-12*3=0  12
  base_conversion  31_8>3=  3*8+1=25;25/3=8r1 8/3=2r2 2/3=0r2  221
  count_bits       bits(201)=  201:1 100:1 50:1 25:2 12:2 6:2 3:3 1:4  4
  letter_counting  e in free the=  free:2 the:3  3
  spell_backward   backward(hypo)=  h1y2p3o4  opyh

A line of columns ends in the number that their low digits spell, ones first, with the last carry in
front. Signed sums work on magnitudes; the sign appears at the end of the line.
"""

import dataclasses
import itertools
import string
from collections.abc import Callable
from typing import Any

from pt_jax.data.tasks import Problem


@dataclasses.dataclass(frozen=True)
class Solver:
  """How one family is asked in short and worked out."""

  ask: Callable[[dict[str, Any]], str]  # the family's own metadata -> compact prompt
  work: Callable[[dict[str, Any]], tuple[list[str], str]]  # -> lines of working, answer


def compact_prompt(problem: Problem) -> str:
  """The question as one short line, for example `347+285-91=`.

  Raises:
    ValueError: the family has no solver here.
  """
  return _solver(problem).ask(problem.metadata["entry"])


def solve(problem: Problem) -> tuple[str, str]:
  """`(working, answer)`, both derived by the family's solver.

  Raises:
    ValueError: the family has no solver here.
  """
  lines, answer = _solver(problem).work(problem.metadata["entry"])
  return ";".join(lines), answer


def scratchpad(problem: Problem) -> str:
  """The working alone, what stands between `<think>` and `</think>`."""
  return solve(problem)[0]


def demonstration(problem: Problem) -> str:
  """The whole completion that a cold start imitates: working, then answer, in their tags."""
  working, answer = solve(problem)
  return f"<think>{working}</think><answer>{answer}</answer>"


def _solver(problem: Problem) -> Solver:
  family = problem.metadata.get("family")
  if family not in SOLVERS:
    raise ValueError(
      f"problem {problem.id!r}: no solver for family {family!r}, expected one of {sorted(SOLVERS)}"
    )
  return SOLVERS[family]


def _add(a: int, b: int) -> tuple[list[str], int]:
  """Columns of a + b from the ones up, a carry as a third term: `7+5=12`, `4+8+1=13`, `3+2+1=6`."""
  steps, digits, carry = [], [], 0
  for column in itertools.zip_longest(str(a)[::-1], str(b)[::-1]):
    terms = [digit for digit in column if digit is not None] + ["1"] * carry
    value = sum(map(int, terms))
    steps.append("+".join(terms) + (f"={value}" if len(terms) > 1 else ""))
    carry, digit = divmod(value, 10)
    digits.append(digit)
  return steps, _spell([*digits, carry])


def _subtract(a: int, b: int) -> tuple[list[str], int]:
  """Columns of a - b for a >= b; one that borrows shows it, the next pays: `13-9=4`, `6-1=5`."""
  steps, digits, borrow = [], [], 0
  for top, bottom in itertools.zip_longest(str(a)[::-1], str(b)[::-1]):
    taken = [bottom] * (bottom is not None) + ["1"] * borrow
    value = int(top) - sum(map(int, taken))
    borrow = int(value < 0)
    digits.append(value + 10 * borrow)
    shown = "-".join([str(int(top) + 10 * borrow), *taken])
    steps.append(f"{shown}={digits[-1]}" if taken else shown)
  return steps, _spell(digits)


def _times_digit(a: int, digit: int) -> tuple[list[str], int]:
  """Columns of a * digit with carries: `7*8=56`, `4*8+5=37`."""
  steps, digits, carry = [], [], 0
  for top in str(a)[::-1]:
    value = int(top) * digit + carry
    steps.append(f"{top}*{digit}" + (f"+{carry}" if carry else "") + f"={value}")
    carry, low = divmod(value, 10)
    digits.append(low)
  return steps, _spell([*digits, carry])


def _spell(digits: list[int]) -> int:
  return sum(digit * 10**place for place, digit in enumerate(digits))


def _accumulate(total: int, term: int) -> tuple[str, int]:
  """One line for total + term: the magnitudes to add or subtract, their columns, the new total.

  `347+285:7+5=12 4+8+1=13 3+2+1=6 632`. What is added or subtracted is written down before its
  columns, so that a column is always found at the same distance, whatever the prompt looks like.
  """
  if (total < 0) == (term < 0):
    first, second, operator, combine = total, term, "+", _add
  else:
    first, second = (total, term) if abs(total) >= abs(term) else (term, total)
    operator, combine = "-", _subtract
  steps, size = combine(abs(first), abs(second))
  sign = "-" if first < 0 and size else ""
  columns = " ".join(steps)
  return f"{abs(first)}{operator}{abs(second)}:{columns} {sign}{size}", -size if sign else size


def _work_chain_sum(entry: dict[str, Any]) -> tuple[list[str], str]:
  first, *rest = entry["expression"].split()
  total, lines = int(first), []
  for operator, term in zip(rest[::2], rest[1::2]):
    line, total = _accumulate(total, int(term) if operator == "+" else -int(term))
    lines.append(line)
  return lines, str(total)


def _work_products(entry: dict[str, Any]) -> tuple[list[str], str]:
  """Long multiplication: one line for each digit of the second factor, then the partial sums."""
  factors = [int(term) for term in entry["expression"].split(" * ")]
  lines, total = [], abs(factors[0])
  for factor in factors[1:]:
    partial = []
    for place, digit in enumerate(str(abs(factor))[::-1]):
      steps, product = _times_digit(total, int(digit))
      partial.append(product * 10**place)
      lines.append(f"{' '.join(steps)} {partial[-1]}")
    total = partial[0]
    for product in partial[1:]:
      line, total = _accumulate(total, product)
      lines.append(line)
  if total and sum(factor < 0 for factor in factors) % 2:
    total = -total
    lines.append(str(total))
  return lines, str(total)


def _work_gcd(entry: dict[str, Any]) -> tuple[list[str], str]:
  """Euclid: what is left of the larger number after taking the smaller as often as it goes."""
  divisor, *rest = entry["numbers"]
  lines = []
  for number in rest:
    large, divisor = max(number, divisor), min(number, divisor)
    while divisor:
      times, left = divmod(large, divisor)
      lines.append(f"{large}-{divisor}*{times}={left}")
      large, divisor = divisor, left
    divisor = large
  return lines, str(divisor)


def _work_base_conversion(entry: dict[str, Any]) -> tuple[list[str], str]:
  """Horner into decimal, then repeated division; the remainders from the last spell the answer."""
  source, target = entry["source_base"], entry["target_base"]
  digits = [int(digit, source) for digit in entry["source_repr"]]
  value, steps, divisions, answer = digits[0], [], [], ""
  for digit in digits[1:]:
    steps.append(f"{value}*{source}+{digit}={value * source + digit}")
    value = value * source + digit
  while value or not answer:
    quotient, remainder = divmod(value, target)
    divisions.append(f"{value}/{target}={quotient}r{remainder}")
    value, answer = quotient, string.printable[remainder] + answer
  return [" ".join(line) for line in (steps, divisions) if line], answer


def _work_count_bits(entry: dict[str, Any]) -> tuple[list[str], str]:
  """Halve down to 1, counting the odd numbers on the way."""
  number, odd, steps = entry["number"], 0, []
  while number:
    odd += number % 2
    steps.append(f"{number}:{odd}")
    number //= 2
  return [" ".join(steps)], str(odd)


def _work_letter_counting(entry: dict[str, Any]) -> tuple[list[str], str]:
  """Copy the words with a running count."""
  count, steps = 0, []
  for word in entry["span"]:
    count += sum(letter == entry["target_letter"] for letter in word.lower())
    steps.append(f"{word}:{count}")
  return [" ".join(steps)], str(count)


def _work_spell_backward(entry: dict[str, Any]) -> tuple[list[str], str]:
  """Number the letters, then read them from the last."""
  numbered = [f"{letter}{place}" for place, letter in enumerate(entry["word"], start=1)]
  return ["".join(numbered)], "".join(pair[0] for pair in reversed(numbered))


SOLVERS = {
  "chain_sum": Solver(lambda e: e["expression"].replace(" ", "") + "=", _work_chain_sum),
  "products": Solver(lambda e: e["expression"].replace(" ", "") + "=", _work_products),
  "gcd": Solver(lambda e: f"gcd({','.join(map(str, e['numbers']))})=", _work_gcd),
  "base_conversion": Solver(
    lambda e: f"{e['source_repr']}_{e['source_base']}>{e['target_base']}=", _work_base_conversion
  ),
  "count_bits": Solver(lambda e: f"bits({e['number']})=", _work_count_bits),
  "letter_counting": Solver(
    lambda e: f"{e['target_letter']} in {' '.join(e['span'])}=", _work_letter_counting
  ),
  "spell_backward": Solver(lambda e: f"backward({e['word']})=", _work_spell_backward),
}
