"""Tasks: the same problem for the same index, clear errors, and train and held-out kept apart."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from pt_jax.data.tasks import (
  JsonlTask,
  Problem,
  ReasoningGymTask,
  Subset,
  assert_disjoint,
  exclude,
  open_family,
  question_key,
  split_disjoint,
)

MIX = {
  "chain_sum": {"weight": 3, "max_terms": 3, "max_digits": 2},
  "gcd": {"max_value": 99},
  "chain_sum/long": {"min_digits": 6, "max_digits": 6},
}
GSM8K = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def _listed(*questions: str) -> list[Problem]:
  return [Problem(f"p{i}", question, "1", {}) for i, question in enumerate(questions)]


def test_same_index_same_problem_in_any_order():
  task, again = (ReasoningGymTask(MIX, seed=5, size=300) for _ in range(2))
  backwards = [again[i] for i in reversed(range(300))]
  assert list(task) == backwards[::-1]
  assert len({problem.id for problem in task}) == 300


def test_problems_do_not_depend_on_the_process():
  """Python's string hashes differ from process to process; the draws must not."""
  program = (
    "from pt_jax.data.tasks import ReasoningGymTask\n"
    f"print([p.prompt for p in ReasoningGymTask({MIX!r}, seed=5, size=20)])"
  )
  printed = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
    env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)},
  ).stdout
  task = ReasoningGymTask(MIX, seed=5, size=20)
  assert printed.strip() == str([problem.prompt for problem in task])


def test_size_does_not_move_problems():
  short, long = (ReasoningGymTask(MIX, seed=5, size=size) for size in (10, 1000))
  assert [p.prompt for p in short] == [long[i].prompt for i in range(10)]


def test_weights_are_shares():
  labels = [p.metadata["label"] for p in ReasoningGymTask(MIX, seed=1, size=5000)]
  # 3 : 1 : 1; four standard deviations of a share of 0.6 in 5000 draws are 0.028.
  assert labels.count("chain_sum") / 5000 == pytest.approx(0.6, abs=0.028)
  assert labels.count("chain_sum/long") / 5000 == pytest.approx(0.2, abs=0.023)


def test_neighbouring_seeds_are_not_shifted_copies():
  """reasoning_gym draws problem i from Random(seed + i): raw seeds 0 and 1 share all but one."""
  config = {"min_digits": 6, "max_digits": 6}
  raw = [open_family("chain_sum", config, seed=seed, size=50) for seed in (0, 1)]
  assert raw[0][1]["question"] == raw[1][0]["question"]
  tasks = [ReasoningGymTask({"chain_sum": config}, seed=seed, size=200) for seed in (0, 1)]
  assert_disjoint(*tasks)


def test_two_labels_of_one_family_draw_apart():
  config = {"min_digits": 6, "max_digits": 6}
  first, second = (
    {p.prompt for p in ReasoningGymTask({label: config}, seed=0, size=200)}
    for label in ("chain_sum/a", "chain_sum/b")
  )
  assert not first & second


def test_metadata_holds_what_the_family_scorer_needs():
  task = ReasoningGymTask(MIX, seed=0, size=20, prompt=lambda p: p.metadata["family"] + "?")
  for problem in task:
    metadata = problem.metadata
    family = open_family(metadata["family"], metadata["config"], seed=0, size=1)
    entry = {"question": metadata["question"], "answer": problem.answer}
    score = family.score_answer(problem.answer, {**entry, "metadata": metadata["entry"]})
    assert score == 1.0
    assert problem.prompt == metadata["family"] + "?"
    assert "weight" not in metadata["config"]


@pytest.mark.parametrize(
  "families, size, expected",
  [
    ({}, 1, "families is empty"),
    ({"chain_sum": {}}, 0, "size must be at least 1, found 0"),
    ({"chain_sums": {}}, 1, "no family 'chain_sums', did you mean 'chain_sum'"),
    ({"chain_sum": {"max_digit": 2}}, 1, "unknown config key 'max_digit', expected one of"),
    ({"chain_sum": {"seed": 2}}, 1, "unknown config key 'seed'"),
    ({"chain_sum": {"max_terms": 0}}, 1, "'chain_sum': max_terms must be >= min_terms"),
    ({"chain_sum": {"weight": 0}}, 1, "'chain_sum': weight must be a positive number, found 0"),
    ({"chain_sum": {"weight": float("nan")}}, 1, "weight must be a positive number, found nan"),
  ],
)
def test_bad_mix_is_one_clear_line(families, size, expected):
  with pytest.raises(ValueError, match=expected) as caught:
    ReasoningGymTask(families, seed=0, size=size)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-1, 3])
def test_index_out_of_range(index):
  with pytest.raises(IndexError, match=f"problem {index} of a task of 3"):
    ReasoningGymTask({"gcd": {}}, seed=0, size=3)[index]


def test_ten_thousand_problems_take_seconds():
  start = time.perf_counter()
  assert sum(1 for _ in ReasoningGymTask(MIX, seed=0, size=10_000)) == 10_000
  assert time.perf_counter() - start < 5  # 0.3 s on an idle core


