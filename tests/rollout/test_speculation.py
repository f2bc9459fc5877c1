"""Speculation changes no token: engines with it against the engine without."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.guides import Thinking
from pt_jax.rollout.proposals import Draft, Speculation
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from tests.rollout import tiny

KEY, NEW = 11, 20
SMALL = dataclasses.replace(tiny.MODEL, layers=1, kv_heads=4, head_dim=16, hidden=32)


@pytest.fixture(scope="module", autouse=True)
def mesh():
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield


@functools.cache
def prompts():
  """Texts that repeat themselves, and some that do not."""
  rng = np.random.default_rng(4)
  made = [(rng.integers(0, 64, 5).tolist() * 4)[: 9 + i] for i in range(4)]
  return made + tiny.prompts((1, 6, 14, 22), seed=3)


@functools.cache
def close():
  """A draft that is nearly the model: its weights with a little noise."""
  rng = np.random.default_rng(0)
  noisy = lambda w: (w * (1 + 0.1 * rng.normal(size=w.shape))).astype(w.dtype)
  return Draft(tiny.MODEL, jax.tree.map(noisy, tiny.params()))


def make_engine(speculation=None, **options):
  options = {"slots": 6, "max_length": tiny.LENGTH, "page": 8} | options
  return Engine(tiny.MODEL, tiny.params(), speculation=speculation, **options)


def generate(engine, n=2, **options):
  sampling = SamplingParams(max_tokens=NEW, **options)
  return engine.generate(prompts(), sampling, key=jax.random.key(KEY), n=n)


def same(found, expected):
  for name in ("tokens", "length", "stop", "version"):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


GREEDY, DRAWN = {"temperature": 0.0, "n": 1}, {"temperature": 0.3, "top_p": 0.95}
LOOKUP = {
  "a view": (Speculation(), {}),
  "few pages, short launches": (Speculation(), {"pages": 7, "launch": 5, "chunk": 16}),
  "on pages": (Speculation(tokens=3, ngram=2), {"pages": 12, "paged": True}),
}


@functools.cache
def plain(name):
  return generate(make_engine(), **{"greedy": GREEDY, "drawn": DRAWN}[name])


@pytest.mark.parametrize("case", LOOKUP)
def test_looked_up_proposals_change_no_token(case):
  speculation, options = LOOKUP[case]
  engine = make_engine(speculation, **options)
  same(generate(engine, **GREEDY), plain("greedy"))
  same(generate(engine, **DRAWN), plain("drawn"))
  figures = engine.figures
  assert 0 < figures.accepted < figures.proposed and figures.pages_held == 0
  assert figures.speculated == figures.generated > 1.2 * figures.verified
  if case == "few pages, short launches":
    assert figures.preemptions > 0
  else:
    assert figures.launches < 20


def test_log_probs_are_the_trainers():
  engine = make_engine(Speculation())
  for options, temperature in ((GREEDY, 1.0), (DRAWN, DRAWN["temperature"])):
    found = generate(engine, **options)
    ours, inside = tiny.trainer_logprobs(tiny.params(), found, temperature)
    assert np.abs(ours - found.logprobs)[inside].max() <= 1e-4


def test_stops_and_reported_tokens_are_those_of_the_engine_without():
  """A stop token within accepted proposals ends the sample there."""
  stops = {
    int(plain("drawn").tokens[row, plain("drawn").length[row] - 4]) for row in range(0, 16, 3)
  }
  options = DRAWN | {"stop_tokens": tuple(stops)}
  expected, found = (generate(make_engine(s), **options) for s in (None, Speculation()))
  same(found, expected)
  assert {StopReason.TOKEN, StopReason.LENGTH} == set(found.stop.tolist())
  ask = SamplingParams(max_tokens=9, temperature=0.0, top_logprobs=2)
  tops = []
  for speculation in (None, Speculation()):
    engine = make_engine(speculation)
    engine.submit(prompts()[0], ask, key=jax.random.key(0))
    tops.append([out.top_logprobs for out in drain(engine)])
  which = lambda found: [[token for token, _ in top] for part in found for top in part]
  assert which(tops[0]) == which(tops[1]) and len(which(tops[0])) == 9


def drain(engine):
  found = []
  while engine.unfinished:
    found += engine.step()
  return found


def test_rows_under_a_mask_take_turns_with_those_that_speculate():
  thinking = Thinking(budgets=(0, 7), close=(3, 4, 5))
  expected, found = (
    generate(make_engine(s), thinking=thinking, **DRAWN) for s in (None, Speculation(tokens=3))
  )
  same(found, expected)
  np.testing.assert_array_equal(found.forced, expected.forced)


def test_new_weights_in_the_middle():
  """The tokens behind are the new weights', with the same draft as before."""
  drawn = []
  for speculation in (None, Speculation(draft=close())):
    engine = make_engine(speculation, launch=4)
    ask = SamplingParams(max_tokens=NEW, temperature=0.0)
    numbers = [engine.submit(prompt, ask, key=jax.random.key(0)) for prompt in prompts()[:3]]
    tokens: dict = {number: [] for number in numbers}
    while engine.unfinished:
      for out in engine.step():
        tokens[out.request] += [(token, out.version) for token in out.tokens]
      if engine.version == 0 and all(len(own) > 3 for own in tokens.values()):
        engine.update(tiny.params(1), 1)
    drawn.append([tokens[number] for number in numbers])
  versions = [[version for _, version in own] for own in drawn[1]]
  assert all(0 < sum(own) < NEW for own in versions)
  # Launches draw other numbers of tokens, so the swap comes at another token: equal up to there.
  for own, other in zip(*drawn):
    before = min(sum(v == 0 for _, v in tokens) for tokens in (own, other))
    assert own[:before] == other[:before]


def test_a_draft_changes_no_token():
  good = make_engine(Speculation(draft=close()))
  bad = make_engine(Speculation(tokens=2, draft=Draft(SMALL, tiny.params(5, SMALL))), pages=8)
  on_pages = make_engine(Speculation(tokens=3, draft=close()), pages=12, paged=True)
  same(generate(good, **GREEDY), plain("greedy"))
  expected = generate(good, **DRAWN)
  for engine in (bad, on_pages):
    same(generate(engine, **DRAWN), expected)
  share = lambda engine: engine.figures.accepted / engine.figures.proposed
  assert share(good) > 0.6 and share(on_pages) > 0.6 and share(bad) < 0.3
  assert good.figures.since(type(good.figures)())["tokens_per_step"] > 2.5
  ours, inside = tiny.trainer_logprobs(tiny.params(), expected, DRAWN["temperature"])
  assert np.abs(ours - expected.logprobs)[inside].max() <= 1e-4
