"""The engine against a plain loop over the training forward pass; what no schedule may change."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data.tokenizers import IncrementalDetokenizer
from pt_jax.models import decoder
from pt_jax.rollout import engine as engine_module
from pt_jax.rollout import programs
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from tests.rollout import tiny

LENGTHS = (5, 1, 16, 9, 12, 2, 7)  # more requests than slots
GREEDY = SamplingParams(max_tokens=14, temperature=0.0)
DRAWN = SamplingParams(max_tokens=14, temperature=0.7)
KEY = 11


class Pieces:
  """A tokenizer whose token 7 is "<7>"."""

  def decode(self, ids, *, special=True):
    return "".join(f"<{int(i)}>" for i in ids)


@pytest.fixture(scope="module")
def engine():
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield make_engine()


def make_engine(slots=4, **options):
  detokenizer = functools.partial(IncrementalDetokenizer, Pieces())
  defaults = {"slots": slots, "max_length": tiny.LENGTH, "detokenizer": detokenizer, "version": 3}
  return Engine(tiny.MODEL, tiny.params(), **(defaults | options))


@pytest.fixture(scope="module")
def greedy(engine):
  return engine.generate(tiny.prompts(LENGTHS), GREEDY, key=jax.random.key(KEY))


@pytest.fixture(scope="module")
def drawn(engine):
  """Three samples of seven prompts on four slots."""
  return engine.generate(tiny.prompts(LENGTHS), DRAWN, key=jax.random.key(KEY), n=3)


def completions(rollouts):
  spans = zip(rollouts.prompt_length, rollouts.length)
  return [rollouts.tokens[i, a:b].tolist() for i, (a, b) in enumerate(spans)]


def plain_greedy(params, prompts, count):
  """One whole forward pass over the growing sequences per token, no cache."""
  tokens = np.zeros((len(prompts), tiny.LENGTH), np.int32)
  length = np.array([len(p) for p in prompts])
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  index = np.broadcast_to(np.arange(tiny.LENGTH, dtype=np.int32), tokens.shape)
  forward = jax.jit(functools.partial(decoder.forward, c=tiny.MODEL))
  rows, logprobs = np.arange(len(prompts)), []
  for _ in range(count):
    segments = np.where(index < length[:, None], 0, -1).astype(np.int32)
    hidden = forward(params, tokens=tokens, positions=index, segment_ids=segments)
    z = np.asarray(hidden, np.float64)[rows, length - 1] @ np.asarray(params["unembed"]).T
    chosen = z.argmax(-1)
    logprobs.append(z.max(-1) - np.log(np.exp(z).sum(-1)))
    tokens[rows, length] = chosen
    length = length + 1
  return [tokens[i, len(p) : length[i]].tolist() for i, p in enumerate(prompts)], np.array(logprobs)


def test_greedy_is_a_plain_loop_over_the_training_forward_pass(greedy):
  expected, logprobs = plain_greedy(tiny.params(), tiny.prompts(LENGTHS), GREEDY.max_tokens)
  assert completions(greedy) == expected
  assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS)  # they could differ
  for row, start in enumerate(greedy.prompt_length):
    ours = greedy.logprobs[row, start : start + GREEDY.max_tokens]
    np.testing.assert_allclose(ours, logprobs[:, row], atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_matrix_is_kept_once(tied):
  config = dataclasses.replace(tiny.MODEL, tied_embeddings=tied)
  params = {name: tiny.params()[name] for name in decoder.table(config)}
  kept = jax.eval_shape(functools.partial(programs.use_layout, config=config), params)
  assert kept.keys() == params.keys() and ("unembed" in kept) == (not tied)


def test_rows_are_prompt_then_completion_then_zeros(drawn):
  prompts = tiny.prompts(LENGTHS)
  assert drawn.tokens.shape == drawn.logprobs.shape == drawn.version.shape == (21, 30)
  assert drawn.tokens.dtype == np.int32 and drawn.logprobs.dtype == np.float32
  for row in range(21):
    prompt, end = prompts[row // 3], drawn.length[row]
    assert drawn.prompt_length[row] == len(prompt)
    assert drawn.tokens[row, : len(prompt)].tolist() == prompt
    assert end == len(prompt) + DRAWN.max_tokens and drawn.stop[row] == StopReason.LENGTH
    inside = np.arange(30)
    inside = (inside >= len(prompt)) & (inside < end)
    assert (drawn.version[row] == np.where(inside, 3, -1)).all()
    assert (drawn.logprobs[row][~inside] == 0).all() and (drawn.logprobs[row][inside] < 0).all()
    assert (drawn.tokens[row, end:] == 0).all()


def test_logprobs_are_the_trainers_and_samples_stay_with_their_prompts(drawn):
  """A completion that had read another prompt's keys would be off by far more than rounding."""
  params = tiny.params()
  found, inside = tiny.trainer_logprobs(params, drawn, DRAWN.temperature)
  gap = np.abs(found - drawn.logprobs)[inside].max()
  print(f"largest gap {gap:.2e}")
  assert gap <= 1e-4
  wrong, _ = tiny.trainer_logprobs(params, drawn, 1.0)
  assert np.abs(wrong - drawn.logprobs)[inside].max() > 0.1  # another temperature is seen
  tokens = drawn.tokens.copy()
  tokens[:, 0] = (tokens[:, 0] + 1) % tiny.MODEL.vocab_size
  wrong, _ = tiny.trainer_logprobs(params, drawn.replace(tokens=tokens), DRAWN.temperature)
  assert (np.abs(wrong - drawn.logprobs) * inside).max(-1).min() > 1e-3  # so is another prompt


