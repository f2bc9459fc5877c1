"""Recipes: what is held out is not trained on, and what is trained is exactly the completion."""

import gzip
import json
import re

import numpy as np
import pytest

from pt_jax import recipes
from pt_jax.data.scratchpads import demonstration
from pt_jax.data.tasks import ReasoningGymTask, assert_disjoint, question_key
from pt_jax.data.tokenizers import ByteTokenizer
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.rollouts import StopReason

TOKENIZER = ByteTokenizer()
TEMPLATE = "plain"
# So few sums of one digit exist that held-out ones are among the others before they are removed.
FAMILIES = {
  "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
  "spell_backward": {"min_word_len": 4, "max_word_len": 8},
}
DRAW = {"families": FAMILIES, "template": TEMPLATE, "size": 120, "held_out": 40, "seed": 3}


@pytest.fixture(scope="module")
def task():
  return recipes.problems(TOKENIZER, **DRAW)


@pytest.fixture(scope="module")
def demonstrations():
  return recipes.demonstrations(TOKENIZER, **DRAW, samples=3)


def test_no_held_out_problem_is_trained_on(task):
  trained = {question_key(problem) for problem in task.train}
  held_out = {question_key(problem) for problem in task.held_out}
  assert len(task.held_out) == 40 and not trained & held_out
  drawn = ReasoningGymTask(FAMILIES, seed=3, size=120)
  repeated = [problem for problem in drawn if question_key(problem) in held_out]
  assert repeated and len(task.train) == 120 - len(repeated)  # there was something to remove
  with pytest.raises(ValueError, match=r"repeats held-out .* \(\d+ train problems overlap\)"):
    assert_disjoint(drawn, task.held_out)


def test_the_same_problems_whatever_else_is_drawn(task):
  again = recipes.problems(TOKENIZER, **DRAW)
  assert [p.id for p in again.train] == [p.id for p in task.train]
  other = recipes.problems(TOKENIZER, **(DRAW | {"seed": 9}))
  assert [p.prompt for p in other.held_out] != [p.prompt for p in task.held_out]
  more = recipes.problems(TOKENIZER, **(DRAW | {"size": 150}))
  assert [p.prompt for p in more.held_out] == [p.prompt for p in task.held_out]


def test_levels_grow_and_none_holds_a_held_out_problem(task):
  digits = lambda n: {"min_terms": 2, "max_terms": 2, "min_digits": n, "max_digits": n}
  levels = [{f"chain_sum/{n}": digits(n)} for n in (1, 2, 3)]
  made = recipes.problems(TOKENIZER, **DRAW, levels=levels)
  assert [p.id for p in made.train] == [p.id for p in task.train] and len(made.levels) == 3
  held_out = {question_key(problem) for problem in made.held_out}
  for n, level in enumerate(made.levels, 1):
    assert not {question_key(problem) for problem in level} & held_out
    numbers = [number for p in level for number in re.findall(r"\d+", p.prompt)]
    assert {len(number) for number in numbers} == {n}
  assert len(made.levels[0]) < 120 and len(made.levels[2]) == 120  # of one digit, some are held out
  assert len({problem.id for level in made.levels for problem in level}) == sum(
    map(len, made.levels)
  )


def test_demonstrations_are_of_the_same_problems(task, demonstrations):
  rows = demonstrations.train.sources["demonstrations"]
  assert [rows[i]["id"] for i in range(len(rows))] == [problem.id for problem in task.train]
  held_out = demonstrations.held_out
  assert [held_out[i]["id"] for i in range(40)] == [problem.id for problem in task.held_out]
  prompts = [list(task.encode(task.held_out[i])) for i in range(3)]
  assert [list(prompt) for prompt in demonstrations.prompts] == prompts


def test_what_is_trained_is_the_completion_and_the_prompt_is_what_comes_before(
  task, demonstrations
):
  ends = recipes.until_turn_ends(TOKENIZER, TEMPLATE, max_tokens=8).stop_tokens
  for problem, source in ((task.train[0], 0), (task.train[1], 1), (task.train[7], 7)):
    row = demonstrations.train.sources["demonstrations"][source]
    tokens, mask, _ = demonstrations.encode(row)
    prompt = list(task.encode(problem))
    assert tokens[: len(prompt)].tolist() == prompt
    assert not mask[: len(prompt)].any() and mask[len(prompt)] == 1
    trained = tokens[mask > 0].tolist()
    assert trained[-1] in ends and not set(trained[:-1]) & set(ends)
    assert TOKENIZER.decode(trained[:-1]) == demonstration(problem)
    # One stretch: the sampler, which begins at the prompt, sees what the cold start was taught.
    assert np.flatnonzero(mask).tolist() == [*range(len(prompt), len(prompt) + len(trained))]


def completion(problem, text):
  return Completion(problem, text, len(text), StopReason.TOKEN)


