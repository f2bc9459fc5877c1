"""Judged completions and packed policy batches, from rollouts written by hand."""

import types

import numpy as np
import pytest

from pt_jax.data.tasks import Problem
from pt_jax.experiment import Problems
from pt_jax.loops.rollouts import (
  concatenate,
  generate_and_judge,
  pack_rollouts,
  rollout_metrics,
  sample_rows,
)
from pt_jax.losses.credit import Credit
from pt_jax.rollout.rollouts import Rollouts, SamplingParams, StopReason
from tests.loops.letters import END, Letters, rewards

WORDS = {"ab": [["a", "p"], ["b", "c", "d"]], "c": [["a", "a", "a", "b"], ["p"]]}
STOPS = [StopReason.TOKEN, StopReason.LENGTH, StopReason.STRING, StopReason.TOKEN]


def rollouts(words=WORDS, stops=STOPS):
  """Log-prob of token t of row b: -(b + t / 100)."""
  rows = [([*prompt], answer) for prompt, answers in words.items() for answer in answers]
  length = np.array([len(p) + len(a) for p, a in rows], np.int32)
  shape = (len(rows), length.max())
  made = {"tokens": np.zeros(shape, np.int32), "logprobs": np.zeros(shape, np.float32)}
  version = np.full(shape, -1, np.int32)
  for b, (prompt, answer) in enumerate(rows):
    made["tokens"][b, : length[b]] = Letters().encode(prompt + answer)
    drawn = slice(len(prompt), length[b])
    made["logprobs"][b, drawn] = -(b + np.arange(len(prompt), length[b]) / 100)
    version[b, drawn] = 5
  prompt_length = np.array([len(p) for p, _ in rows], np.int32)
  made |= {"version": version, "stop": np.array(stops), "forced": np.zeros(shape, bool)}
  return Rollouts(prompt_length=prompt_length, length=length, **made)


def judge(words=WORDS, stops=STOPS, **options):
  made = rollouts(words, stops)
  engine = types.SimpleNamespace(max_length=12, generate=lambda *_, **__: made)
  problems = [Problem(f"id-{prompt}", prompt, "a", {}) for prompt in words]
  task = Problems(problems, problems, lambda p: Letters().encode(p.prompt))
  sampling = SamplingParams(max_tokens=8, stop_tokens=(END,))
  arguments = (engine, problems, task, Letters(), rewards(), sampling)
  return generate_and_judge(*arguments, key=None, n=2, **options)


def test_completions_are_decoded_and_scored_for_their_problems():
  judged = judge(first_group=4)
  assert [c.problem.id for c in judged.completions] == ["id-ab", "id-ab", "id-c", "id-c"]
  assert [c.text for c in judged.completions] == ["a", "bcd", "aaab", ""]  # without the stop token
  assert [c.tokens for c in judged.completions] == [2, 3, 4, 1]  # with it
  assert [c.stop for c in judged.completions] == STOPS
  assert judged.groups.tolist() == [4, 4, 5, 5]
  np.testing.assert_allclose(judged.rewards.total, [1.5, 0, 1.375, 0])
  np.testing.assert_allclose(judged.rewards.components["share"], [1, 0, 0.75, 0])


def test_a_prompt_that_leaves_no_room_is_named():
  with pytest.raises(
    ValueError, match=r"^problem id-abcde: prompt of 5 tokens and max_tokens 8 ex"
  ):
    judge({"a": [["p"], ["p"]], "abcde": [["p"], ["p"]]})


def test_metrics_by_hand():
  assert rollout_metrics(judge()) == pytest.approx(
    {
      "reward": (1.5 + 1.375) / 4,
      "reward/correct": 0.5,
      "reward/share": 1.75 / 4,
      "length/mean": 2.5,
      "length/max": 4,
      "stop/token": 0.5,
      "stop/length": 0.25,
      "stop/string": 0.25,
      "stop/budget": 0,
      "stop/aborted": 0,
      "stop/failed": 0,
    }
  )


def test_samples_are_the_first_of_each_problem():
  assert sample_rows(judge(), 1) == [
    {
      "problem": "id-ab",
      "prompt": "ab",
      "completion": "a",
      "answer": "a",
      "reward": 1.5,
      "stop": "token",
    }
  ]
  assert [row["completion"] for row in sample_rows(judge(), 9)] == ["a", "aaab"]


def test_parts_of_different_width_join_and_come_apart():
  short = {"d": [["a"], ["b"]]}
  first, second = judge(short, STOPS[:2]), judge(first_group=1)
  joined = concatenate([first.take(np.arange(0)), first, second])
  assert joined.groups.tolist() == [0, 0, 1, 1, 2, 2]
  assert [c.text for c in joined.completions] == ["", "b", "a", "bcd", "aaab", ""]
  assert joined.rollouts.tokens.shape == (6, 5)
  for part, rows in ((first, np.arange(2)), (second, np.arange(2, 6))):
    taken, width = joined.take(rows), part.rollouts.tokens.shape[1]
    for name in ("tokens", "logprobs", "version"):
      ours, whole = getattr(part.rollouts, name), getattr(taken.rollouts, name)
      np.testing.assert_array_equal(whole[:, :width], ours)
      assert (whole[:, width:] == (-1 if name == "version" else 0)).all()
    for name in ("length", "prompt_length", "stop"):
      np.testing.assert_array_equal(getattr(taken.rollouts, name), getattr(part.rollouts, name))
    np.testing.assert_array_equal(taken.rewards.total, part.rewards.total)


