"""What the engine samples, against the distribution of the training forward pass: chi-square."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

from pt_jax import sharding
from pt_jax.models import decoder
from pt_jax.rollout.constraints import Grammars, regex
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.proposals import Draft, Speculation
from pt_jax.rollout.rollouts import SamplingParams
from tests.rollout import tiny
from tests.rollout.definitions import cut

PROMPT = [7, 21, 40, 7, 21, 40, 7, 21]
SAMPLES, VOCAB = 3000, tiny.MODEL.vocab_size
EXPECTED = 5  # of a cell at least; rarer ones are counted together


class Letters:
  """A tokenizer of one byte a token."""

  name = "letters"

  def token_bytes(self):
    return [bytes([65 + i]) for i in range(VOCAB)]


@pytest.fixture(scope="module", autouse=True)
def mesh():
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield


@functools.cache
def make_engine(speculation=None):
  grammars = Grammars(Letters(), VOCAB)
  options = {"slots": 256, "max_length": 16, "page": 8, "grammars": grammars}
  return Engine(tiny.MODEL, tiny.params(), speculation=speculation, **options)


@pytest.fixture
def engine():
  return make_engine()


@functools.cache
def logits():
  """After the prompt [V], and after the prompt and each first token [V, V]."""
  forward = jax.jit(functools.partial(decoder.forward, c=tiny.MODEL))
  rows = np.array([[*PROMPT, i] for i in range(VOCAB)], np.int32)
  index = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
  params = tiny.params()
  hidden = forward(params, tokens=rows, positions=index, segment_ids=np.zeros_like(rows))
  found = np.asarray(hidden, np.float64) @ np.asarray(params["unembed"], np.float64).T
  return found[0, -2], found[:, -1]


def pairs(first, second):
  """[V, V], the probability of every two tokens."""
  return first[:, None] * second


def p_value(drawn, expected):
  """Of pairs [N, 2] being drawn from `expected` [V, V]."""
  seen = np.zeros(expected.shape)
  np.add.at(seen, (drawn[:, 0], drawn[:, 1]), 1)
  assert not seen[expected == 0].any()
  often = expected * len(drawn) >= EXPECTED
  rest = lambda x: x[(expected > 0) & ~often].sum()
  counts = np.append(seen[often], rest(seen))
  means = np.append(expected[often], rest(expected)) * len(drawn)
  some = means > 0
  return stats.chisquare(counts[some], means[some], sum_check=False).pvalue


def draw(engine, count=2, **options):
  """The first tokens of each sample."""
  sampling = SamplingParams(max_tokens=count, **options)
  found = engine.generate([PROMPT], sampling, key=jax.random.key(5), n=SAMPLES)
  return found.tokens[:, len(PROMPT) :]


CUTS = [
  {},
  {"temperature": 0.6},
  {"top_k": 5},
  {"top_p": 0.8},
  {"min_p": 0.05},
  {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_samples_are_the_models(engine, options):
  first, second = logits()
  expected = pairs(cut(first, **options), np.array([cut(z, **options) for z in second]))
  drawn = draw(engine, **options)
  assert p_value(drawn, expected) > 1e-3
  if [*options] == ["temperature"]:  # the test can fail
    wrong = pairs(cut(first, temperature=0.7), np.array([cut(z, temperature=0.7) for z in second]))
    assert p_value(drawn, wrong) < 1e-3


@pytest.mark.parametrize("by_draft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_samples_are_the_models_with_speculation(by_draft):
  """The first two tokens of four: proposals are read in the step that draws them."""
  options = {"temperature": 0.8, "top_p": 0.95}
  rng = np.random.default_rng(0)
  noisy = lambda w: (w * (1 + 0.05 * rng.normal(size=w.shape))).astype(w.dtype)
  draft = Draft(tiny.MODEL, jax.tree.map(noisy, tiny.params())) if by_draft else None
  engine = make_engine(Speculation(tokens=2, draft=draft))
  first, second = logits()
  expected = pairs(cut(first, **options), np.array([cut(z, **options) for z in second]))
  drawn = draw(engine, count=4, **options)
  assert p_value(drawn, expected) > 1e-3
  assert 0.02 < engine.figures.accepted / engine.figures.proposed < 0.98


def test_constrained_samples_are_the_models_renormalised(engine):
  """Of `[A-T]` and then, behind a letter up to J, `[K-Z]`, else any of `[A-M]`."""
  options = {"temperature": 0.7, "top_p": 0.9}
  first, second = logits()
  form = regex("[A-J][K-Z][A-Z]*|[K-T][A-M][A-Z]*")
  letter, stop = np.arange(VOCAB), VOCAB - 1
  behind = lambda i: (letter >= 10) & (letter < 26) if i < 10 else letter < 13
  allow = lambda z, where: cut(np.where(where, z, -1e9), **options)
  expected = pairs(
    allow(first, letter < 20),
    np.array([allow(z, behind(i)) for i, z in enumerate(second)]),
  )
  drawn = draw(engine, constraint=form, stop_tokens=(stop,), **options)
  assert p_value(drawn, expected) > 1e-3
