"""Drawing a token against NumPy written from the definitions of top-k, min-p and top-p."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.rollout.sampling import Needs, choose, draw, keep_likely, sample
from tests.rollout.definitions import chi_square, kept, softmax

ROWS = 20_000
LOGITS = np.array([2.0, 1.1, 1.1, 0.3, -0.4, -1.0, -2.5, -4.0], np.float32)


def params(**options):
  return SamplingParams(max_tokens=1, **options)


def draws(logits, options, rows=ROWS, seed=0, gumbel=False):
  keys = jax.random.split(jax.random.key(seed), rows)
  needs = dataclasses.replace(Needs.of(options), gumbel=gumbel)
  logits = jnp.broadcast_to(logits, (rows, len(logits)))
  tokens, logprobs, _ = jax.jit(draw, static_argnums=(2, 3))(logits, keys, options, needs)
  return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("temperature, gumbel", [(1.0, False), (0.6, False), (1.7, True)])
def test_the_distribution_is_the_softmax(temperature, gumbel):
  tokens, logprobs = draws(LOGITS, params(temperature=temperature), gumbel=gumbel)
  p = softmax(LOGITS, temperature)
  assert chi_square(tokens, p) > 1e-3
  np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)
  assert chi_square(tokens, softmax(LOGITS, temperature * 1.1)) < 1e-3  # the test can fail


@pytest.mark.parametrize("vocab", [5, 128, 1000])  # within a chunk, one chunk, several
def test_choose_inverts_the_cumulative_sum(vocab):
  rng = np.random.default_rng(vocab)
  weights = rng.exponential(size=(500, vocab)).astype(np.float32) * (rng.random(vocab) < 0.5)
  weights[:, vocab // 2] += 0.1
  uniform = rng.random(500).astype(np.float32)
  total = np.cumsum(weights.astype(np.float64), -1)
  mark = uniform[:, None] * total[:, -1:]
  tokens = np.asarray(choose(jnp.asarray(weights), jnp.asarray(uniform)))
  rows, near = np.arange(500), 1e-5 * total[:, -1]  # where rounding may decide otherwise
  assert (weights[rows, tokens] > 0).all()
  assert (total[rows, tokens] > mark[:, 0] - near).all()
  assert (total[rows, tokens] - weights[rows, tokens] <= mark[:, 0] + near).all()


def test_choose_at_both_ends_takes_a_token_that_has_weight():
  weights = jnp.zeros((2, 300)).at[:, 130:200].set(0.1)
  ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
  np.testing.assert_array_equal(choose(weights, ends), [130, 199])


CUTS = [
  {"top_k": 1},
  {"top_k": 2},  # the second and third are equally likely: both stay
  {"top_k": 3},
  {"top_k": 99},
  {"top_p": 1e-9},  # the most likely one stays
  {"top_p": 0.5},
  {"top_p": 0.6},  # ends within the tie
  {"top_p": 0.95},
  {"min_p": 0.1},
  {"min_p": 1.0},
  {"top_k": 5, "top_p": 0.9},  # top-p of what top-k left: fewer than of the whole
  {"top_k": 6, "min_p": 0.05, "top_p": 0.97, "temperature": 1.5},
]


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_cuts_leave_what_their_definitions_say(options):
  expected = kept(LOGITS, **options)
  p = softmax(LOGITS, options.get("temperature", 1.0))
  tokens, logprobs = draws(LOGITS, params(**options), rows=4000)
  left = np.where(np.isin(np.arange(len(p)), [*expected]), p, 0)
  assert chi_square(tokens, left / left.sum()) > 1e-3 if len(expected) > 1 else True
  assert set(tokens) <= expected
  np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)  # of the whole distribution


def test_cuts_matter():
  sets = [frozenset(kept(LOGITS, **options)) for options in CUTS]
  assert frozenset({0, 1, 2}) in sets and frozenset({0}) in sets and len(set(sets)) >= 5


def test_cuts_of_many_random_distributions():
  rng = np.random.default_rng(0)
  logits = rng.normal(scale=2.0, size=(64, 24)).round(1).astype(np.float32)  # with ties
  for options in ({"top_k": 5}, {"top_p": 0.83}, {"min_p": 0.07}, CUTS[-1] | {"temperature": 1.0}):
    alive = np.isfinite(np.asarray(keep_likely(jnp.asarray(logits), params(**options))))
    for row in range(len(logits)):
      assert set(np.flatnonzero(alive[row])) == kept(logits[row], **options), (row, options)


def test_greedy_takes_the_most_likely_at_temperature_one():
  logits = np.random.default_rng(1).normal(size=(32, 24)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 32)
  tokens, logprobs = sample(jnp.asarray(logits), keys, params(temperature=0.0))
  np.testing.assert_array_equal(tokens, logits.argmax(-1))
  expected = [np.log(softmax(row).max()) for row in logits]
  np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_a_row_depends_on_its_own_key_alone():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(16, 24)).astype(np.float32))
  keys = jax.random.split(jax.random.key(3), 16)
  whole, _ = sample(logits, keys, params())
  for row in (0, 7, 15):
    alone, _ = sample(logits[row : row + 1], keys[row : row + 1], params())
    assert alone[0] == whole[row]
  other, _ = sample(logits, jax.random.split(jax.random.key(4), 16), params())
  assert (np.asarray(other) != np.asarray(whole)).any()


@pytest.mark.parametrize(
  "field, value",
  [
    ("max_tokens", 0),
    ("temperature", -0.1),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("stop_strings", ("a", "")),
  ],
)
def test_options_that_make_no_sense(field, value):
  with pytest.raises(ValueError, match=rf"^sampling\.{field}: expected .*, found "):
    SamplingParams(**{"max_tokens": 1, field: value})