FIELDS = ("advantages", "returns", "positive")


def pack_policy(judged, credit, rows, row_length):
  """The batch of completions with the credit that was assigned to them."""
  packed = pack_rollouts(judged.rollouts, rows, row_length)
  return packed.batch.replace(**packed.fields(credit))


def test_packing_keeps_every_token_with_its_own_numbers():
  judged = judge()
  trained = np.array([True, False, True, True])
  each = np.array([0.5, -1.5, 2.5, -3.5], np.float32)
  advantages = each[:, None] + np.arange(5, dtype=np.float32)  # places count from the prompt on
  credit = Credit(judged.rewards.total, advantages, 2 * advantages, trained, each > 0)
  batch = pack_policy(judged, credit, rows=2, row_length=9)
  assert batch.tokens.shape == (2, 2, 9)  # room for four completions that fill a row each
  assert (batch.segment_ids[1] < 0).all()
  found = {}
  for row in range(2):
    ids = batch.segment_ids[0, row]
    for segment in range(ids.max() + 1):
      place = ids == segment
      field = lambda name, place=place, row=row: getattr(batch, name)[0, row, place].tolist()
      found[Letters().decode(field("tokens"))] = {
        name: field(name) for name in ("positions", "mask", *FIELDS, "sampler_logprobs")
      }
  expected = zip(("abap", "abbcd", "caaab", "cp"), (2, 2, 1, 1), each, trained)
  assert len(found) == 4
  for b, (text, prompt, advantage, used) in enumerate(expected):
    index = np.arange(len(text))
    drawn = index >= prompt
    mask = drawn & used
    assert found[text]["positions"] == index.tolist()
    assert found[text]["mask"] == mask.tolist()
    assert found[text]["advantages"] == ((advantage + index) * mask).tolist()
    assert found[text]["returns"] == (2 * (advantage + index) * mask).tolist()
    assert found[text]["positive"] == (mask & (advantage > 0)).tolist()
    # What the engine reported stays; the mask says what is read.
    np.testing.assert_allclose(found[text]["sampler_logprobs"], -(b + index / 100) * drawn)
  empty = batch.segment_ids < 0
  assert empty.sum() == 36 - 16 and not batch.mask[empty].any() and not batch.tokens[empty].any()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_scores_come_back_to_their_completions(share_prompts):
  """Laid out and taken back: every token of every completion, 0 behind its end; of a prompt that is
  shared, the last token alone."""
  rollouts = judge().rollouts
  packed = pack_rollouts(rollouts, rows=2, row_length=9, share_prompts=share_prompts)
  values = np.random.default_rng(0).normal(size=packed.drawn.shape).astype(np.float32)
  there = np.arange(5) < np.asarray(rollouts.length)[:, None]
  if share_prompts:
    there &= np.arange(5) >= np.asarray(rollouts.prompt_length)[:, None] - 1
  back = packed.take_back(packed.lay_out(values))
  np.testing.assert_array_equal(back, np.where(there, values, 0))
  np.testing.assert_array_equal(packed.take_back(packed.batch.mask) > 0, packed.drawn)


def test_completions_stand_behind_their_shared_prompt():
  """Prompt "ab" before "ap" and "bcd", "c" before "aaab" and "p": by hand."""
  rows = judge().rollouts
  batch = pack_rollouts(rows, rows=1, row_length=16, share_prompts=True).batch
  names = ("tokens", "positions", "segment_ids", "prefix_ids", "mask")
  numbers = [getattr(batch, name)[0, 0].astype(int).tolist() for name in names]
  assert Letters().decode(numbers[0]) == "a" + "bap" + "bbcd" + "caaab" + "cp" + "a"
  assert numbers[1] == [0, 1, 2, 3, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 0]
  assert numbers[2] == [-1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 4, 5, 5, -1]
  assert numbers[3] == [0] * 8 + [3] * 7 + [-1]
  assert numbers[4] == [0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0]


def test_an_update_has_a_power_of_two_of_microbatches_and_the_last_may_be_empty():
  judged = judge()
  nothing = np.zeros((4, 5), np.float32)
  credit = Credit(judged.rewards.total, nothing, nothing, np.ones(4, bool), np.zeros(4, bool))
  batch = pack_policy(judged, credit, rows=1, row_length=6)  # 16 tokens: three rows
  assert batch.tokens.shape == (4, 1, 6)
  assert (batch.segment_ids >= 0).any((1, 2)).tolist() == [True, True, True, False]
  assert pack_policy(judged, credit, rows=4, row_length=9).tokens.shape == (1, 4, 9)