def test_a_demonstration_is_right_and_in_form(task):
  problems = [task.train[i] for i in range(12)]
  assert {problem.metadata["family"] for problem in problems} == {"chain_sum", "spell_backward"}
  rewards = recipes.correct_and_shaped(0.25)([completion(p, demonstration(p)) for p in problems])
  np.testing.assert_allclose(rewards.total, 1.25)
  wrong = [re.sub("<answer>.*", "<answer>?</answer>", demonstration(p)) for p in problems]
  rewards = recipes.correct_and_shaped(0.25)([completion(*pair) for pair in zip(problems, wrong)])
  np.testing.assert_allclose(rewards.total, 0.25)
  bare = recipes.correct_and_shaped(0.25)([completion(p, p.answer) for p in problems])
  np.testing.assert_allclose(bare.components["format"], 0)


def test_sampling_stops_where_a_turn_ends():
  sampling = recipes.until_turn_ends(TOKENIZER, "chatml", max_tokens=9, temperature=0.5)
  assert TOKENIZER.token_id("<|im_end|>") in sampling.stop_tokens
  assert (sampling.max_tokens, sampling.temperature) == (9, 0.5)


def chat(row):
  return [
    {"role": "user", "content": row["question"]},
    {"role": "assistant", "content": row["answer"]},
  ]


def write(path, count, word):
  lines = [json.dumps({"question": f"{word}{i}?", "answer": f"{word}{i}!"}) for i in range(count)]
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def test_conversations_keep_back_rows_of_the_file(tmp_path):
  path = write(tmp_path / "rows.jsonl", 20, "a")
  options = {"messages": chat, "fields": ("question", "answer"), "template": TEMPLATE}
  data = recipes.conversations(TOKENIZER, train=path, held_out=5, samples=2, **options)
  (source,) = data.train.sources.values()
  trained = {source[i]["question"] for i in range(len(source))}
  held_out = [data.held_out[i]["question"] for i in range(len(data.held_out))]
  assert len(held_out) == 5 and len(trained) == 15 and not trained & set(held_out)
  for i, prompt in enumerate(data.prompts):
    tokens, mask, _ = data.encode(data.held_out[i])
    assert tokens[: len(prompt)].tolist() == list(prompt)
    assert int(np.flatnonzero(mask)[0]) == len(prompt) and mask[len(prompt) :].all()
    assert held_out[i] in TOKENIZER.decode(prompt)


def test_conversations_weigh_rows_and_kinds(tmp_path):
  path = write(tmp_path / "rows.jsonl", 6, "a")
  data = recipes.conversations(
    TOKENIZER,
    train=path,
    held_out=2,
    messages=chat,
    fields=("question", "answer"),
    template=TEMPLATE,
    train_on={"answer": 0.5},
    weight=lambda row: 1 + int(row["question"][1]),
  )
  for i in range(2):
    row = data.held_out[i]
    _, mask, weight = data.encode(row)
    assert weight == 1 + int(row["question"][1])
    assert set(mask) == {0, 0.5}


def test_conversations_with_a_file_of_their_own_to_evaluate_on(tmp_path):
  train, other = (write(tmp_path / f"{word}.jsonl", 8, word) for word in "ab")
  options = {"messages": chat, "fields": ("question", "answer"), "template": TEMPLATE}
  data = recipes.conversations(TOKENIZER, train=train, held_out=5, held_out_path=other, **options)
  (source,) = data.train.sources.values()
  assert len(source) == 8
  assert [data.held_out[i]["question"] for i in range(len(data.held_out))] == [
    f"b{i}?" for i in range(5)
  ]


def test_a_small_decoder_is_as_asked():
  config = recipes.small_decoder(272, width=256, layers=2, max_length=128)
  assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 64)
  assert (config.width, config.layers, config.max_length, config.vocab_size) == (256, 2, 128, 272)


def pair_of(row):
  """The chats of a row of pairs."""
  asked = [{"role": "user", "content": row["question"]}]
  answered = lambda text: [*asked, {"role": "assistant", "content": text}]
  return answered(row["chosen"]), answered(row["rejected"])


def pairs(tmp_path, suffix="json", rows=None, **changes):
  rows = rows or [
    {"question": f"What is {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)
  ]
  text = json.dumps(rows) if "jsonl" not in suffix else "\n".join(map(json.dumps, rows))
  path = tmp_path / f"rows.{suffix}"
  path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
  options = {
    "train": str(path),
    "chats": pair_of,
    "fields": ("question", "chosen", "rejected"),
    "template": TEMPLATE,
    "held_out": 4,
  }
  return recipes.preference_pairs(TOKENIZER, **options | changes)


def texts(group):
  """(prompt, judged text) of every completion of a group."""
  return [
    tuple(TOKENIZER.decode(c.tokens[c.mask == judged]) for judged in (0, 1))
    for c in group.completions
  ]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "json.gz"])
