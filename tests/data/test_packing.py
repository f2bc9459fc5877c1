import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_jax.data import packing

GSM8K = pathlib.Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"


def first_fit(lengths, row_length):
  """Rows that first-fit needs, in the order given."""
  rooms = []
  for length in lengths:
    at = next((i for i, room in enumerate(rooms) if room >= length), None)
    if at is None:
      rooms.append(row_length - length)
    else:
      rooms[at] -= length
  return len(rooms)


def best_fit_decreasing(lengths, row_length):
  """Rows that best-fit decreasing needs: the textbook's O(N^2)."""
  rooms = []
  for length in sorted(lengths, reverse=True):
    fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
    if fitting:
      rooms[min(fitting)[1]] -= length
    else:
      rooms.append(row_length - length)
  return len(rooms)


def fewest_rows(lengths, row_length):
  """The optimum by trying every assignment."""
  for rows in range(1, len(lengths) + 1):
    for assignment in itertools.product(range(rows), repeat=len(lengths)):
      used = np.bincount(assignment, weights=lengths, minlength=rows)
      if used.max() <= row_length:
        return rows
  raise AssertionError("unreachable: one row each always fits")


def numbered_examples(lengths, base=1000):
  """Example i has tokens base * (i + 1) + 0, 1, 2...: each token says where it came from."""
  return [
    packing.Example(base * (i + 1) + np.arange(n, dtype=np.int32), np.ones(n, np.float32))
    for i, n in enumerate(lengths)
  ]


def test_plan_worked_by_hand():
  # Decreasing: 6 (row a), 5 (row b), 4 (a, full), 3 (b, 2 left), 2 (b, full), 2 (row c).
  # Rows by first example: example 0 (2 tokens, in b), example 2 (4 tokens, in a), example 5 (in c).
  plan = packing.pack([2, 3, 4, 5, 6, 2], 10)
  np.testing.assert_array_equal(plan.row, [0, 0, 1, 0, 1, 2])
  np.testing.assert_array_equal(plan.offset, [0, 2, 0, 5, 4, 0])
  np.testing.assert_array_equal(plan.segment, [0, 1, 0, 2, 1, 0])
  assert (plan.rows, plan.dropped, plan.truncated) == (3, 0, 0)
  assert plan.efficiency == pytest.approx(22 / 30)


def test_rows_worked_by_hand():
  examples = [
    packing.Example(np.array([7, 8], np.int32), np.array([1, 0.5], np.float32)),
    packing.Example(np.array([9], np.int32), np.array([1], np.float32), weight=0.25),
    packing.Example(np.array([4, 5, 6, 3], np.int32), np.array([0, 0, 1, 2], np.float32)),
  ]
  batch = packing.pack_rows(examples, packing.pack([2, 1, 4], 4))
  np.testing.assert_array_equal(batch.tokens, [[7, 8, 9, 0], [4, 5, 6, 3]])
  np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 0], [0, 1, 2, 3]])
  np.testing.assert_array_equal(batch.segment_ids, [[0, 0, 1, -1], [0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.mask, [[0, 0.5, 0, 0], [0, 0, 1, 2]])
  np.testing.assert_array_equal(batch.weights, [[1, 1, 0.25, 0], [1, 1, 1, 1]])
  dtypes = [x.dtype for x in jax.tree.leaves(batch)]
  assert dtypes == [np.int32, np.int32, np.int32, np.float32, np.float32]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.integers(32, 48))
def test_every_token_appears_once_in_one_piece(lengths, row_length):
  examples = numbered_examples(lengths)
  plan = packing.pack(lengths, row_length)
  batch = packing.pack_rows(examples, plan)
  found = []
  for tokens, positions, segments in zip(batch.tokens, batch.positions, batch.segment_ids):
    held = segments[segments >= 0]
    assert (np.diff(held) >= 0).all() and (segments[len(held) :] == -1).all()  # padding comes last
    for segment in range(held.max() + 1):
      np.testing.assert_array_equal(
        positions[segments == segment], np.arange((segments == segment).sum())
      )
      found.append(tokens[segments == segment].tolist())
  assert sorted(found) == [example.tokens.tolist() for example in examples]
  assert plan.rows == best_fit_decreasing(lengths, row_length)
  assert plan.efficiency == pytest.approx(sum(lengths) / (plan.rows * row_length))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=6))
def test_rows_stay_within_johnsons_bound_of_the_optimum(lengths):
  # 11/9 OPT + 6/9: the tight form for first-fit decreasing (Dosa, 2007), so at most one row more.
  optimum = fewest_rows(lengths, 10)
  assert optimum <= packing.pack(lengths, 10).rows <= math.floor((11 * optimum + 6) / 9)


@pytest.mark.parametrize("longest", [16, 64, 128])
def test_beats_first_fit_on_average(longest):
  rng = np.random.default_rng(longest)
  trials = [rng.integers(1, longest + 1, 200) for _ in range(20)]
  ours = [packing.pack(lengths, 128).rows for lengths in trials]
  theirs = [first_fit(lengths, 128) for lengths in trials]
  assert np.mean(ours) <= np.mean(theirs)


