"""Tokens that a budget forced, and forms that cannot be followed, from the engine to the loss."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.loops.rollouts import pack_rollouts
from pt_jax.losses import objective, reduce
from pt_jax.losses.credit import Episodes, assign_credit
from pt_jax.losses.policy import policy_loss
from pt_jax.rollout import guides
from pt_jax.rollout.constraints import regex
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.guides import Thinking
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from tests.rollout import tiny

CLOSE, BUDGETS = (3, 4, 5), (0, 4, 9)
FREE = SamplingParams(max_tokens=16)


@pytest.fixture(scope="module", autouse=True)
def mesh():
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield


def make_engine(**options):
  options = {"slots": 6, "max_length": tiny.LENGTH, "page": 8} | options
  return Engine(tiny.MODEL, tiny.params(), **options)


def generate(sampling):
  return make_engine().generate(tiny.prompts((6, 11)), sampling, key=jax.random.key(2), n=6)


@functools.cache
def capped():
  """Two prompts, six completions each: of graded budgets."""
  return generate(dataclasses.replace(FREE, thinking=Thinking(budgets=BUDGETS, close=CLOSE)))


def completion(rollouts, row):
  return rollouts.tokens[row, rollouts.prompt_length[row] : rollouts.length[row]].tolist()


def test_thinking_is_closed_when_its_budget_is_spent():
  plain, found = generate(FREE), capped()
  for row in range(12):
    start, budget = found.prompt_length[row], BUDGETS[row % 6 % 3]
    tokens = completion(found, row)
    assert tokens[:budget] == completion(plain, row)[:budget]
    assert tuple(tokens[budget : budget + 3]) == CLOSE and len(tokens) == 16
    forced = np.flatnonzero(found.forced[row]) - start
    assert forced.tolist() == [budget, budget + 1, budget + 2]
  assert not plain.forced.any()
  ours, inside = tiny.trainer_logprobs(tiny.params(), found, 1.0)  # forced ones, too
  assert np.abs(ours - found.logprobs)[inside].max() <= 1e-4


def test_a_tag_that_the_policy_wrote_is_not_forced():
  plain = generate(FREE)
  close = tuple(completion(plain, 0)[2:4])
  found = generate(dataclasses.replace(FREE, thinking=Thinking(budgets=(9,), close=close)))
  assert completion(found, 0) == completion(plain, 0) and not found.forced[0].any()
  assert found.forced.any()  # others did not write it


def gradient(algorithm, batch, mask):
  """d objective / d log-prob of every token [B, S], a little off the policy that sampled."""
  args = sharding.put((batch, mask), sharding.batch_spec(), jax.sharding.get_mesh())
  return np.asarray(_gradient(algorithm, *args))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(algorithm, batch, mask):
  sampled = batch.sampler_logprobs

  def whole(logprobs):
    loss, _ = policy_loss(
      *(logprobs, sampled, batch.advantages, mask, batch.segment_ids),
      objective=algorithm,
      reference_logprobs=sampled,
      sampler_logprobs=sampled,
    )
    found = reduce.reduce(algorithm.reduction, loss, mask, batch.segment_ids)
    return found.total / found.weight

  return jax.grad(whole)(sampled + 0.05 * jnp.sin(batch.tokens + 1.0))


@pytest.mark.parametrize("algorithm", [objective.grpo(), objective.gspo()])
def test_forced_tokens_have_no_gradient(algorithm):
  rollouts = capped()
  packed = pack_rollouts(rollouts, rows=4, row_length=tiny.LENGTH)
  groups = np.repeat([0, 1], 6)
  rewards = np.arange(12.0) % 5
  credit = assign_credit(
    Episodes(rewards, np.zeros(12, bool), groups, packed.drawn), objective=algorithm
  )
  batch = packed.batch.replace(**packed.fields(credit))
  batch = jax.tree.map(lambda x: x.reshape(-1, tiny.LENGTH), batch)
  flat = lambda x: packed.lay_out(x).reshape(batch.mask.shape) > 0
  forced, chosen = flat(rollouts.forced), batch.mask > 0
  assert forced.sum() == 12 * 3 and chosen.sum() == 12 * 13 and not (forced & chosen).any()
  assert (batch.sampler_logprobs[forced] == 0).all()
  found = gradient(algorithm, batch, batch.mask)
  assert (found[forced] == 0).all() and (found[chosen] != 0).any()
  # What stands there is not read at all, not even where a ratio is of the whole sequence.
  wrong = batch.replace(
    sampler_logprobs=np.where(forced, np.nan, batch.sampler_logprobs),
    advantages=np.where(forced, 1e3, batch.advantages),
  )
  again = gradient(algorithm, wrong, batch.mask)
  np.testing.assert_array_equal(again[~forced], found[~forced])
  every = (chosen | forced).astype(np.float32)
  trained = gradient(algorithm, batch.replace(advantages=np.ones_like(found)), every)
  assert (trained[forced] != 0).any()  # a mask of all tokens would have trained them


class Breaking:
  """Allows all tokens, and fails at the third mask or the third token."""

  def __init__(self, at):
    self._at, self._count = at, 0

  def mask(self):
    if self._at == "mask" and self._count == 2:
      raise ValueError("the grammar\nis too ambiguous")
    return guides.every_token(tiny.MODEL.vocab_size)

  def advance(self, token):
    self._count += 1
    if self._at == "token" and self._count == 3:
      raise ValueError(f"token {token} cannot come next")


class Grammars:
  def matcher(self, constraint, stop_tokens):
    return Breaking(constraint.text)


@pytest.mark.parametrize(
  "at, message, count", [("mask", "the grammar is too", 2), ("token", "t", 3)]
)
def test_a_form_that_cannot_be_followed_ends_its_own_sample(at, message, count, caplog):
  engine = make_engine(grammars=Grammars())
  prompts, key = tiny.prompts((6, 11)), jax.random.key(2)
  plain = SamplingParams(max_tokens=8)
  broken = dataclasses.replace(plain, constraint=regex(at), stop_tokens=(63,))
  alone = engine.generate(prompts[1:], plain, key=key)
  with caplog.at_level(logging.WARNING, "pt_jax.rollout"):
    first, second = (engine.submit(*ask, key=key) for ask in zip(prompts, (broken, plain)))
    tokens, stops = {first: [], second: []}, {}
    while engine.unfinished:
      for out in engine.step():
        tokens[out.request] += out.tokens
        stops[out.request] = out.stop
  assert stops == {first: StopReason.FAILED, second: StopReason.LENGTH}
  assert len(tokens[first]) == count and tokens[second] == completion(alone, 0)
  assert engine.figures.pages_held == 0 and engine.figures.finished == 3
  (line,) = caplog.messages
  assert line.startswith(f"request {first}, sample 0, token {count - (at == 'token')}: ended: ")
  assert message in line and "\n" not in line
