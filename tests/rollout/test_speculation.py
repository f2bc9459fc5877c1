"""Speculation changes no token: engines with it against the engine without."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.models import decoder
from pt_jax.plan import topology
from pt_jax.rollout import cache, programs, speculative
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.figures import EngineFigures
from pt_jax.rollout.guides import Thinking
from pt_jax.rollout.proposals import Draft, Plan, Speculation
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from pt_jax.rollout.sampling import Needs
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


def close():
  """A draft that is nearly the model: its weights with a little noise."""
  rng = np.random.default_rng(0)
  noisy = lambda w: (w * (1 + 0.02 * rng.normal(size=w.shape))).astype(w.dtype)
  return Draft(tiny.MODEL, jax.tree.map(noisy, tiny.params()))


@functools.cache
def make_engine(speculation=None, **options):
  options = {"slots": 6, "max_length": tiny.LENGTH, "page": 8} | options
  return Engine(tiny.MODEL, tiny.params(), speculation=speculation, **options)


DRAWN = SamplingParams(max_tokens=NEW, temperature=0.3, top_p=0.95, top_logprobs=2)
GREEDY = dataclasses.replace(DRAWN, temperature=0.0)
LOOKUP = {
  "a view": (Speculation(), {}),
  "few pages, short launches": (
    Speculation(tokens=3, ngram=2),
    {"pages": 8, "launch": 5, "chunk": 16, "paged": True},
  ),
}


def ask(engine, **changes):
  """Greedy and sampled completions side by side: all that came of each."""
  ways = [dataclasses.replace(way, **changes) for way in (GREEDY, DRAWN)]
  for i, prompt in enumerate(prompts() * 2):
    engine.submit(prompt, ways[i // len(prompts())], key=jax.random.key(KEY + i), n=1 + i % 2)
  first, found = min(engine._requests), {}
  while engine.unfinished:
    for out in engine.step():
      parts = found.setdefault((out.request - first, out.sample), ([], [], [], [], []))
      parts[0].extend(out.tokens)
      parts[1].extend(out.logprobs)
      parts[2].extend([token for token, _ in top] for top in out.top_logprobs)
      parts[3].extend([x for _, x in top] for top in out.top_logprobs)
      parts[4].append(out.stop)
  return found


def same(found, expected):
  assert found.keys() == expected.keys()
  for sample, (tokens, logprobs, top, top_logprobs, stops) in found.items():
    other = expected[sample]
    assert (tokens, top, stops[-1]) == (other[0], other[2], other[4][-1])
    np.testing.assert_allclose(logprobs, other[1], atol=1e-4)
    np.testing.assert_allclose(top_logprobs, other[3], atol=1e-4)


@functools.cache
def plain():
  return ask(make_engine())


@pytest.mark.parametrize("case", LOOKUP)
def test_looked_up_proposals_change_no_token(case):
  speculation, options = LOOKUP[case]
  engine = make_engine(speculation, **options)
  same(ask(engine), plain())
  figures = engine.figures
  assert 0 < figures.accepted < figures.proposed and figures.pages_held == 0
  assert figures.speculated == figures.generated > 1.05 * figures.verified
  assert (figures.preemptions > 0) == ("pages" in options)


def test_log_probs_are_the_trainers():
  found = make_engine(Speculation()).generate(prompts(), DRAWN, key=jax.random.key(0), n=2)
  ours, inside = tiny.trainer_logprobs(tiny.params(), found, DRAWN.temperature)
  assert np.abs(ours - found.logprobs)[inside].max() <= 1e-4


def test_stop_tokens_within_accepted_proposals():
  stops = tuple({tokens[i % NEW] for i, (tokens, *_) in enumerate(plain().values())})[:4]
  expected, found = (ask(make_engine(s), stop_tokens=stops) for s in (None, Speculation()))
  same(found, expected)
  ends = {stop for *_, stops in found.values() for stop in stops[-1:]}
  assert ends == {StopReason.TOKEN, StopReason.LENGTH}


def test_rows_under_a_mask_take_turns_with_those_that_speculate():
  thinking = Thinking(budgets=(0, 7), close=(3, 4, 5))
  expected, found = (ask(make_engine(s), thinking=thinking) for s in (None, Speculation()))
  same(found, expected)


def test_a_draft_changes_no_token():
  good = make_engine(Speculation(draft=close()))
  greedy = lambda found: {k: v for k, v in found.items() if k[0] < len(prompts())}
  expected = ask(good)
  same(greedy(expected), greedy(plain()))
  bad = make_engine(
    Speculation(tokens=2, draft=Draft(SMALL, tiny.params(5, SMALL))), pages=8, paged=True
  )
  same(ask(bad), expected)
  share = lambda engine: engine.figures.accepted / engine.figures.proposed
  assert share(good) > 0.5 > 0.3 > share(bad) and bad.figures.preemptions > 0
  assert good.figures.since(EngineFigures())["tokens_per_step"] > 2.5
  found = good.generate(prompts(), DRAWN, key=jax.random.key(0), n=2)
  ours, inside = tiny.trainer_logprobs(tiny.params(), found, DRAWN.temperature)
  assert np.abs(ours - found.logprobs)[inside].max() <= 1e-4


def test_new_weights_in_the_middle():
  """The draft stays as it was, and the tokens are the new weights'."""
  engine = make_engine(Speculation(draft=close()), launch=4)
  prompt, tokens, versions = prompts()[0], [], []
  engine.submit(prompt, GREEDY, key=jax.random.key(0))
  while engine.unfinished:
    for out in engine.step():
      tokens += out.tokens
      versions += [out.version] * len(out.tokens)
    if engine.version == 0 and len(tokens) > 3:
      engine.update(tiny.params(1), 1)
  old = versions.count(0)
  assert 3 < old < NEW and versions == [0] * old + [1] * (NEW - old)
  assert tokens[:old] == plain()[0, 0][0][:old]
  other = make_engine()
  other.update(tiny.params(1), 1)
  rest = other.generate([prompt + tokens[:old]], GREEDY, key=jax.random.key(0))
  other.update(tiny.params(), 0)
  assert rest.tokens[0, len(prompt) :][:NEW].tolist() == tokens