def test_samples_of_a_group_differ_and_repeat_with_the_key(engine, drawn):
  for i in range(len(LENGTHS)):
    assert len({tuple(c) for c in completions(drawn)[3 * i : 3 * i + 3]}) == 3
  generate = functools.partial(engine.generate, tiny.prompts(LENGTHS), DRAWN, n=3)
  again, other = (generate(key=jax.random.key(key)) for key in (KEY, KEY + 1))
  for name in ("tokens", "logprobs", "length", "stop"):
    assert (getattr(again, name) == getattr(drawn, name)).all()
  assert (other.tokens != drawn.tokens).any(-1).all()


def test_a_sample_does_not_depend_on_what_is_beside_it(engine, drawn):
  alone = engine.generate(tiny.prompts(LENGTHS)[:1], DRAWN, key=jax.random.key(KEY), n=3)
  assert completions(alone) == completions(drawn)[:3]


def test_a_sample_does_not_depend_on_slots_and_launches(engine, drawn, monkeypatch):
  """Two slots, and launches that end five tokens on, in the middle of completions."""
  monkeypatch.setattr(engine_module, "LAUNCH", 5)
  small = make_engine(slots=2)
  rollouts = small.generate(tiny.prompts(LENGTHS), DRAWN, key=jax.random.key(KEY), n=3)
  assert completions(rollouts) == completions(drawn)
  np.testing.assert_allclose(rollouts.logprobs, drawn.logprobs, atol=1e-5)
  assert small.figures.launches >= 21 * 14 / (2 * 5)


def cut(tokens, ends):
  """Up to and with the first place where `ends` holds; the whole where it never does."""
  lengths = [i for i in range(1, len(tokens) + 1) if ends(tokens[:i])]
  return tokens[: lengths[0]] if lengths else tokens


def test_stop_tokens_end_a_completion_and_belong_to_it(engine, drawn):
  whole = completions(drawn)
  stops = (whole[0][3], whole[4][0], whole[10][6])
  sampling = SamplingParams(max_tokens=14, temperature=0.7, stop_tokens=stops)
  key = jax.random.key(KEY)
  stopped = engine.generate(tiny.prompts(LENGTHS), sampling, key=key, n=3)
  assert completions(stopped) == [cut(tokens, lambda t: t[-1] in stops) for tokens in whole]
  ended = [tokens[-1] in stops for tokens in completions(stopped)]
  expected = np.where(ended, StopReason.TOKEN, StopReason.LENGTH)
  assert (stopped.stop == expected).all() and 2 < sum(ended) < 21


