"""Scores of rollouts equal the values of each completion alone."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.models import heads
from pt_jax.rewards.model import pessimistic_mean, score_completions, score_steps
from pt_jax.rollout.rollouts import Rollouts
from tests.steps import tiny

MEMBERS = 3
WIDTH = 12


@functools.cache
def params():
  head = np.random.default_rng(4).normal(size=(MEMBERS, tiny.MODEL.width)).astype(np.float32)
  return heads.from_decoder(tiny.params(), head)


@functools.cache
def rollouts(count: int = 11) -> Rollouts:
  rng = np.random.default_rng(count)
  prompt = rng.integers(1, 5, count)
  length = prompt + rng.integers(1, WIDTH - 4, count)
  tokens = rng.integers(0, tiny.MODEL.vocab_size, (count, WIDTH), dtype=np.int32)
  tokens[np.arange(WIDTH) >= length[:, None]] = 0
  zeros = np.zeros((count, WIDTH), np.float32)
  fields = (
    tokens,
    prompt,
    length,
    zeros,
    zeros.astype(np.int32),
    np.zeros(count, np.int8),
    zeros > 0,
  )
  return Rollouts(*map(np.asarray, fields))


@functools.cache
def alone(count: int = 11) -> np.ndarray:
  """[N, W, E], every rollout in a row of its own."""
  r = rollouts(count)
  index = np.arange(WIDTH)
  ids = np.where(index < r.length[:, None], 0, -1).astype(np.int32)
  positions = np.where(ids < 0, 0, index).astype(np.int32)
  values = jax.jit(functools.partial(heads.values, c=tiny.MODEL))
  return np.asarray(values(params(), tokens=r.tokens, positions=positions, segment_ids=ids))


def test_the_score_is_the_value_at_the_last_token(one_device):
  r = rollouts()
  got = score_completions(params(), tiny.MODEL, r, mesh=one_device, rows=2, row_length=20)
  assert got.shape == (11, MEMBERS) and got.dtype == np.float32
  want = alone()[np.arange(11), r.length - 1]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.ptp(got, axis=0).min() > 0.1
  # The order of the rollouts is theirs: packing moves them about.
  back = jax.tree.map(lambda x: x[::-1], r)
  again = score_completions(params(), tiny.MODEL, back, mesh=one_device, rows=2, row_length=20)
  np.testing.assert_allclose(again[::-1], got, rtol=1e-5, atol=1e-5)


def test_scores_of_steps_stand_at_their_marks(one_device):
  r = rollouts()
  index = np.arange(WIDTH)
  inside = (index >= r.prompt_length[:, None]) & (index < r.length[:, None])
  marks = inside & (np.random.default_rng(0).random(inside.shape) < 0.5)
  got = score_steps(params(), tiny.MODEL, r, marks, mesh=one_device, rows=2, row_length=20)
  assert got.shape == (11, WIDTH, MEMBERS)
  assert not got[~marks].any()
  np.testing.assert_allclose(got[marks], alone()[marks], rtol=1e-5, atol=1e-5)


def test_few_programs(one_device):
  """5 to 11 completions need one to four microbatches: at most three shapes."""
  from pt_jax.rewards import model

  compiled = model._compiled(tiny.MODEL)
  before = compiled._cache_size()
  for count in range(5, 12):
    r = jax.tree.map(lambda x, n=count: x[:n], rollouts())
    got = score_completions(params(), tiny.MODEL, r, mesh=one_device, rows=2, row_length=20)
    want = alone()[np.arange(count), r.length - 1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert compiled._cache_size() - before <= 3


def test_pessimism_takes_off_what_members_disagree_on():
  values = np.float32([[1, 2, 3], [2, 2, 2]])
  np.testing.assert_allclose(pessimistic_mean(values), [2, 2])
  np.testing.assert_allclose(pessimistic_mean(values, 2.0), [2 - 2 * np.sqrt(2 / 3), 2], rtol=1e-6)
  with pytest.raises(ValueError, match="pessimism: expected a number >= 0, found -1"):
    pessimistic_mean(values, -1)


def test_what_does_not_fit_is_named(one_device):
  r = rollouts()
  score = functools.partial(score_steps, params(), tiny.MODEL, r, mesh=one_device, rows=2)
  with pytest.raises(ValueError, match=r"completion \d+ has \d+ tokens, a row holds 4"):
    score(np.zeros((11, WIDTH), bool), row_length=4)
  on_prompt = np.arange(WIDTH)[None] < r.prompt_length[:, None]
  with pytest.raises(ValueError, match="none outside the completions"):
    score(on_prompt, row_length=20)
