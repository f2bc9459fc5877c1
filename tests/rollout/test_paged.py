"""What pages, chunks, preemptions, shared prefixes and new weights may not change: the tokens."""

import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.models import decoder
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.proposals import Speculation
from pt_jax.rollout.rollouts import Rollouts, SamplingParams, StopReason
from tests.rollout import tiny

PAGE = 8
ENGINES = {  # name -> options: each forces something else; the first three in every run
  "roomy": {"chunk": 512},
  "fewest pages, launches of 3, chunks of 5": {"pages": 7, "launch": 3, "chunk": 5},
  "decoded on pages": {"pages": 7, "launch": 3, "paged": True},
  "few pages": {"pages": 10, "chunk": 16},
  "decoded on few pages": {"pages": 12, "paged": True},
  "guessed": {"speculation": Speculation(), "pages": 12},
  "guessed on pages": {"speculation": Speculation(tokens=2), "pages": 10, "paged": True},
}


@pytest.fixture(scope="module", autouse=True)
def mesh():
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield


def make_engine(slots=6, **options):
  return Engine(
    tiny.MODEL, tiny.params(), slots=slots, max_length=tiny.LENGTH, page=PAGE, **options
  )


@functools.cache
def _forward():
  return jax.jit(functools.partial(decoder.forward, c=tiny.MODEL))


def plain_greedy(params, prompts, counts):
  """Whole forward passes over the growing sequences, no cache: the tokens that follow."""
  rows = len(prompts)
  tokens = np.zeros((rows, tiny.LENGTH), np.int32)
  length = np.array([len(p) for p in prompts])
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  index = np.broadcast_to(np.arange(tiny.LENGTH, dtype=np.int32), tokens.shape)
  for _ in range(max(counts)):
    segments = np.where(index < length[:, None], 0, -1).astype(np.int32)
    hidden = _forward()(params, tokens=tokens, positions=index, segment_ids=segments)
    last = np.minimum(length, tiny.LENGTH) - 1
    z = np.asarray(hidden, np.float64)[np.arange(rows), last] @ np.asarray(params["unembed"]).T
    free = length < tiny.LENGTH
    tokens[free, length[free]] = z.argmax(-1)[free]
    length = length + free
  return [tokens[i, len(p) : len(p) + c].tolist() for i, (p, c) in enumerate(zip(prompts, counts))]


def requests(count, seed=0):
  """Prompts of mixed lengths, half of them with one of two common beginnings, and token counts."""
  rng = np.random.default_rng(seed)
  common = [rng.integers(0, 64, 20).tolist() for _ in range(2)]
  prompts, counts = [], []
  for i in range(count):
    own = rng.integers(0, 64, rng.integers(1, 14)).tolist()
    prompts.append((common[rng.integers(2)][: rng.integers(8, 21)] if i % 2 else []) + own)
    counts.append(int(rng.integers(1, min(20, tiny.LENGTH - len(prompts[-1])))))
  return prompts, counts


def drain(engine, found):
  """Steps to the end; adds tokens, log-probs and versions to `found` by (request, sample)."""
  while engine.unfinished:
    take(engine, found)
  return found


def take(engine, found):
  for out in engine.step():
    tokens, logprobs, versions = found.setdefault((out.request, out.sample), ([], [], []))
    tokens.extend(out.tokens)
    logprobs.extend(out.logprobs)
    versions.extend([out.version] * len(out.tokens))


def check_logprobs(params, prompts, drawn):
  """The trainer's, of completions (tokens, log-probs, versions)."""
  length = np.array([len(p) + len(d[0]) for p, d in zip(prompts, drawn)], np.int32)
  tokens = np.zeros((len(prompts), tiny.LENGTH), np.int32)
  logprobs = np.zeros(tokens.shape, np.float32)
  for i, (prompt, own) in enumerate(zip(prompts, drawn)):
    tokens[i, : length[i]] = [*prompt, *own[0]]
    logprobs[i, len(prompt) : length[i]] = own[1]
  fields = (tokens, np.array([len(p) for p in prompts], np.int32), length, logprobs)
  found = Rollouts(*fields, np.zeros_like(tokens), np.zeros(len(prompts)), tokens < 0)
  ours, inside = tiny.trainer_logprobs(params, found, 1.0)
  assert np.abs(ours - logprobs)[inside].max() <= 1e-4


