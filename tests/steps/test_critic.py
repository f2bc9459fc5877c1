"""The critic's step and the rest of the policy's: values, exact KL, NLL of right completions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pt_jax.data.batch import PolicyBatch
from pt_jax.losses import objective
from pt_jax.losses.value import value_loss
from pt_jax.models import decoder, heads
from pt_jax.steps.critic import score_values, value_step
from pt_jax.steps.policy import policy_step
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")

TABLE = heads.table(tiny.MODEL)
CRITIC = tiny.UPDATER._replace(table=TABLE)
CLIP = 0.3


@functools.cache
def critic_params():
  head = np.random.default_rng(2).normal(size=(1, tiny.MODEL.width)).astype(np.float32)
  return heads.from_decoder(tiny.params(), head)


@functools.cache
def hidden_states():
  """[ROWS, LENGTH, D] float64 of the tiny batch."""
  b = tiny.fields()
  forward = jax.jit(lambda params, *rows: decoder.forward(params, tiny.MODEL, *rows))
  return np.asarray(
    forward(tiny.params(), b["tokens"], b["positions"], b["segment_ids"]), np.float64
  )


@functools.cache
def numpy_values():
  """[ROWS, LENGTH]: what the head says of the state before each token."""
  after = hidden_states() @ critic_params()[heads.HEAD][0].astype(np.float64)
  return np.pad(after[:, :-1], ((0, 0), (1, 0)))


@functools.cache
def updated(microbatches):
  state = jax.jit(CRITIC.create)(critic_params())
  step = jax.jit(functools.partial(value_step, config=tiny.MODEL, updater=CRITIC, clip=CLIP))
  return step(state, tiny.batch(PolicyBatch, microbatches))


def test_values_are_those_before_the_token():
  score = jax.jit(functools.partial(score_values, config=tiny.MODEL))
  got = np.asarray(score(critic_params(), tiny.batch(PolicyBatch, 2))).reshape(tiny.ROWS, -1)
  mask = tiny.fields()["mask"]
  np.testing.assert_allclose(got, numpy_values() * mask, atol=2e-5)
  assert np.abs(got[mask > 0]).max() > 0.5


def test_loss_and_gradient_of_the_head():
  """The head's gradient by hand: the mean over tokens of dloss/dv times the hidden state before."""
  f = tiny.fields()
  mask, values = f["mask"], numpy_values()
  inputs = [x.astype(np.float32) for x in (values, f["returns"], f["old_values"], mask)]
  loss, slope = jax.value_and_grad(
    lambda v: value_loss(v, *inputs[1:], clip=CLIP)[0].sum() / mask.sum()
  )(inputs[0])
  state, metrics = updated(1)
  np.testing.assert_allclose(metrics["critic/loss"], loss, rtol=1e-4)
  before = np.pad(hidden_states()[:, :-1], ((0, 0), (1, 0), (0, 0)))
  gradient = np.einsum("bs,bsd->d", np.asarray(slope, np.float64), before)
  clip = min(1.0, CRITIC.optimizer.clip_norm / float(metrics["critic/grad_norm"]))
  got = np.asarray(state.optimizer[0].mu[heads.HEAD][0]) / (1 - CRITIC.optimizer.b1) / clip
  np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-6)
  error = ((values - f["returns"]) ** 2 * mask).sum() / mask.sum()
  np.testing.assert_allclose(metrics["critic/error"], error, rtol=1e-4)
  assert 0 < metrics["critic/clip_fraction"] < 1
  assert {"critic/learning_rate", "critic/update_norm", "critic/value"} <= metrics.keys()


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_of_the_critic(microbatches):
  (state, metrics), (other, other_metrics) = updated(1), updated(microbatches)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, other.params, state.params)
  for name, value in metrics.items():
    close(other_metrics[name], value, err_msg=name)


def test_a_batch_without_a_trained_token_leaves_the_critic_alone():
  state = jax.jit(CRITIC.create)(critic_params())
  step = jax.jit(functools.partial(value_step, config=tiny.MODEL, updater=CRITIC, clip=CLIP))
  nothing = np.zeros_like(tiny.fields()["mask"])
  after, metrics = step(state, tiny.batch(PolicyBatch, mask=nothing))
  jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
  assert all(np.isfinite(value) for value in metrics.values())