def test_gsm8k_rows_pack_to_97_percent():
  if not GSM8K.exists():
    pytest.skip("needs the data set at ../shared/data/gsm8k")
  rows = map(json.loads, GSM8K.read_text().splitlines())
  lengths = [len((row["question"] + row["answer"]).encode()) for row in rows]
  assert len(lengths) == 7473
  assert packing.pack(lengths, 2048).efficiency >= 0.97
  in_order = packing.one_per_row(lengths, 2048).efficiency  # what packing is for
  assert in_order < 0.3


def test_too_long():
  lengths = [3, 9, 4, 12]
  with pytest.raises(ValueError, match=r"^example 1 has 9 tokens, a row holds 8 .*too_long"):
    packing.pack(lengths, 8)
  with pytest.raises(ValueError, match=r"^train\.jsonl:2 has 9 tokens"):
    packing.pack(lengths, 8, names=lambda i: f"train.jsonl:{i + 1}")
  dropped = packing.pack(lengths, 8, too_long="drop")
  assert (dropped.rows, dropped.dropped, dropped.truncated) == (1, 2, 0)
  np.testing.assert_array_equal(dropped.row, [0, -1, 0, -1])
  cut = packing.pack(lengths, 8, too_long="truncate")
  assert (cut.rows, cut.dropped, cut.truncated) == (3, 0, 2)
  examples = numbered_examples(lengths)
  np.testing.assert_array_equal(
    packing.pack_rows(examples, cut).tokens,
    [[1000, 1001, 1002, 3000, 3001, 3002, 3003, 0], range(2000, 2008), range(4000, 4008)],
  )
  np.testing.assert_array_equal(
    packing.pack_rows(examples, dropped).tokens, [[1000, 1001, 1002, 3000, 3001, 3002, 3003, 0]]
  )


def test_other_fields_follow_the_plan():
  lengths = [3, 5, 2, 4]
  plan = packing.pack(lengths, 8, rows=4)
  examples = numbered_examples(lengths)
  batch = packing.pack_rows(examples, plan)
  logprobs = [-example.tokens.astype(np.float32) for example in examples]
  laid = packing.lay_out(plan, logprobs)
  assert laid.dtype == np.float32
  np.testing.assert_array_equal(laid, -batch.tokens)
  padded = np.full(
    (4, 6), 77, np.float32
  )  # what stands after an example's end must not come through
  for i, values in enumerate(logprobs):
    padded[i, : len(values)] = values
  np.testing.assert_array_equal(packing.lay_out(plan, padded), laid)
  advantages = packing.spread(plan, [0.5, -1.0, 2.0, 3.0], fill=-9)
  owner = batch.tokens // 1000  # example + 1, 0 on padding
  np.testing.assert_array_equal(advantages, np.array([-9, 0.5, -1.0, 2.0, 3.0])[owner])
  assert (laid[2:] == 0).all() and (batch.segment_ids[2:] == -1).all() and plan.rows == 4


def test_row_counts():
  lengths = [5, 5, 5]
  assert packing.pack(lengths, 8).rows == 3
  assert packing.pack(lengths, 8, rows_multiple=4).rows == 4
  assert packing.pack(lengths, 8, rows=6, rows_multiple=2).rows == 6
  with pytest.raises(ValueError, match="need 3 rows, rows=2"):
    packing.pack(lengths, 8, rows=2)
  with pytest.raises(ValueError, match="rows=6 is not a multiple of rows_multiple=4"):
    packing.pack(lengths, 8, rows=6, rows_multiple=4)
  nothing = packing.pack([], 8, rows=2)
  assert nothing.efficiency == 0
  np.testing.assert_array_equal(packing.pack_rows([], nothing).segment_ids, np.full((2, 8), -1))


def test_one_per_row():
  plan = packing.one_per_row([3, 9, 4], 8, too_long="drop", rows_multiple=2)
  np.testing.assert_array_equal(plan.row, [0, -1, 1])
  np.testing.assert_array_equal(plan.offset, [0, 0, 0])
  assert (plan.rows, plan.dropped) == (2, 1)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: packing.pack([3, 0], 8), "example 1 has no tokens"),
    (lambda: packing.pack([3], 0), "row_length must be at least 1, got 0"),
    (lambda: packing.pack([3], 8, too_long="cut"), "too_long must be error, drop or truncate"),
    (lambda: packing.pack([3], 8, rows_multiple=0), "rows_multiple must be at least 1"),
    (lambda: packing.lay_out(packing.pack([3], 8), [[1, 2]]), r"example 0 has 3 tokens.*\(2,\)"),
    (
      lambda: packing.lay_out(packing.pack([3], 8), []),
      "plan has 1 examples, the values are for 0",
    ),
    (lambda: packing.lay_out(packing.pack([3], 8), np.ones((1, 2))), "2 wide.*has 3 tokens"),
    (lambda: packing.spread(packing.pack([3], 8), [1, 2]), "each of 1 examples"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