def check_greedy(count, seed, engines, weights):
  """Every engine on every weights, which it is given while it holds pages of the ones before."""
  prompts, counts = requests(count, seed)
  params = [tiny.params(w) for w in range(weights)]
  expected = [plain_greedy(p, prompts, counts) for p in params]
  seen = {}
  for name in engines:
    engine = make_engine(**ENGINES[name])
    for version in range(weights):
      if version:
        engine.update(params[version], version)
      numbers = [
        engine.submit(p, SamplingParams(max_tokens=c, temperature=0.0), key=jax.random.key(0))
        for p, c in zip(prompts, counts)
      ]
      found = drain(engine, {})
      drawn = [found[number, 0] for number in numbers]
      assert [tokens for tokens, _, _ in drawn] == expected[version], name
      assert {v for _, _, versions in drawn for v in versions} == {version}
      check_logprobs(params[version], prompts, drawn)
    seen[name] = engine.figures
    assert engine.figures.pages_held == 0 and engine.figures.finished == count * weights
  roomy, fewest, paged = list(seen.values())[:3]
  assert fewest.preemptions > 3 and paged.preemptions > 3
  assert roomy.preemptions == 0 and roomy.prefix_hits > 0
  assert fewest.prefills > 2 * roomy.prefills


def test_greedy_is_a_plain_loop_whatever_the_pages():
  check_greedy(24, 0, [*ENGINES][:3], weights=1)


@pytest.mark.slow
def test_greedy_is_a_plain_loop_for_two_hundred_requests_after_weight_updates():
  check_greedy(200, 1, ENGINES, weights=3)


def test_preempted_samples_keep_their_log_probs_and_draw_the_same():
  sampling = SamplingParams(max_tokens=20, temperature=0.9)
  prompts = tiny.prompts((9, 17, 3, 12))
  found = [
    make_engine(pages=pages).generate(prompts, sampling, key=jax.random.key(3), n=3)
    for pages in (None, 8)
  ]
  np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
  np.testing.assert_allclose(found[0].logprobs, found[1].logprobs, atol=1e-5)
  ours, inside = tiny.trainer_logprobs(tiny.params(), found[1], 0.9)
  assert np.abs(ours - found[1].logprobs)[inside].max() <= 1e-4


def test_a_group_computes_its_prompt_once():
  """31 tokens of each prompt once, the last one per sample; else each sample computes them all."""
  prompts, sampling = tiny.prompts((32, 32)), SamplingParams(max_tokens=4)
  engine = make_engine(slots=16)
  engine.generate(prompts, sampling, key=jax.random.key(0), n=8)
  assert engine.figures.prefilled == 2 * 31 + 2 * 8
  assert engine.figures.prefix_hits == 2 * 7 * 31
  engine.generate(prompts, sampling, key=jax.random.key(0), n=8)  # nothing is left of the first
  assert engine.figures.prefilled == 2 * (2 * 31 + 2 * 8)


def test_a_prompt_that_was_seen_is_not_computed_again_until_the_weights_change():
  engine = make_engine()
  prompt, sampling = tiny.prompts((26,))[0], SamplingParams(max_tokens=2, temperature=0.0)
  computed, tokens = [], []
  for seed in (None, None, 1):
    if seed is not None:
      engine.update(tiny.params(seed), 5)
    before = engine.figures.prefilled
    engine.submit(prompt, sampling, key=jax.random.key(0))
    ((drawn, _, versions),) = drain(engine, {}).values()
    computed.append(engine.figures.prefilled - before)
    tokens.append(drawn)
  assert computed == [26, 2, 26]  # 24 tokens in full pages, of 25 that are computed first
  assert tokens[0] == tokens[1] and versions == [5, 5]
  assert tokens[2] == plain_greedy(tiny.params(1), [prompt], [2])[0]