ALL = objective.Objective(
  advantage=objective.Gae(),
  kl=objective.Kl(0.2, "exact"),
  entropy=0.1,
  positive_nll=0.3,
  reduction="segment_mean",
)


@functools.cache
def policy_updated(chosen, microbatches):
  """A policy with a value head, an exact KL to a reference of wider weights."""
  table = {**tiny.UPDATER.table, heads.HEAD: heads.head_row(tiny.MODEL)}
  updater = tiny.UPDATER._replace(table=table)
  start = {**tiny.params(), heads.HEAD: critic_params()[heads.HEAD]}
  step = functools.partial(
    policy_step,
    config=tiny.MODEL,
    updater=updater,
    objective=chosen,
    temperature=tiny.TEMPERATURE,
    first_update=False,
    reference=jax.tree.map(lambda x: 1.5 * x, tiny.params()),
    value_coefficient=0.7,
    value_clip=CLIP,
  )
  return jax.jit(step)(jax.jit(updater.create)(start), tiny.batch(PolicyBatch, microbatches))


def test_every_term_of_the_policy_step():
  """Term by term: what each adds to the loss is its coefficient times its own logged mean."""
  (_, metrics), f = policy_updated(ALL, 1), tiny.fields()
  logprobs, _, _ = tiny.numpy_statistics(tiny.TEMPERATURE)
  positive = f["positive"]
  nll = -(logprobs * positive).sum() / positive.sum()
  np.testing.assert_allclose(metrics["policy/positive_nll"], nll, rtol=1e-4)
  without = dataclasses.replace(ALL, positive_nll=0.0)
  _, other = policy_updated(without, 1)
  np.testing.assert_allclose(metrics["loss"] - other["loss"], 0.3 * nll, rtol=1e-3)
  np.testing.assert_allclose(metrics["policy/kl"], numpy_kl(), rtol=1e-4)
  v = numpy_values().astype(np.float32)
  of_value = value_loss(v, f["returns"], f["old_values"], f["mask"], clip=CLIP)[0]
  mean = np.asarray(of_value).sum() / f["mask"].sum()
  np.testing.assert_allclose(metrics["critic/loss"], mean, rtol=1e-4)


def numpy_kl() -> float:
  """The mean over trained tokens of KL(policy || reference) in float64."""
  b = tiny.fields()
  forward = jax.jit(lambda params, *rows: decoder.forward(params, tiny.MODEL, *rows))
  log_p = []
  for scale in (1.0, 1.5):
    scaled = jax.tree.map(lambda x, s=scale: s * x, tiny.params())
    hidden = forward(scaled, b["tokens"], b["positions"], b["segment_ids"])
    z = np.asarray(hidden, np.float64) @ np.asarray(scaled["unembed"], np.float64).T
    z = z / tiny.TEMPERATURE
    z -= z.max(-1, keepdims=True)
    log_p.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
  kl = (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(-1)
  late = np.pad(kl[:, :-1], ((0, 0), (1, 0)))
  return (late * b["mask"]).sum() / b["mask"].sum()


def test_microbatches_of_every_term():
  (state, metrics), (other, other_metrics) = policy_updated(ALL, 1), policy_updated(ALL, 4)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, other.params, state.params)
  jax.tree.map(close, other.optimizer[0].mu, state.optimizer[0].mu)
  for name, value in metrics.items():
    close(other_metrics[name], value, err_msg=name)


def test_an_exact_kl_needs_the_reference():
  step = functools.partial(
    policy_step,
    config=tiny.MODEL,
    updater=tiny.UPDATER,
    objective=objective.Objective(kl=objective.Kl(0.2, "exact")),
    temperature=1.0,
    first_update=True,
  )
  with pytest.raises(ValueError, match="reference: an exact KL needs the parameters"):
    jax.eval_shape(step, tiny.state(), tiny.batch(PolicyBatch))
