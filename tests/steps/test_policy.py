"""The policy step: objective and metrics against NumPy from the papers, and what feeds it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data.batch import PolicyBatch
from pt_jax.losses import objective
from pt_jax.steps.policy import policy_step, score
from tests.losses import paper
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")

GRPO = dataclasses.replace(objective.grpo(), surrogate=objective.Clip(0.2, 0.28))


@functools.cache
def step(algorithm, first_update):
  return jax.jit(
    functools.partial(
      policy_step,
      config=tiny.MODEL,
      updater=tiny.UPDATER,
      objective=algorithm,
      temperature=tiny.TEMPERATURE,
      first_update=first_update,
    )
  )


def run(batch, algorithm=GRPO, first_update=False):
  return step(algorithm, first_update)(tiny.state(), batch)


@functools.cache
def own_logprobs():
  """What `score` says of the batch [ROWS, LENGTH] under the weights of the first step."""
  score_ = jax.jit(functools.partial(score, config=tiny.MODEL, temperature=tiny.TEMPERATURE))
  return np.asarray(score_(tiny.params(), tiny.batch(PolicyBatch, 2))).reshape(tiny.ROWS, -1)


def near_own(scale=0.3):
  """Behaviour log-probs around the policy's own, so that ratios fall on both sides of the clip."""
  mask = tiny.fields()["mask"]
  noise = np.random.default_rng(5).normal(scale=scale, size=mask.shape)
  return ((own_logprobs() + noise) * mask).astype(np.float32)


def test_score_is_the_log_prob_of_trained_tokens():
  logprobs, _, _ = tiny.numpy_statistics(tiny.TEMPERATURE)
  mask = tiny.fields()["mask"]
  np.testing.assert_allclose(own_logprobs(), logprobs * mask, atol=2e-5)
  cold, _, _ = tiny.numpy_statistics(1.0)
  assert np.abs((cold - logprobs) * mask).max() > 0.1, "the temperature matters"


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_loss_is_the_papers(name):
  algorithm = {
    "grpo": GRPO,
    "dr_grpo": objective.dr_grpo(9),
    "dapo": objective.dapo(9, 3),
  }[name]
  fields = tiny.fields() | {"old_logprobs": near_own(), "reference_logprobs": near_own(0.5)}
  _, metrics = run(tiny.batch(PolicyBatch, **fields), algorithm)
  logprobs, _, _ = tiny.numpy_statistics(tiny.TEMPERATURE)
  fields["logprobs"] = logprobs
  samples = [{k: v[row][place] for k, v in fields.items()} for row, place in tiny.segments()]
  want, _ = paper.objective(
    samples,
    algorithm.reduction,
    algorithm.constant_length,
    surrogate=("clip", {"low": algorithm.surrogate.low, "high": algorithm.surrogate.high}),
    beta=algorithm.kl.coefficient if algorithm.kl else 0.0,
  )
  np.testing.assert_allclose(metrics["loss"], want, rtol=5e-5, atol=1e-6)


def test_metrics():
  old, reference = near_own(), near_own(0.5)
  batch = tiny.batch(PolicyBatch, old_logprobs=old, reference_logprobs=reference)
  _, metrics = run(batch)
  fields = tiny.fields()
  mask = fields["mask"] > 0
  logprobs, entropy, _ = tiny.numpy_statistics(tiny.TEMPERATURE)
  logprobs, entropy, advantage = logprobs[mask], entropy[mask], fields["advantages"][mask]
  log_r = logprobs - old[mask]
  gap = old[mask].astype(np.float64) - fields["sampler_logprobs"][mask]
  high = (np.exp(log_r) > 1.28) & (advantage > 0)
  low = (np.exp(log_r) < 0.8) & (advantage < 0)
  assert high.any() and low.any()
  to_reference = reference[mask] - logprobs
  want = {
    "policy/ratio": np.exp(log_r).mean(),
    "policy/approx_kl": (np.expm1(log_r) - log_r).mean(),
    "policy/clip_fraction": (high | low).mean(),
    "policy/clip_fraction_high": high.mean(),
    "policy/clip_fraction_low": low.mean(),
    "policy/kl": (np.expm1(to_reference) - to_reference).mean(),
    "policy/entropy": entropy.mean(),
    "rollout/logprob_gap_mean": np.abs(gap).mean(),
    "rollout/logprob_gap_max": np.abs(gap).max(),
    "rollout/logprob_gap_kl": (np.expm1(gap) - gap).mean(),
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_first_update_takes_its_own_log_probs_as_the_old_ones():
  explicit = tiny.batch(PolicyBatch, old_logprobs=own_logprobs())
  state, metrics = run(explicit)
  # What `old_logprobs` holds is not read: here it would be a ratio of exp(-6).
  unread = tiny.batch(PolicyBatch, old_logprobs=6 + own_logprobs())
  first_state, first_metrics = run(unread, first_update=True)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, first_state.params, state.params)
  jax.tree.map(close, first_state.optimizer[0].mu, state.optimizer[0].mu)
  for name, value in metrics.items():
    close(first_metrics[name], value, err_msg=name)
  close(first_metrics["policy/ratio"], 1)
  assert (
    np.abs(run(unread)[0].optimizer[0].mu["embed"] - state.optimizer[0].mu["embed"]).max() > 1e-4
  )


