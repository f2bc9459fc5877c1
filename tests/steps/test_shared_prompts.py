"""Groups whose prompt stands once: the same log-probs, values, loss and gradients as with n."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.loops.rollouts import pack_rollouts
from pt_jax.losses import objective
from pt_jax.losses.credit import Credit
from pt_jax.models import heads
from pt_jax.rollout.rollouts import Rollouts
from pt_jax.steps.critic import score_values
from pt_jax.steps.policy import policy_step, score
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")

ROWS, LENGTH = 2, 32  # of a microbatch
# Tokens of a prompt and of its completions. The third group is longer than a row and is split, the
# prompt of the second is its last token alone, the last has one completion.
GROUPS = ((5, (3, 1, 6)), (1, (4, 2)), (9, (8, 7, 6, 5)), (4, (9,)))


def rollouts(change: int | None = None) -> Rollouts:
  """Random groups; with `change`, another second token of that completion."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, tiny.MODEL.vocab_size, n) for n, _ in GROUPS]
  rows = [
    np.concatenate([prompt, rng.integers(0, tiny.MODEL.vocab_size, n)])
    for prompt, (_, answers) in zip(prompts, GROUPS)
    for n in answers
  ]
  starts = np.array([n for n, answers in GROUPS for _ in answers], np.int32)
  if change is not None:
    rows[change][starts[change] + 1] ^= 1
  length = np.array([len(row) for row in rows], np.int32)
  tokens = np.stack([np.pad(row, (0, length.max() - len(row))) for row in rows]).astype(np.int32)
  logprobs = rng.normal(-3.5, 0.3, tokens.shape).astype(np.float32)
  zeros = np.zeros_like(tokens)
  return Rollouts(tokens, starts, length, logprobs, zeros, np.zeros(len(rows)), zeros > 0)


@functools.cache
def packed(share_prompts: bool, change: int | None = None):
  return pack_rollouts(rollouts(change), ROWS, LENGTH, share_prompts=share_prompts)


def put(batch):
  return jax.device_put(batch, sharding.batch_spec(1))


@functools.cache
def logprobs(share_prompts: bool, change: int | None = None):
  """[N, W] under the initial weights."""
  pack = packed(share_prompts, change)
  return pack.take_back(np.asarray(scoring()(tiny.params(), put(pack.batch))))


@functools.cache
def scoring():
  return jax.jit(functools.partial(score, config=tiny.MODEL, temperature=tiny.TEMPERATURE))


def test_a_prompt_stands_once_for_all_completions_of_a_row():
  pack, other = packed(True), packed(False)
  held = lambda batch: int((np.maximum(batch.segment_ids, batch.prefix_ids) >= 0).sum())
  # Prompts without their last token, the third of them twice; each completion with that token.
  assert held(pack.batch) == (4 + 0 + 8 + 8 + 3) + (13 + 8 + 30 + 10)
  assert int((other.batch.segment_ids >= 0).sum()) == 25 + 8 + 62 + 13
  assert pack.batch.tokens.shape == other.batch.tokens.shape == (8, 2, 32)  # ten rows, and room
  used = lambda batch: (batch.segment_ids >= 0).any(2).ravel().tolist()
  assert used(pack.batch) == [True] * 3 + [False] * 13
  assert used(other.batch) == [True] * 4 + [False] * 12


def test_log_probs_are_those_behind_prompts_of_their_own():
  drawn = packed(True).drawn
  assert drawn.sum() == 51 and np.abs(logprobs(False)[drawn]).min() > 0.1
  np.testing.assert_allclose(logprobs(True), logprobs(False), atol=1e-5)


def test_a_completion_does_not_see_another():
  """One token of the second completion of the first group changes: to the last bit, nothing else
  does, though they stand in one row behind one prompt."""
  before, after = logprobs(True), logprobs(True, change=2)
  assert packed(True).plan.row[:3].tolist() == [packed(True).plan.row[0]] * 3
  different = (before != after).any(1)
  assert different.tolist() == [i == 2 for i in range(len(before))]


def test_values_of_a_critic_are_those_behind_prompts_of_their_own():
  trunk = {name: w for name, w in tiny.params().items() if name != "unembed"}
  head = np.random.default_rng(1).normal(size=heads.head_row(tiny.MODEL).shape).astype(np.float32)
  run = jax.jit(functools.partial(score_values, config=tiny.MODEL))
  values = [
    packed(share).take_back(np.asarray(run(trunk | {heads.HEAD: head}, put(packed(share).batch))))
    for share in (True, False)
  ]
  assert np.abs(values[0]).max() > 1
  np.testing.assert_allclose(values[0], values[1], atol=1e-5)


@functools.cache
def updated(share_prompts: bool):
  """State and metrics after one update with all that is summed over completions."""
  pack, rng = packed(share_prompts), np.random.default_rng(2)
  drawn = pack.drawn
  near = lambda scale: np.where(drawn, logprobs(False) + rng.normal(0, scale, drawn.shape), 0)
  advantages = rng.normal(size=drawn.shape)
  trained = np.arange(len(drawn)) != 4
  credit = Credit(np.zeros(len(drawn)), advantages, advantages, trained, trained)
  scores = {"old_logprobs": near(0.2), "reference_logprobs": near(0.4)}
  fields = {name: pack.lay_out(values) for name, values in scores.items()} | pack.fields(credit)
  algorithm = dataclasses.replace(
    objective.grpo(), ratio="sequence_token", reduction="segment_mean", positive_nll=0.1
  )
  step = functools.partial(
    policy_step,
    config=tiny.MODEL,
    updater=tiny.UPDATER,
    objective=algorithm,
    temperature=tiny.TEMPERATURE,
    first_update=False,
  )
  return jax.jit(step)(tiny.state(), put(dataclasses.replace(pack.batch, **fields)))


def test_loss_gradients_and_metrics_are_the_same():
  """Means over completions count no prompt as one, and sums over them hold none of it."""
  (got, measured), (want, expected) = (updated(share) for share in (True, False))
  for name, value in expected.items():
    np.testing.assert_allclose(measured[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  # After one update the first moment is (1 - b1) times the clipped gradient.
  for a, b in zip(jax.tree.leaves(got.optimizer[0].mu), jax.tree.leaves(want.optimizer[0].mu)):
    assert np.abs(b).max() > 1e-4
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got.params, want.params)
