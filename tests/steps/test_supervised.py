"""The SFT step: metrics against NumPy, microbatches, what a NaN does, evaluation as sums."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.data.batch import Batch
from pt_jax.losses.supervised import SupervisedObjective, sft
from pt_jax.steps.supervised import sft_evaluate, sft_step
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")


@functools.cache
def step(reduction):
  objective = SupervisedObjective(reduction=reduction)
  return jax.jit(
    functools.partial(sft_step, config=tiny.MODEL, updater=tiny.UPDATER, objective=objective)
  )


def run(reduction, batch):
  return step(reduction)(tiny.state(), batch)


@pytest.mark.parametrize("reduction", ["token_mean", "segment_mean"])
def test_metrics(reduction):
  state, metrics = run(reduction, tiny.batch(Batch))
  logprobs, entropy, top1 = tiny.numpy_statistics(1.0)
  fields = tiny.fields()
  mask = fields["mask"] > 0
  nats = -logprobs[mask].mean()
  samples = [-logprobs[row][place & mask[row]].mean() for row, place in tiny.segments()]
  loss = nats if reduction == "token_mean" else np.mean(samples)
  assert abs(np.mean(samples) - nats) > 1e-3, "the reductions differ here"
  want = {
    "loss": loss,
    "loss/weight": mask.sum() if reduction == "token_mean" else len(samples),
    "loss/nats_per_token": nats,
    "loss/entropy": entropy[mask].mean(),
    "loss/accuracy": (top1 == fields["tokens"])[mask].mean(),
  }
  assert want["loss/accuracy"] > 0
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  assert int(state.step) == 1


@pytest.mark.parametrize("reduction", ["token_mean", "segment_mean"])
def test_microbatches(reduction):
  """Rows hold unequal numbers of trained tokens, so a mean of means would differ."""
  state, metrics = run(reduction, tiny.batch(Batch))
  for count in (2, 4) if reduction == "token_mean" else (4,):
    other, other_metrics = run(reduction, tiny.batch(Batch, count))
    for name, value in metrics.items():
      np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, other.params, state.params)
    jax.tree.map(close, other.optimizer[0].mu, state.optimizer[0].mu)
  trained = tiny.fields()["mask"].reshape(4, -1).sum(-1)
  assert len(set(trained)) > 1


def test_weights_of_tokens_are_read():
  """A mask between 0 and 1 is a weight; one of 0 everywhere but at a token leaves only that one."""
  fields = tiny.fields()
  row, place = np.argwhere(fields["mask"] > 0)[3]
  alone = np.zeros_like(fields["mask"])
  alone[row, place] = 0.25
  _, metrics = run("token_mean", tiny.batch(Batch, mask=alone))
  logprobs, _, _ = tiny.numpy_statistics(1.0)
  np.testing.assert_allclose(metrics["loss"], -logprobs[row, place], rtol=2e-5)
  np.testing.assert_allclose(metrics["loss/weight"], 0.25)


@pytest.mark.parametrize("reduction", ["token_mean", "segment_mean"])
def test_weights_of_segments_are_read(reduction):
  """A sample of weight w counts as w samples, in the objective and in the metrics."""
  fields, rng = tiny.fields(), np.random.default_rng(5)
  logprobs, _, _ = tiny.numpy_statistics(1.0)
  weights, total, count, nats, tokens = np.zeros_like(fields["weights"]), 0.0, 0.0, 0.0, 0.0
  for row, place in tiny.segments():
    weight = weights[row, place] = np.float32(rng.uniform(0.2, 3))
    weight, values = weight.flat[0], -logprobs[row][place & (fields["mask"][row] > 0)]
    total, count = total + weight * values.mean(), count + weight
    nats, tokens = nats + weight * values.sum(), tokens + weight * len(values)
  state, metrics = run(reduction, tiny.batch(Batch, weights=weights))
  loss = nats / tokens if reduction == "token_mean" else total / count
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
  np.testing.assert_allclose(metrics["loss/nats_per_token"], nats / tokens, rtol=2e-5)
  weight = tokens if reduction == "token_mean" else count
  np.testing.assert_allclose(metrics["loss/weight"], weight, rtol=1e-5)
  other, _ = run(reduction, tiny.batch(Batch, 4, weights=weights))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, other.params, state.params)


def test_a_nan_does_not_hide():
  """Neither the clip nor the division nor a mean over microbatches swallows it."""
  broken = dict(tiny.params())
  broken["final_norm"] = np.where(np.arange(16) == 3, np.nan, broken["final_norm"])
  state = tiny.UPDATER.create(jax.tree.map(np.float32, broken))
  state, metrics = step("token_mean")(state, tiny.batch(Batch, 2))
  assert np.isnan(metrics["loss"]) and np.isnan(metrics["optimizer/grad_norm"])
  assert all(np.isnan(w).any() for w in jax.tree.leaves(state.params))


def test_evaluation_adds_up():
  """Sums over two halves, divided once, are the means over the whole."""
  evaluate = jax.jit(functools.partial(sft_evaluate, config=tiny.MODEL, objective=sft()))
  whole = jax.tree.map(lambda x: x[0], tiny.batch(Batch))
  rows = lambda a, b: evaluate(tiny.params(), jax.tree.map(lambda x: x[a:b], whole))
  first, rest = rows(0, 2), rows(2, 8)
  logprobs, entropy, _ = tiny.numpy_statistics(1.0)
  mask = tiny.fields()["mask"] > 0
  nats = (first["loss/nats_per_token"] + rest["loss/nats_per_token"]).mean()
  np.testing.assert_allclose(nats, -logprobs[mask].mean(), rtol=2e-5)
  mean = (first["loss/entropy"] + rest["loss/entropy"]).mean()
  np.testing.assert_allclose(mean, entropy[mask].mean(), rtol=2e-5)