@pytest.mark.parametrize("algorithm", [GRPO, objective.dr_grpo(9)], ids=["grpo", "dr_grpo"])
def test_microbatches(algorithm):
  fields = {"old_logprobs": near_own(), "reference_logprobs": near_own(0.5)}
  state, metrics = run(tiny.batch(PolicyBatch, **fields), algorithm)
  other, other_metrics = run(tiny.batch(PolicyBatch, 4, **fields), algorithm)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, other.params, state.params)
  jax.tree.map(close, other.optimizer[0].mu, state.optimizer[0].mu)
  for name, value in metrics.items():
    close(other_metrics[name], value, err_msg=name)


def test_empty_microbatches_are_not_computed():
  """Two of four hold nothing but a mask of NaN, which no sum would survive."""
  fields = {"old_logprobs": near_own(), "reference_logprobs": near_own(0.5)}
  full = tiny.batch(PolicyBatch, 2, **fields)
  nothing = jax.tree.map(np.zeros_like, full)
  nothing = nothing.replace(
    segment_ids=np.full_like(full.segment_ids, -1), mask=np.full_like(full.mask, np.nan)
  )
  padded = jax.tree.map(lambda a, b: np.concatenate([a, b]), full, nothing)
  padded = jax.device_put(padded, sharding.batch_spec(1))
  (state, metrics), (other, other_metrics) = run(full), run(padded)
  jax.tree.map(np.testing.assert_array_equal, other.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, other_metrics, metrics)
  score_ = jax.jit(functools.partial(score, config=tiny.MODEL, temperature=tiny.TEMPERATURE))
  scores = np.asarray(score_(tiny.params(), padded))
  np.testing.assert_array_equal(scores[:2].reshape(tiny.ROWS, -1), own_logprobs())
  assert not scores[2:].any()


def test_a_batch_without_a_trained_token_changes_nothing():
  """All completions of a minibatch were cut: the gradient is 0, not 0 / 0."""
  nothing = np.zeros_like(tiny.fields()["mask"])
  for algorithm in (GRPO, objective.dapo(9, 3)):
    state, metrics = run(tiny.batch(PolicyBatch, mask=nothing), algorithm)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny.state().params)
    assert all(np.isfinite(value) for value in metrics.values())


def test_what_stands_outside_the_mask_is_not_read():
  fields = tiny.fields()
  untrained = fields["mask"] == 0
  junk = {
    k: np.where(untrained, np.nan, fields[k]).astype(np.float32)
    for k in ("advantages", "old_logprobs", "sampler_logprobs", "reference_logprobs")
  }
  clean, dirty = run(tiny.batch(PolicyBatch)), run(tiny.batch(PolicyBatch, **junk))
  jax.tree.map(np.testing.assert_array_equal, dirty[0].params, clean[0].params)
  jax.tree.map(np.testing.assert_array_equal, dirty[1], clean[1])


def test_a_nan_advantage_of_a_trained_token_does_not_hide():
  fields = tiny.fields()
  row, place = np.argwhere(fields["mask"] > 0)[7]
  fields["advantages"][row, place] = np.nan
  state, metrics = run(tiny.batch(PolicyBatch, advantages=fields["advantages"]))
  assert np.isnan(metrics["loss"]) and np.isnan(metrics["optimizer/grad_norm"])
  assert all(np.isnan(w).all() for w in jax.tree.leaves(state.params))