def test_stop_strings_across_the_borders_of_tokens(engine, drawn):
  whole = completions(drawn)
  border = f"{str(whole[2][4])[-1]}><{str(whole[2][5])[0]}"  # "…3><4…"
  inside = f"<{whole[5][2]}>"
  sampling = SamplingParams(max_tokens=14, temperature=0.7, stop_strings=(border, inside))
  key = jax.random.key(KEY)
  stopped = engine.generate(tiny.prompts(LENGTHS), sampling, key=key, n=3)
  holds = lambda tokens: any(s in Pieces().decode(tokens) for s in sampling.stop_strings)
  assert completions(stopped) == [cut(tokens, holds) for tokens in whole]
  ended = [holds(tokens) for tokens in completions(stopped)]
  assert (stopped.stop == np.where(ended, StopReason.STRING, StopReason.LENGTH)).all()
  assert 1 < sum(ended) < 21


def test_the_window_is_a_budget(engine):
  lengths = (tiny.LENGTH - 8, 3, tiny.LENGTH - 1, tiny.LENGTH - 14)
  rollouts = engine.generate(tiny.prompts(lengths), DRAWN, key=jax.random.key(0))
  assert (rollouts.length - rollouts.prompt_length).tolist() == [8, 14, 1, 14]
  budget, length = StopReason.BUDGET, StopReason.LENGTH
  assert rollouts.stop.tolist() == [budget, length, budget, length]
  found, inside = tiny.trainer_logprobs(tiny.params(), rollouts, DRAWN.temperature)
  assert np.abs(found - rollouts.logprobs)[inside].max() <= 1e-4


def test_new_weights_reach_the_samples(engine, drawn):
  """A trainer that pushes weights which never arrive would sample from the old ones for ever."""
  params = tiny.params(seed=1)
  generate = functools.partial(
    engine.generate, tiny.prompts(LENGTHS), DRAWN, key=jax.random.key(KEY), n=3
  )
  engine.update(params, version=4)
  try:
    rollouts = generate()
  finally:
    engine.update(tiny.params(), version=3)
  found, inside = tiny.trainer_logprobs(params, rollouts, DRAWN.temperature)
  assert np.abs(found - rollouts.logprobs)[inside].max() <= 1e-4
  old, _ = tiny.trainer_logprobs(tiny.params(), rollouts, DRAWN.temperature)
  assert np.abs(old - rollouts.logprobs)[inside].mean() > 0.1
  assert (rollouts.version[inside] == 4).all() and (rollouts.version[~inside] == -1).all()
  assert (generate().tokens == drawn.tokens).all()


def test_figures_count_tokens(engine):
  before = vars(engine.figures).copy()
  rollouts = engine.generate(tiny.prompts(LENGTHS), DRAWN, key=jax.random.key(1), n=2)
  spent = {name: value - before[name] for name, value in vars(engine.figures).items()}
  assert spent["generated"] == int((rollouts.length - rollouts.prompt_length).sum())
  # Two samples that are seated together share the prefill of their prompt.
  assert sum(LENGTHS) <= spent["prefilled"] <= 2 * sum(LENGTHS)
  assert spent["launches"] >= -(-2 * len(LENGTHS) // 4) and spent["seconds"] > 0


@pytest.mark.parametrize(
  "prompts, n, message",
  [
    ([[1], []], 1, "generate: prompt 1 has 0 tokens, expected 1 to 47"),
    ([[1], [2] * 48], 1, "generate: prompt 1 has 48 tokens, expected 1 to 47"),
    ([], 1, "generate: expected prompts and n >= 1, found 0 and n = 1"),
    ([[1]], 0, "generate: expected prompts and n >= 1, found 1 and n = 0"),
  ],
)
def test_prompts_that_cannot_be_answered(engine, prompts, n, message):
  with pytest.raises(ValueError) as error:
    engine.generate(prompts, DRAWN, key=jax.random.key(0), n=n)
  assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_stop_strings_need_a_detokenizer(engine):
  sampling = SamplingParams(max_tokens=4, stop_strings=("x",))
  with pytest.raises(ValueError, match="stop strings need an engine with a detokenizer"):
    make_engine(detokenizer=None).generate([[1]], sampling, key=jax.random.key(0))
