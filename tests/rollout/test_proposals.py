"""What is proposed and what is accepted, against loops in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.rollout.proposals import Draft, Speculation, accept, from_history
from tests.rollout import tiny


def looked_up(tokens, ngram, count):
  """The proposals behind a text, or None, by trying every place and every length."""
  best = None
  for end in range(len(tokens) - 1):
    length = 0
    while length < min(ngram, end + 1) and tokens[end - length] == tokens[-1 - length]:
      length += 1
    if length and (best is None or length >= best[0]):
      best = (length, end)
  if best is None:
    return None
  text = list(tokens)
  period = len(tokens) - 1 - best[1]
  while len(text) < len(tokens) + count:
    text.append(text[-period])
  return text[len(tokens) :]


@pytest.mark.parametrize("ngram, count", [(1, 1), (3, 4), (5, 7)])
def test_proposals_are_what_followed_the_longest_match(ngram, count):
  rng = np.random.default_rng(ngram)
  rows, width = 200, 40
  history = rng.integers(0, rng.integers(2, 12, (rows, 1)), (rows, width)).astype(np.int32)
  position = rng.integers(0, width, rows).astype(np.int32)
  find = jax.jit(from_history, static_argnames=("ngram", "count"))
  proposals, found = find(history, position, ngram=ngram, count=count)
  expected = [looked_up(h[: p + 1].tolist(), ngram, count) for h, p in zip(history, position)]
  assert found.tolist() == [e is not None for e in expected]
  assert proposals[found].tolist() == [e for e in expected if e is not None]
  assert 0 < sum(found) < rows  # both happen


def test_proposals_read_nothing_behind_the_text():
  history = np.array([[5, 6, 5, 9, 9, 9], [5, 6, 5, 1, 2, 3]], np.int32)
  proposals, found = from_history(jnp.asarray(history), jnp.array([2, 2]), ngram=3, count=3)
  assert proposals.tolist() == [[6, 5, 6]] * 2 and found.all()


def test_accepted_is_the_longest_common_beginning_and_one_more():
  rng = np.random.default_rng(0)
  rows, k = 500, 4
  proposals = rng.integers(0, 3, (rows, k)).astype(np.int32)
  drawn = rng.integers(0, 3, (rows, k + 1)).astype(np.int32)
  stops = np.where(rng.random((rows, 2)) < 0.2, rng.integers(0, 3, (rows, 2)), -1).astype(np.int32)
  room = rng.integers(1, k + 3, rows).astype(np.int32)
  found = np.asarray(accept(*map(jnp.asarray, (proposals, drawn, stops, room))))
  for row in range(rows):
    count = 0
    while True:
      token = drawn[row, count]
      count += 1
      if token in stops[row] or count == min(room[row], k + 1):
        break
      if proposals[row, count - 1] != token:
        break
    assert found[row] == count
  assert set(found.tolist()) == set(range(1, k + 2))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"tokens": 0}, "speculation.tokens: expected 1 to 16, found 0"),
    ({"tokens": 17}, "speculation.tokens: expected 1 to 16, found 17"),
    ({"ngram": 0}, "speculation.ngram: expected 1 to 16, found 0"),
  ],
)
def test_options_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    Speculation(**options)


def test_a_draft_has_the_models_vocabulary():
  draft = Draft(tiny.MODEL, {})
  other = tiny.MODEL.__class__(**{**vars(tiny.MODEL), "vocab_size": 65})
  Speculation(draft=draft).plan(tiny.MODEL)
  with pytest.raises(
    ValueError, match=r"^speculation\.draft: expected a vocabulary of 65, found 64"
  ):
    Speculation(draft=draft).plan(other)
