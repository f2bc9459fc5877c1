import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from pt_jax.data import pipeline, sources
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Host, Layout

LAYOUT = Layout(batch_size=4, row_length=32, window=16)
ROWS = [{"i": i, "n": 2 + (7 * i) % 23} for i in range(50)]  # 2 to 24 tokens


def encode(row):
  """Row i becomes n tokens 1000 (i + 1), + 1, + 2...: each token says where it came from."""
  tokens = 1000 * (row["i"] + 1) + np.arange(row["n"], dtype=np.int32)
  return Example(tokens, np.ones(row["n"], np.float32))


def mixture(rows=ROWS, seed=0):
  half = len(rows) // 2
  parts = {"a": sources.MemorySource(rows[:half], "a"), "b": sources.MemorySource(rows[half:], "b")}
  return Mixture(parts, seed=seed)


def batches(layout=LAYOUT, seed=0, rows=ROWS, **options):
  return pipeline.train_batches(mixture(rows, seed), encode, layout, **options)


def examples_in(batch):
  """The examples of a batch, row by row, as (example, its tokens)."""
  found = []
  for tokens, segments in zip(batch.tokens, batch.segment_ids):
    for segment in range(segments.max() + 1):
      own = tokens[segments == segment]
      found.append((own[0] // 1000 - 1, own.tolist()))
  return found


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_example_once(packed):
  layout = dataclasses.replace(LAYOUT, packed=packed)
  iterator = iter(batches(layout, epochs=2))
  found = []
  for batch in iterator:
    assert batch.tokens.shape == batch.mask.shape == (4, 32)
    if not packed:
      assert set(np.unique(batch.segment_ids)) <= {-1, 0}
    np.testing.assert_array_equal(batch.mask, (batch.positions > 0).astype(np.float32))
    found += examples_in(batch)
  assert sorted(found) == sorted(2 * [(row["i"], encode(row).tokens.tolist()) for row in ROWS])
  assert iterator.counts == {"examples": 100, "dropped": 0, "truncated": 0, "epoch": 2.0}
  first, second = [i for i, _ in found[:50]], [i for i, _ in found[50:]]
  assert first != sorted(first) and first != second
  with pytest.raises(StopIteration):
    next(iterator)


def test_only_the_last_batch_is_padded():
  every = list(batches(dataclasses.replace(LAYOUT, batch_size=5), epochs=1))
  filled = [(batch.segment_ids >= 0).any(axis=1) for batch in every]
  assert all(rows.all() for rows in filled[:-1])
  assert filled[-1].any() and not filled[-1].all()
  empty = jax.tree.map(lambda x: x[~filled[-1]], every[-1])
  assert (empty.segment_ids == -1).all()
  assert not empty.tokens.any() and not empty.positions.any() and not empty.mask.any()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epochs", [2, None])
def test_resumes_bit_for_bit_from_every_batch(packed, epochs):
  data = batches(dataclasses.replace(LAYOUT, packed=packed), epochs=epochs)
  iterator, states, every = iter(data), [], []
  states.append(json.dumps(iterator.get_state()))
  for batch in itertools.islice(iterator, 30):
    every.append((batch, iterator.counts))
    states.append(json.dumps(iterator.get_state()))
  assert len({json.loads(state)["row"] for state in states}) > 3  # also from the middle of windows
  for at, state in enumerate(states):
    resumed = iter(data)
    next(resumed)  # a used iterator can be set back, too
    resumed.set_state(json.loads(state))
    assert resumed.get_state() == json.loads(state)
    for expected, counts in every[at : at + 4]:
      assert_same(next(resumed), expected)
      assert resumed.counts == counts
  if epochs:
    resumed = iter(data)
    resumed.set_state(json.loads(states[-1]))
    assert len(every) < 30 and list(resumed) == []


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_one_global_batch(count):
  whole = list(batches(epochs=2))
  shares = [list(batches(epochs=2, host=Host(h, count))) for h in range(count)]
  assert len(whole) == len(shares[0]) > 5
  for expected, *parts in zip(whole, *shares):
    assert parts[0].tokens.shape == (4 // count, 32)
    assert_same(jax.tree.map(lambda *x: np.concatenate(x), *parts), expected)


def test_a_state_serves_any_number_of_hosts_and_batch_size():
  one = iter(batches())
  for _ in range(5):
    next(one)
  state = one.get_state()
  halves = [iter(batches(host=Host(h, 2))) for h in range(2)]
  wide = iter(batches(dataclasses.replace(LAYOUT, batch_size=8)))
  for iterator in (*halves, wide):
    iterator.set_state(state)
  sixth, seventh = next(one), next(one)
  assert_same(next(halves[0]), jax.tree.map(lambda x: x[:2], sixth))
  assert_same(next(halves[1]), jax.tree.map(lambda x: x[2:], sixth))
  assert_same(next(wide), jax.tree.map(lambda *x: np.concatenate(x), sixth, seventh))


def test_reading_ahead_changes_nothing():
  expected = list(itertools.islice(batches(read_ahead=0), 20))
  for read_ahead in (1, 3):
    iterator = iter(batches(read_ahead=read_ahead))
    for batch in expected:
      assert_same(next(iterator), batch)
    iterator.close()


def test_seed_decides_the_order():
  first = [next(iter(batches(seed=seed))) for seed in (0, 0, 1)]
  assert_same(first[0], first[1])
  assert not np.array_equal(first[0].tokens, first[2].tokens)


def test_rows_of_a_window_are_not_sorted_by_what_they_hold():
  # Packing numbers rows by their first example, so those with many short ones come early: that must
  # not reach the batches. Without a seed it does, which shows that this test can fail.
  rng = np.random.default_rng(0)
  rows = [{"i": i, "n": int(n)} for i, n in enumerate(rng.integers(2, 25, 1000))]
  layout = dataclasses.replace(LAYOUT, window=1000)

  def trend(seed):
    every = list(batches(layout, seed=seed, rows=rows, epochs=1))[:-1]
    held = np.concatenate([batch.segment_ids.max(axis=1) + 1 for batch in every])
    return np.corrcoef(held, np.arange(len(held)))[0, 1]

  # 416 rows: the standard error of one correlation is 0.05, of the mean of four 0.025.
  assert abs(np.mean([trend(seed) for seed in range(4)])) < 0.08
  assert trend(None) < -0.15


def test_small_data_is_not_repeated_within_a_window():
  iterator = batches(rows=ROWS[:6], epochs=3)
  found = [i for batch in iterator for i, _ in examples_in(batch)]
  for epoch in range(3):
    assert sorted(found[6 * epoch : 6 * epoch + 6]) == list(range(6))


def test_eval_is_one_pass_in_order():
  source = sources.MemorySource(ROWS)
  layout = dataclasses.replace(LAYOUT, packed=False)
  data = pipeline.eval_batches(source, encode, layout)
  for _ in range(2):  # the same again
    every = list(data)
    assert len(every) == 13
    assert [i for batch in every for i, _ in examples_in(batch)] == list(range(50))
    assert (every[-1].segment_ids[2:] == -1).all() and not every[-1].mask[2:].any()
  packed = list(pipeline.eval_batches(source, encode, LAYOUT))
  assert sorted(i for batch in packed for i, _ in examples_in(batch)) == list(range(50))
  assert len(packed) < 13
  assert sum(batch.mask.sum() for batch in packed) == sum(batch.mask.sum() for batch in every)


def test_too_long_rows_are_counted():
  layout = dataclasses.replace(LAYOUT, row_length=16)
  longer = sum(row["n"] > 16 for row in ROWS)
  assert longer == 17
  drop = iter(batches(dataclasses.replace(layout, too_long="drop"), epochs=2))
  kept = [i for batch in drop for i, _ in examples_in(batch)]
  assert sorted(kept) == sorted(2 * [row["i"] for row in ROWS if row["n"] <= 16])
  assert drop.counts == {"examples": 66, "dropped": 34, "truncated": 0, "epoch": 2.0}
  cut = iter(batches(dataclasses.replace(layout, too_long="truncate"), epochs=1))
  lengths = {i: len(tokens) for batch in cut for i, tokens in examples_in(batch)}
  assert lengths == {row["i"]: min(row["n"], 16) for row in ROWS}
  assert cut.counts == {"examples": 50, "dropped": 0, "truncated": 17, "epoch": 1.0}


def test_what_has_no_target_once_cut_is_left_out():
  def prompt_of_16(row):
    tokens, mask, _ = encode(row)
    mask[:16] = 0
    return Example(tokens, mask)

  rows = [{"i": i, "n": 20} for i in range(8)]
  for row_length, examples in ((16, 0), (17, 8)):
    layout = Layout(batch_size=2, row_length=row_length, window=3, too_long="truncate")
    data = pipeline.train_batches(mixture(rows), prompt_of_16, layout, epochs=1)
    if examples:
      assert sum(len(examples_in(batch)) for batch in data) == examples
    else:
      with pytest.raises(ValueError, match="all 8 rows of the data are too long"):
        next(iter(data))


def test_an_endless_stream_of_nothing_is_an_error():
  layout = Layout(batch_size=2, row_length=1, window=16, too_long="drop")
  with pytest.raises(ValueError, match="all 50 rows of the data are too long"):
    next(iter(batches(layout)))


def test_too_long_row_is_named():
  layout = dataclasses.replace(LAYOUT, row_length=23)
  with pytest.raises(ValueError, match=r"^b\[\d+\] has 24 tokens, a row holds 23 "):
    list(pipeline.eval_batches(Renamed(), encode, layout))


class Renamed(sources.MemorySource):
  """The rows under the name b."""

  def __init__(self):
    super().__init__(ROWS, "b")


def broken(row):
  if row["i"] == 30:
    return ANSWERS[row["kind"]]()
  return encode(row)


ANSWERS = {
  "raises": lambda: {}["answer"],
  "says": lambda: math.sqrt(-1),
  "no target": lambda: Example(np.arange(3), np.array([1.0, 0, 0])),
  "shape": lambda: Example(np.arange(3), np.ones(2)),
  "floats": lambda: Example(np.ones(3), np.ones(3)),
  "nothing": lambda: Example(np.zeros(0, np.int32), np.zeros(0)),
  "weight": lambda: Example(np.arange(3), np.ones(3), weight=0.0),
}


@pytest.mark.parametrize("read_ahead", [0, 1])
@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("raises", "KeyError: 'answer'"),
    ("says", "math domain error"),
    ("no target", "no token to train on"),
    ("shape", r"3 tokens have a mask of shape \(2,\)"),
    ("floats", r"tokens must be integers \[n\], got float64 \(3,\)"),
    ("nothing", "no token to train on"),
    ("weight", "weight of the example: expected a finite number > 0, found 0.0"),
  ],
)
def test_encode_errors_name_the_row(kind, message, read_ahead):
  rows = [{**row, "kind": kind} for row in ROWS]
  data = pipeline.train_batches(mixture(rows, None), broken, LAYOUT, read_ahead=read_ahead)
  iterator = iter(data)
  with pytest.raises(ValueError, match=rf"^b\[5\]: {message}"):
    for _ in range(100):
      next(iterator)
  with pytest.raises(ValueError, match=r"^b\[5\]: "):  # and not the window after it
    next(iterator)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 1}, "saved with seed=0, now seed=1"),
    (
      {"rows": ROWS[:48]},
      r"saved with sources=\{'a': 25, 'b': 25\}, now sources=\{'a': 24, 'b': 24\}",
    ),
    ({"layout": dataclasses.replace(LAYOUT, row_length=64)}, "row_length=32, now row_length=64"),
    ({"layout": dataclasses.replace(LAYOUT, packed=False)}, "packed=True, now packed=False"),
    ({"layout": dataclasses.replace(LAYOUT, window=32)}, "window=16, now window=32"),
    ({"epochs": 3}, "epochs=None, now epochs=3"),
  ],
)
def test_a_state_of_something_else_is_refused(change, message):
  state = iter(batches()).get_state()
  iterator = iter(batches(**change))
  before = iterator.get_state()
  with pytest.raises(ValueError, match=message):
    iterator.set_state(state)
  assert iterator.get_state() == before


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: batches(host=Host(2, 2)), "host 2 does not exist among 2 hosts"),
    (lambda: batches(host=Host(0, 3)), "batch_size=4 does not divide among 3 hosts"),
    (lambda: batches(epochs=0), "epochs must be at least 1"),
    (lambda: Layout(0, 8), "batch_size must be at least 1, got 0"),
    (lambda: Layout(4, 8, window=0), "window must be at least 1, got 0"),
    (
      lambda: pipeline.microbatches(np.zeros((4, 2)), 3),
      "4 rows do not divide into 3 microbatches",
    ),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_microbatches_are_the_same_for_any_number_of_hosts():
  batch = next(iter(batches(dataclasses.replace(LAYOUT, batch_size=8))))
  whole = pipeline.microbatches(batch, 2)
  assert whole.tokens.shape == (2, 4, 32)
  np.testing.assert_array_equal(whole.tokens[1], batch.tokens[1::2])
  for rows in (slice(0, 4), slice(4, 8)):
    share = pipeline.microbatches(jax.tree.map(lambda x, r=rows: x[r], batch), 2)
    here = slice(rows.start // 2, rows.stop // 2)
    assert_same(share, jax.tree.map(lambda x, r=here: x[:, r], whole))
