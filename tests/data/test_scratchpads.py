"""Scratchpads: worked by hand here, and scored by the families that ask the questions."""

import pytest

from pt_jax.data.scratchpads import SOLVERS, compact_prompt, demonstration, scratchpad, solve
from pt_jax.data.tasks import Problem, ReasoningGymTask, open_family

CONFIGS = {
  "chain_sum": {"max_terms": 4},
  "chain_sum/negative": {"allow_negation": True, "max_terms": 5, "max_digits": 2},
  "chain_sum/digits": {"max_terms": 5, "max_digits": 1},
  "products": {"max_digits": 3},
  "products/negative": {"allow_negation": True, "max_terms": 4, "max_digits": 2},
  "gcd": {"max_numbers": 4},
  "base_conversion": {"min_value": 1, "max_base": 36},
  "count_bits": {},
  "letter_counting": {"min_words": 1},
  "spell_backward": {},
}


def _problem(family: str, answer: str = "", **entry) -> Problem:
  return Problem("hand", "", answer, {"family": family, "entry": entry})


@pytest.mark.parametrize("label", CONFIGS)
def test_families_score_the_worked_answer_1(label):
  for problem in ReasoningGymTask({label: CONFIGS[label]}, seed=3, size=500):
    metadata = problem.metadata
    family = open_family(metadata["family"], metadata["config"], seed=0, size=1)
    entry = {"question": metadata["question"], "answer": problem.answer}
    entry["metadata"] = metadata["entry"]
    answer = solve(problem)[1]
    assert family.score_answer(answer, entry) == 1.0, (compact_prompt(problem), answer)
    assert family.score_answer(answer + "1", entry) != 1.0  # the scorer can say no


def test_every_solver_is_scored_above():
  assert {label.split("/")[0] for label in CONFIGS} == set(SOLVERS)


@pytest.mark.parametrize(
  "problem, prompt, working, answer",
  [
    (
      _problem("chain_sum", expression="347 + 285 - 91"),
      "347+285-91=",
      "347+285:7+5=12 4+8+1=13 3+2+1=6 632;632-91:2-1=1 13-9=4 6-1=5 541",
      "541",
    ),
    (  # below zero: 347 - 285 is worked, the sign is that of the larger; -62 - 95 adds magnitudes
      _problem("chain_sum", expression="285 - 347 - 95"),
      "285-347-95=",
      "347-285:7-5=2 14-8=6 3-2-1=0 -62;62+95:2+5=7 6+9=15 -157",
      "-157",
    ),
    (
      _problem("chain_sum", expression="5 - -5 - 10"),
      "5--5-10=",
      "5+5:5+5=10 10;10-10:0-0=0 1-1=0 0",
      "0",
    ),
    (
      _problem("products", expression="47 * 83"),
      "47*83=",
      "7*3=21 4*3+2=14 141;7*8=56 4*8+5=37 3760;141+3760:1+0=1 4+6=10 1+7+1=9 3 3901",
      "3901",
    ),
    (_problem("products", expression="-6 * 7"), "-6*7=", "6*7=42 42;-42", "-42"),
    (_problem("gcd", numbers=[36, 84]), "gcd(36,84)=", "84-36*2=12;36-12*3=0", "12"),
    (
      _problem("base_conversion", source_repr="31", source_base=8, target_base=3),
      "31_8>3=",
      "3*8+1=25;25/3=8r1 8/3=2r2 2/3=0r2",
      "221",
    ),
    (
      _problem("count_bits", number=201),
      "bits(201)=",
      "201:1 100:1 50:1 25:2 12:2 6:2 3:3 1:4",
      "4",
    ),
    (
      _problem("letter_counting", target_letter="e", span=["Eel", "the"]),
      "e in Eel the=",
      "Eel:2 the:3",
      "3",
    ),
    (_problem("spell_backward", word="hypo"), "backward(hypo)=", "h1y2p3o4", "opyh"),
  ],
)
def test_worked_by_hand(problem, prompt, working, answer):
  assert compact_prompt(problem) == prompt
  assert scratchpad(problem) == working
  assert demonstration(problem) == f"<think>{working}</think><answer>{answer}</answer>"


def test_the_reference_answer_is_not_read():
  right, wrong = (_problem("gcd", numbers=[36, 84], answer=answer) for answer in ("12", "99"))
  assert solve(right) == solve(wrong) == ("84-36*2=12;36-12*3=0", "12")


def test_family_without_solver_is_named():
  with pytest.raises(ValueError, match="'hand': no solver for family 'sudoku', expected one of"):
    compact_prompt(_problem("sudoku"))