def test_pairs_of_any_kind_of_file(tmp_path, suffix):
  data = pairs(tmp_path, suffix, samples=2)
  train = data.train.sources["train"]
  questions = {source[i]["question"] for source in (train, data.held_out) for i in range(4)}
  assert len(train) == 8 and len(data.held_out) == 4 and len(questions) == 8
  row = train[0]
  group = data.encode(row)
  (prompt, good), (same, bad) = texts(group)
  assert prompt == same and row["question"] in prompt
  assert good.startswith(row["chosen"]) and bad.startswith(row["rejected"])
  assert group.labels == (1.0, 0.0) and (group.weight, group.margin) == (1.0, 0.0)
  assert [TOKENIZER.decode(p) for p in data.prompts] == [
    texts(data.encode(data.held_out[i]))[0][0] for i in range(2)
  ]


def test_weights_margins_and_slices_come_from_the_row(tmp_path):
  number = lambda row: int(row["question"][8:-1])
  data = pairs(tmp_path, weight=number, margin=lambda r: -number(r), slice=lambda r: r["chosen"])
  row = data.train.sources["train"][3]
  group = data.encode(row)
  assert (group.weight, group.margin) == (number(row), -number(row)) and number(row)
  assert data.slice is not None and data.slice(row) == row["chosen"]


def test_unpaired_rows_are_both_sides_with_an_answer_to_another_prompt(tmp_path):
  data, whole = pairs(tmp_path, unpaired=True), pairs(tmp_path)
  train, rows = data.train.sources["train"], whole.train.sources["train"]
  assert len(train) == 2 * len(rows) == 16
  for i in range(16):
    row, side = rows[i // 2], ("chosen", "rejected")[i % 2]
    group = data.encode(train[i])
    assert group.labels == (1.0 - i % 2, -1.0) and train.where(i) == rows.where(i // 2)
    (prompt, own), (same, other) = texts(group)
    assert prompt == same and row["question"] in prompt and own.startswith(row[side])
    assert not other.startswith(row[side]) and other.startswith(row[side].split()[0])
  held_out = data.encode(data.held_out[0])
  assert held_out.labels == (1.0, 0.0)  # a pair


def test_equal_pairs_are_dropped_where_asked(tmp_path):
  rows = [{"question": "?", "chosen": str(i), "rejected": str(i // 2 * 2)} for i in range(12)]
  data = pairs(tmp_path, rows=rows, drop_equal=True, held_out=2)
  assert len(data.train) == 4
  assert len(pairs(tmp_path, rows=rows, held_out=2).train) == 10


def test_all_turns_of_a_trajectory_or_the_last(tmp_path):
  def chats(row):
    first = [
      {"role": "user", "content": "look"},
      {"role": "assistant", "content": "looking"},
      {"role": "user", "content": row["question"]},
    ]
    return tuple([*first, {"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected"))

  judged = {
    turns: texts(pairs(tmp_path, chats=chats, turns=turns).encode(rows_of_pairs()))[0][1]
    for turns in ("all", "last")
  }
  assert "looking" in judged["all"] and "look" not in judged["last"]
  assert judged["all"].endswith(judged["last"]) and "look" in judged["all"]


def rows_of_pairs():
  return {"question": "What?", "chosen": "good", "rejected": "bad"}


def test_outcomes_are_chats_with_a_label(tmp_path):
  rows = [{"q": f"{i}+{i}", "a": str(2 * i + i % 2), "right": 1 - i % 2} for i in range(20)]
  file = tmp_path / "rows.jsonl"
  file.write_text("\n".join(map(json.dumps, rows)))
  data = recipes.outcomes(
    TOKENIZER,
    train=str(file),
    messages=lambda row: [
      {"role": "user", "content": row["q"]},
      {"role": "assistant", "content": row["a"]},
    ],
    label=lambda row: row["right"],
    fields=("q", "a", "right"),
    template=TEMPLATE,
    held_out=4,
  )
  assert len(data.train) == 16 and len(data.held_out) == 4
  for row in (data.train[0], data.held_out[0]):
    (completion,), labels = data.encode(row)[:2]
    trained = completion.tokens[completion.mask > 0].tolist()
    assert TOKENIZER.decode(trained).startswith(row["a"]) and labels == (row["right"],)


def test_step_marks_are_the_last_tokens_of_the_steps(tmp_path):
  row = {"prompt": "1+2+3", "steps": ["1+2=3", "3+3=7"], "labels": [1.0, 0.25]}
  file = tmp_path / "rows.jsonl"
  file.write_text("\n".join([json.dumps(row)] * 4))
  data = recipes.marked_steps(TOKENIZER, train=str(file), template=TEMPLATE, held_out=1)
  (completion,), (labels,) = data.encode(data.train[0])[:2]
  text = TOKENIZER.decode(completion.tokens.tolist())
  assert text == "1+2+3\n1+2=3\n3+3=7\n"
  marks = np.flatnonzero(completion.mask)
  assert marks.tolist() == [11, 17] and completion.tokens[marks].tolist() == [10, 10]
  assert labels[marks].tolist() == [1.0, 0.25] and np.count_nonzero(labels) == 2
  with pytest.raises(ValueError, match="expected a label for each of 1 or more steps, found 1"):
    data.encode(row | {"labels": [1.0]})