def test_jsonl_reads_prompt_and_answer(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [
    {"q": "two?", "a": "#### 1\nso\n#### 1,002 ", "level": 3},
    {"q": "three?", "a": "#### -3"},
  ]
  path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
  task = JsonlTask(path, prompt="q", answer="a", answer_pattern=r"#### (.+)")
  assert [(p.id, p.prompt, p.answer) for p in task] == [
    ("rows/0", "two?", "1,002"),
    ("rows/1", "three?", "-3"),
  ]
  assert task[0].metadata == {"source": "rows.jsonl", "index": 0, "fields": rows[0]}


def test_jsonl_answer_may_be_a_number(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"question": "?", "answer": 0.5}\n{"question": "?", "answer": 12}\n')
  assert [problem.answer for problem in JsonlTask(path)] == ["0.5", "12"]


@pytest.mark.parametrize(
  "line, expected",
  [
    ("{", "not valid JSON"),
    ("[1]", "expected a JSON object"),
    ('{"question": "?"}', "no field 'answer'"),
    ('{"question": "", "answer": "#### 1"}', "field 'question': expected non-empty text, found ''"),
    ('{"question": "?", "answer": true}', "field 'answer': expected non-empty text, found True"),
    ('{"question": "?", "answer": "1"}', "field 'answer' has no match of '#### "),
    ('{"question": "?", "answer": "####  "}', "field 'answer' has no match of '#### "),
  ],
)
def test_bad_row_names_file_and_line(tmp_path, line, expected):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"question": "?", "answer": "#### 1"}\n\n' + line + "\n")
  with pytest.raises(ValueError, match=r"rows\.jsonl:3: ") as caught:
    JsonlTask(path, answer_pattern="#### (.+)")
  assert expected in str(caught.value)
  assert "\n" not in str(caught.value)


def test_bad_pattern_and_missing_file(tmp_path):
  with pytest.raises(ValueError, match="expected exactly one group, found 0"):
    JsonlTask(tmp_path / "no.jsonl", answer_pattern="####")
  with pytest.raises(ValueError, match="no such file"):
    JsonlTask(tmp_path / "no.jsonl")


@pytest.mark.skipif(not GSM8K.exists(), reason=f"{GSM8K.name} of gsm8k is not in ../shared/data")
def test_gsm8k():
  task = JsonlTask(GSM8K, answer_pattern="#### (.+)")
  assert len(task) == 7473
  assert [task[i].answer for i in (0, 1)] == ["72", "10"]  # read off the file


def test_question_key_ignores_spaces_case_and_unicode_form():
  keys = [question_key(p) for p in _listed("Add 3 + 4\n", "add  3+4", "ａdd\u00a03+4", "add 3+5")]
  assert keys[0] == keys[1] == keys[2] != keys[3]


def test_question_key_prefers_the_original_question():
  short = Problem("a", "3+4=", "7", {"question": "What is 3 + 4?"})
  assert question_key(short) == question_key(_listed("what is 3+4?")[0])


def test_split_shares_no_question_and_loses_no_problem():
  # About 1000 distinct questions in 4000 draws: most held-out questions come again in train.
  task = ReasoningGymTask({"chain_sum": {"max_terms": 2, "max_digits": 2}}, seed=0, size=4000)
  assert len({question_key(problem) for problem in list(task)[:400]}) < 400
  train, held_out = split_disjoint(task, 300)
  keys = [question_key(problem) for problem in held_out]
  assert len(held_out) == 300 == len(set(keys))
  assert not set(keys) & {question_key(problem) for problem in train}
  assert len(train) == sum(question_key(problem) not in set(keys) for problem in task)
  assert len(train) < 4000 - 300  # it did have repeats to drop


def test_exclude_filters_another_stream():
  config = {"gcd": {"max_value": 20}}
  held_out = list(ReasoningGymTask(config, seed=1, size=50))
  stream = ReasoningGymTask(config, seed=2, size=500)
  with pytest.raises(ValueError, match="train problems overlap"):
    assert_disjoint(stream, held_out)
  assert_disjoint(exclude(stream, held_out), held_out)


def test_overlap_is_named():
  train, held_out = _listed("a", "b c", "d"), _listed("x", "B  C")
  with pytest.raises(ValueError) as caught:
    assert_disjoint(train, held_out)
  expected = "train problem 'p1' repeats held-out 'p1': 'B  C' (1 train problems overlap)"
  assert str(caught.value) == expected


def test_splits_that_cannot_be():
  task = ReasoningGymTask({"gcd": {"max_value": 3}}, seed=0, size=200)
  with pytest.raises(ValueError, match="held_out must be at least 1, found 0"):
    split_disjoint(task, 0)
  # Pairs of 1..3: nine questions.
  with pytest.raises(ValueError, match="held_out is 10, the task has only 9 distinct questions"):
    split_disjoint(task, 10)
  with pytest.raises(ValueError, match="nothing is left to train on"):
    split_disjoint(task, 9)


def test_subset_maps_indices():
  task = ReasoningGymTask({"gcd": {}}, seed=0, size=10)
  part = Subset(task, (7, 2))
  assert [p.id for p in part] == [task[7].id, task[2].id]
  with pytest.raises(IndexError):
    part[2]
