"""Steps of supervised objectives with a reference: float64, microbatches, packing, refreshing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.data.batch import Batch
from pt_jax.losses import supervised
from pt_jax.losses.supervised import ReferenceKl
from pt_jax.models import decoder
from pt_jax.steps.supervised import RefreshedUpdater, refreshed_sft_step, sft_loss, sft_step
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")

PSFT = supervised.psft(0.4)
CLIPPED = supervised.psft_clipped(0.2, None)


@functools.cache
def reference():
  """Weights near those of the policy."""
  rng = np.random.default_rng(11)
  near = lambda w: (w * (1 + 0.1 * rng.normal(size=w.shape))).astype(np.float32)
  return jax.tree.map(near, tiny.params())


@functools.cache
def log_softmax(which):
  """[ROWS, LENGTH, V] float64 of the distribution that each token is drawn from."""
  b, params = tiny.fields(), {"policy": tiny.params, "reference": reference}[which]()
  forward = jax.jit(lambda params, *rows: decoder.forward(params, tiny.MODEL, *rows))
  hidden = forward(params, b["tokens"], b["positions"], b["segment_ids"])
  z = np.asarray(hidden, np.float64) @ np.asarray(params["unembed"], np.float64).T
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  return np.roll(log_p, 1, axis=1)


def picked(log_p):
  return np.take_along_axis(log_p, tiny.fields()["tokens"][..., None], -1)[..., 0]


@functools.cache
def step(objective):
  return jax.jit(
    functools.partial(sft_step, config=tiny.MODEL, updater=tiny.UPDATER, objective=objective)
  )


def run(objective, microbatches=1, **changes):
  return step(objective)(tiny.state(), tiny.batch(Batch, microbatches, **changes), reference())


def test_psft_and_its_metrics():
  """The KL over the vocabulary, and the loss, in float64 from the hidden states of both models."""
  _, metrics = run(PSFT)
  mask = tiny.fields()["mask"] > 0
  log_p, log_q = log_softmax("policy"), log_softmax("reference")
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[mask].mean()
  nats = -picked(log_p)[mask].mean()
  assert kl > 0.05
  np.testing.assert_allclose(metrics["loss/kl"], kl, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/nats_per_token"], nats, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], nats + 0.4 * kl, rtol=1e-5)


def test_clipped_and_its_metrics():
  _, metrics = run(CLIPPED)
  mask = tiny.fields()["mask"] > 0
  ratio = np.exp(picked(log_softmax("policy")) - picked(log_softmax("reference")))[mask]
  np.testing.assert_allclose(metrics["loss/ratio"], ratio.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], -np.minimum(ratio, 1.2).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/clip_fraction"], (ratio > 1.2).mean(), rtol=1e-5)
  assert 0 < metrics["loss/clip_fraction"] < 1


def test_label_smoothing_reads_the_whole_vocabulary():
  _, metrics = run(supervised.label_smoothed(0.2))
  mask = tiny.fields()["mask"] > 0
  log_p = log_softmax("policy")
  uniform, nats = -log_p.mean(-1)[mask].mean(), -picked(log_p)[mask].mean()
  np.testing.assert_allclose(metrics["loss/uniform_nats"], uniform, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], 0.8 * nats + 0.2 * uniform, rtol=1e-5)


def test_microbatches():
  state, metrics = run(PSFT)
  for count in (2, 4):
    other, other_metrics = run(PSFT, count)
    for name, value in metrics.items():
      np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, other.params, state.params)
    jax.tree.map(close, other.optimizer[0].mu, state.optimizer[0].mu)


def test_packing():
  """Each sample in a row of its own: the same objective and the same update."""
  fields = tiny.fields()
  apart = {k: np.zeros((2 * tiny.ROWS, tiny.LENGTH), v.dtype) for k, v in fields.items()}
  apart["segment_ids"] -= 1
  for index, (row, place) in enumerate(tiny.segments()):
    for name in ("tokens", "positions", "mask", "weights"):
      apart[name][index, : place.sum()] = fields[name][row, place]
    apart["segment_ids"][index, : place.sum()] = 0
  state, metrics = run(PSFT)
  other, other_metrics = run(PSFT, **apart)
  for name, value in metrics.items():
    np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, other.params, state.params)


def test_a_policy_that_is_its_reference():
  """No divergence, a ratio of 1, and the update of SFT."""
  batch = tiny.batch(Batch)
  state, metrics = step(PSFT)(tiny.state(), batch, tiny.params())
  plain, plain_metrics = step(supervised.sft())(tiny.state(), batch)
  assert abs(float(metrics["loss/kl"])) < 1e-7
  np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, state.params, plain.params)
  _, metrics = step(CLIPPED)(tiny.state(), batch, tiny.params())
  np.testing.assert_allclose(metrics["loss/ratio"], 1, rtol=1e-6)


def test_the_reference_gets_no_gradient():
  def total(reference):
    part = jax.tree.map(lambda x: x[0], tiny.batch(Batch))
    both = dataclasses.replace(CLIPPED, kl=ReferenceKl(0.2, "exact"))
    return sft_loss(tiny.params(), part, reference, config=tiny.MODEL, objective=both)[0].total

  gradient = jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, reference()))
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


def test_a_reference_that_is_missing_is_named():
  part = jax.tree.map(lambda x: x[0], tiny.batch(Batch))
  with pytest.raises(ValueError, match=r"^reference: the objective needs its parameters, found"):
    sft_loss(tiny.params(), part, config=tiny.MODEL, objective=PSFT)


def test_a_refreshed_reference_is_the_policy_of_some_updates_ago():
  """Every two updates; between them it is the one before them. As by hand with `sft_step`."""
  refreshed = dataclasses.replace(CLIPPED, refresh_every=2)
  make = functools.partial(refreshed_sft_step, config=tiny.MODEL, updater=tiny.UPDATER)
  update = jax.jit(functools.partial(make, objective=refreshed))
  batch = tiny.batch(Batch)
  state = jax.jit(RefreshedUpdater(tiny.UPDATER).create)(tiny.params())
  by_hand, old = tiny.state(), tiny.params()
  for done in range(5):
    old = by_hand.params if done % 2 == 0 else old
    by_hand, want = step(CLIPPED)(by_hand, batch, old)
    state, metrics = update(state, batch)
    np.testing.assert_allclose(metrics["loss/ratio"], want["loss/ratio"], rtol=1e-5)
    assert (abs(float(metrics["loss/ratio"]) - 1) < 1e-6) == (done % 2 == 0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.params, by_hand.params)
    jax.tree.map(close, state.reference, old)
  buffers = lambda tree: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
  fresh = jax.jit(RefreshedUpdater(tiny.UPDATER).create)(tiny.params())
  assert buffers(fresh.reference).isdisjoint(buffers(fresh.params)), "a step may donate both"


def test_the_direction_is_read():
  """Other fields are walked in tests/losses; `refresh_every` is counted above."""
  other = dataclasses.replace(PSFT, kl=ReferenceKl(0.4, "exact", "reference_policy"))
  _, metrics = run(other)
  mask = tiny.fields()["mask"] > 0
  log_p, log_q = log_softmax("policy"), log_softmax("reference")
  kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)[mask].mean()
  np.testing.assert_allclose(metrics["loss/kl"], kl, rtol=1e-5)
  assert abs(kl / run(PSFT)[1]["loss/kl"] - 1) > 0.01