@pytest.mark.slow
def test_it_compiles_for_a_tpu():
  """On pages, k + 1 queries of each sequence in the kernel; n-grams and a draft."""
  piece = topology.open_slice("v5e:2x4")
  mesh = topology.mesh_on(piece, {"data": 4, "tensor": 2})
  c = dataclasses.replace(tiny.MODEL, width=512, heads=8, kv_heads=4, head_dim=128, hidden=1024)
  c = dataclasses.replace(c, compute_dtype="bfloat16", param_dtype="bfloat16")
  rows, pages, page = 16, 32, 32
  with jax.set_mesh(mesh):
    place = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, jax.typeof(x).sharding.spec)
    )
    init = lambda key: programs.use_layout(decoder.init(key, c, sharding.USE), config=c)
    w = jax.tree.map(place, jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))))
    held = jax.eval_shape(lambda: cache.empty(c, 4 * (pages + 1), page))
    held = jax.tree.map(place, held)
    host = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
    number = [host(rows)] * 3
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
    floats = (of(np.float32), host(rows), of(np.float32), of(np.float32))
    key = of(np.uint32, 2)
    asked = programs.Rows(
      *number, of(bool), key, host(rows), *floats, host(rows, 4), host(rows, pages + 1), None
    )
    history = speculative.History(host(rows, 1088), host(rows))
    for models in (1, 2):
      plan = Plan(c, c if models == 2 else None, 4, 3)
      lowered = speculative.launch.lower(
        *((w,) * models, (held,) * models, asked, history, host(), host(), host()),
        plan=plan,
        needs=Needs(gumbel=models == 2),
        tokens=64,
        limit=1024,
      )
      kernels = lowered.compile().as_text().count("tpu_custom_call")
      assert kernels >= models * c.layers