def test_new_weights_in_the_middle_of_completions():
  engine = make_engine(launch=4)
  prompts = tiny.prompts((5, 13, 20))
  sampling = SamplingParams(max_tokens=16, temperature=0.0)
  numbers = [engine.submit(p, sampling, key=jax.random.key(0)) for p in prompts]
  found: dict = {}
  for _ in range(3):
    take(engine, found)
  engine.update(tiny.params(1), 1)
  drain(engine, found)
  for number, prompt in zip(numbers, prompts):
    tokens, _, versions = found[number, 0]
    old = versions.count(0)
    assert 0 < old < 16 and versions == [0] * old + [1] * (16 - old)
    assert tokens[:old] == plain_greedy(tiny.params(), [prompt], [old])[0]
    rest = plain_greedy(tiny.params(1), [prompt + tokens[:old]], [16 - old])[0]
    assert tokens[old:] == rest


def test_requests_with_other_sampling_in_one_batch():
  """Each gets what it gets alone."""
  prompt = tiny.prompts((7,))[0]
  ways = [
    SamplingParams(max_tokens=9, temperature=0.0),
    SamplingParams(max_tokens=12, temperature=0.8, top_k=5, top_logprobs=4),
    SamplingParams(max_tokens=7, temperature=1.3, top_p=0.7, min_p=0.02, top_logprobs=3),
    SamplingParams(max_tokens=12, stop_tokens=tuple(range(0, 64, 5))),
  ]
  key, engine, alone = jax.random.key(8), make_engine(), []
  for sampling in ways:
    number = engine.submit(prompt, sampling, key=key, n=2)
    found = drain(engine, {})
    alone.append([found[number, j][0] for j in range(2)])
  numbers = [engine.submit(prompt, sampling, key=key, n=2) for sampling in ways]
  found = drain(engine, {})
  assert [[found[number, j][0] for j in range(2)] for number in numbers] == alone


def test_the_most_likely_tokens_are_reported():
  engine = make_engine()
  sampling = SamplingParams(max_tokens=5, temperature=0.0, top_logprobs=3)
  engine.submit(tiny.prompts((6,))[0], sampling, key=jax.random.key(0))
  (out,) = engine.step()
  assert len(out.top_logprobs) == 5 and out.stop == StopReason.LENGTH
  for token, logprob, top in zip(out.tokens, out.logprobs, out.top_logprobs):
    assert len(top) == 3 and top[0][0] == token and top[0][1] == pytest.approx(logprob, abs=1e-6)
    assert top[0][1] >= top[1][1] >= top[2][1]


def test_aborted_requests_give_their_pages_back():
  engine = make_engine(launch=2)
  sampling = SamplingParams(max_tokens=30)
  numbers = [engine.submit(p, sampling, key=jax.random.key(0), n=4) for p in tiny.prompts((9, 8))]
  engine.step()
  engine.abort(numbers[0])
  assert {out.request for out in engine.step()} == {numbers[1]}
  engine.abort(numbers[1])
  engine.abort(99)
  assert not engine.unfinished and engine.step() == [] and engine.figures.pages_held == 0


def test_programs_are_few():
  """Launches: rows 16 and 8, views of 32 and 48 positions. Prefills: chunks of 32, 128 and 512. The
  rest moves 4, 8 or 16 samples of 1, 2 or 4 pages. Other requests need no others."""
  engine, rng, counts = make_engine(slots=16), np.random.default_rng(0), []
  for _ in range(16):
    lengths = rng.integers(1, 30, rng.integers(1, 20))
    sampling = SamplingParams(max_tokens=int(rng.integers(1, 18)))
    engine.generate(tiny.prompts(lengths), sampling, key=jax.random.key(0))
    counts.append(engine.figures.compilations)
  assert counts[-1] <= 16 and counts[-1] - counts[7] <= 3


@pytest.mark.parametrize(
  "options, message",
  [
    ({"slots": 0}, "expected slots in multiples of 1"),
    ({"pages": 6}, "expected pages of at least 7, found 6"),
    ({"chunk": 0}, "expected chunk of at least 1, found 0"),
    ({"launch": 0}, "expected launch of at least 1, found 0"),
  ],
)
def test_sizes_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=f"^engine: {message}"):
    make_engine(**options)
