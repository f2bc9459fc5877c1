"""Groups of completions in packed rows, and the batches they come in."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from pt_jax.data import packing, pipeline, sources
from pt_jax.data.groups import MISMATCHED, Group, checked_group, group_length, pack_groups
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import GROUPS, Host, Layout

LAYOUT = Layout(batch_size=4, row_length=32, window=16)
ROWS = [{"i": i, "n": [2 + (5 * i + j) % 9 for j in range(1 + i % 3)]} for i in range(50)]


def completion(row, j):
  """Its tokens say where they came from: 10_000 (row + 1) + 100 j + place."""
  tokens = 10_000 * (row["i"] + 1) + 100 * j + np.arange(row["n"][j], dtype=np.int32)
  return Example(tokens, np.ones(row["n"][j], np.float32))


def encode(row):
  """Row i has one to three completions of 2 to 10 tokens."""
  made = tuple(completion(row, j) for j in range(len(row["n"])))
  labels = tuple(1 / (1 + j) for j in range(len(made)))
  return Group(made, labels, weight=1 + row["i"], margin=-row["i"] / 8)


def mixture(rows=ROWS, seed=0):
  half = len(rows) // 2
  parts = {"a": sources.MemorySource(rows[:half], "a"), "b": sources.MemorySource(rows[half:], "b")}
  return Mixture(parts, seed=seed)


def batches(layout=LAYOUT, seed=0, rows=ROWS, make=encode, **options):
  return pipeline.train_batches(mixture(rows, seed), make, layout, form=GROUPS, **options)


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def groups_in(batch):
  """(row of the data, tokens of its completions) of every group, each checked against `encode`."""
  found = []
  for b in range(len(batch.tokens)):
    held = batch.segment_ids[b] >= 0
    np.testing.assert_array_equal(held, batch.group_ids[b] >= 0)
    for name in ("tokens", "positions", "mask", "labels", "weights", "margins"):
      assert not getattr(batch, name)[b, ~held].any()
    for group in range(batch.group_ids[b].max() + 1):
      at = np.flatnonzero(batch.group_ids[b] == group)
      assert (np.diff(at) == 1).all()  # side by side
      number = batch.tokens[b, at[0]] // 10_000 - 1
      expected = encode(ROWS[number])
      np.testing.assert_array_equal(
        batch.tokens[b, at], np.concatenate([c.tokens for c in expected.completions])
      )
      assert (batch.weights[b, at] == expected.weight).all()
      assert (batch.margins[b, at] == expected.margin).all()
      segments = batch.segment_ids[b, at]
      places = batch.tokens[b, at] % 100
      np.testing.assert_array_equal(batch.positions[b, at], places)
      np.testing.assert_array_equal(batch.mask[b, at], places > 0)
      completions = batch.tokens[b, at] // 100 % 100
      np.testing.assert_array_equal(segments - segments[0], completions)  # the best first
      np.testing.assert_allclose(batch.labels[b, at], 1 / (1 + completions), rtol=1e-6)
      found.append(int(number))
    ids = batch.segment_ids[b][held]
    np.testing.assert_array_equal(np.unique(ids), np.arange(ids.max(initial=-1) + 1))
    assert (np.diff(ids) >= 0).all()
  return found


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_group_once(packed):
  layout = dataclasses.replace(LAYOUT, packed=packed)
  iterator = iter(batches(layout, epochs=2))
  found, numbers = [], []
  for batch in iterator:
    assert batch.tokens.shape == batch.reference_logprobs.shape == (4, 32)
    found += groups_in(batch)
    if not packed:
      assert batch.group_ids.max() == 0
    # Every position knows its example: number mod 50 finds the row in the mixture's order.
    np.testing.assert_array_equal(iterator.numbers >= 0, batch.group_ids >= 0)
    starts = np.diff(batch.group_ids, axis=1, prepend=-1) > 0
    numbers += iterator.numbers[starts].tolist()
  assert sorted(found) == sorted(2 * [*range(50)])
  assert sorted(numbers) == [*range(100)]
  assert iterator.counts == {"examples": 100, "dropped": 0, "truncated": 0, "epoch": 2.0}


def test_numbers_of_an_evaluation_are_rows_of_the_source():
  iterator = iter(pipeline.eval_batches(sources.MemorySource(ROWS), encode, LAYOUT, form=GROUPS))
  for batch in iterator:
    held = batch.group_ids >= 0
    np.testing.assert_array_equal(iterator.numbers[held], batch.tokens[held] // 10_000 - 1)
    assert (iterator.numbers[~held] == -1).all()


def test_resumes_bit_for_bit_and_shares_among_hosts():
  every, states = [], []
  iterator = iter(batches())
  for _ in range(12):
    states.append(json.dumps(iterator.get_state()))
    every.append(next(iterator))
  for at, state in enumerate(states):
    resumed = iter(batches())
    resumed.set_state(json.loads(state))
    for expected in every[at : at + 3]:
      assert_same(next(resumed), expected)
  shares = [itertools.islice(batches(host=Host(h, 2)), 12) for h in range(2)]
  for expected, *parts in zip(every, *shares):
    assert_same(jax.tree.map(lambda *x: np.concatenate(x), *parts), expected)


def test_labels_may_be_given_token_by_token_and_references_are_laid_out():
  two = [completion(ROWS[i], 0) for i in (4, 7)]
  marks = np.linspace(0, 1, len(two[0].tokens))
  known = tuple(-0.5 - np.arange(len(c.tokens)) for c in two)
  groups = [Group((two[0],), (marks,)), Group((two[1],), (MISMATCHED,), references=known[1:])]
  plan = packing.pack([group_length(group) for group in groups], 32)
  batch = pack_groups([checked_group(group) for group in groups], plan)
  first, second = (batch.group_ids == i for i in range(2))
  np.testing.assert_allclose(batch.labels[first], marks.astype(np.float32))
  assert (batch.labels[second] == -1).all()
  np.testing.assert_array_equal(batch.reference_logprobs[second], known[1] * batch.mask[second])
  assert not batch.reference_logprobs[first].any()


def test_groups_too_long_are_dropped_whole():
  layout = dataclasses.replace(LAYOUT, row_length=16, too_long="drop")
  iterator = iter(batches(layout, epochs=1))
  kept = [i for batch in iterator for i in groups_in(batch)]
  fits = [row["i"] for row in ROWS if sum(row["n"]) <= 16]
  assert sorted(kept) == fits and 0 < len(fits) < 50
  assert iterator.counts["dropped"] == 50 - len(fits)


def test_nothing_packs_to_nothing():
  assert (pack_groups([], packing.pack([], 8, rows=2)).group_ids == -1).all()


def made(**changes):
  group = encode(ROWS[4])  # two completions
  return lambda row: group._replace(**changes) if row["i"] == 30 else encode(row)


def example_instead(row):
  return completion(row, 0)


BAD = {
  "an example": (example_instead, r"^a\[0\]: expected a Group of completions, found a Example"),
  "labels": (made(labels=(1.0,)), "expected a label for each of one or more.*found 1 for 2"),
  "nothing": (made(completions=(), labels=()), "one or more completions, found 0 for 0"),
  "weight": (made(weight=-1.0), "a weight of at least 0 and a margin, both finite, found -1.0"),
  "margin": (made(margin=float("nan")), "both finite, found 5 and nan"),
  "shape": (made(labels=(1.0, np.ones(3))), r"completion 1: \d tokens have labels of shape \(3,\)"),
  "no target": (
    made(completions=(completion(ROWS[4], 0), Example(np.arange(3), np.zeros(3)))),
    "completion 1: no token to train on",
  ),
  "weight of a completion": (
    made(completions=(completion(ROWS[4], 0), completion(ROWS[4], 1)._replace(weight=0.5))),
    "completion 1: expected no weight but that of its group, found 0.5",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_group_names_its_row(case):
  make, message = BAD[case]
  with pytest.raises(ValueError, match=message) as caught:
    list(batches(seed=None, make=make, epochs=1))
  assert str(caught.value).startswith(("a[", "b[5]: "))


def test_a_group_longer_than_a_row_is_named_and_none_is_cut():
  with pytest.raises(ValueError, match=r"^[ab]\[\d+\] has \d+ tokens, a row holds 16 "):
    list(batches(dataclasses.replace(LAYOUT, row_length=16), seed=None, epochs=1))
  with pytest.raises(ValueError, match=r"too_long: expected error or drop .* found 'truncate'"):
    batches(dataclasses.replace(LAYOUT, too_long="truncate"))
