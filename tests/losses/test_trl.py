"""Losses, gradients, advantages and metrics of TRL 1.16 (tests/oracles/make_trl.py)."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import advantages, objective, policy, reduce, supervised

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
GRPO = dict(np.load(ORACLES / "trl_grpo.npz"))
SFT = dict(np.load(ORACLES / "trl_sft.npz"))
PROMPT = 2  # untrained tokens put before every completion: in TRL each row counts, even if masked
PRESETS = {
  "grpo": objective.grpo(),
  "bnpo": objective.bnpo(),
  "dr_grpo": objective.dr_grpo(int(GRPO["max_completion_length"])),
  "dapo": objective.dapo(int(GRPO["max_completion_length"]), 4),
}
KLS = {"beta=0.0/bias=0": None} | {
  f"beta=0.04/bias={int(weighted)}": objective.Kl(0.04, "k3", weighted)
  for weighted in (False, True)
}
EPSILONS = ((0.2, 0.2), (0.2, 0.28), (0.1, 0.3))
CASES = list(itertools.product(PRESETS, KLS, EPSILONS))


def _prefixed(values: np.ndarray, fill: float = 0.0) -> jax.Array:
  values = np.asarray(values, np.float32)
  return jnp.asarray(np.pad(values, ((0, 0), (PROMPT, 0)), constant_values=fill))


MASK = _prefixed(GRPO["mask"])
IDS = jnp.asarray(np.pad(GRPO["mask"] - 1, ((0, 0), (PROMPT, 0))), jnp.int32)
FIELDS = {
  "old_logprobs": _prefixed(GRPO["old_logprobs"], fill=-3.0),
  "advantages": _prefixed(GRPO["advantages"][:, None] * GRPO["mask"], fill=5.0),
  "mask": MASK,
  "reference_logprobs": _prefixed(GRPO["reference_logprobs"], fill=-2.0),
}


def _chosen(preset, kl, epsilons) -> objective.Objective:
  return dataclasses.replace(PRESETS[preset], kl=KLS[kl], surrogate=objective.Clip(*epsilons))


def _golden(preset, kl, epsilons, microbatches, what) -> np.ndarray:
  return GRPO[f"{preset}/{kl}/low={epsilons[0]}/high={epsilons[1]}/micro={microbatches}/{what}"]


def _sums(logprobs, chosen, rows=slice(None)):
  fields = {k: v[rows] for k, v in FIELDS.items()}
  loss, metrics = policy.policy_loss(logprobs, segment_ids=IDS[rows], objective=chosen, **fields)
  add = lambda name, x: reduce.reduce(
    name, x, MASK[rows], IDS[rows], constant_length=chosen.constant_length
  )
  whole = add(chosen.reduction, loss)
  token_means = {
    k: reduce.reduce("token_mean", v, MASK[rows], IDS[rows]).mean() for k, v in metrics.items()
  }
  return whole.total, (whole.weight, token_means)


@pytest.mark.parametrize("preset, kl, epsilons", CASES)
def test_grpo_loss_and_token_gradients(preset, kl, epsilons):
  chosen = _chosen(preset, kl, epsilons)
  (total, (weight, metrics)), gradient = jax.value_and_grad(_sums, has_aux=True)(
    _prefixed(GRPO["logprobs"]), chosen
  )
  golden = lambda what: _golden(preset, kl, epsilons, 1, what)
  np.testing.assert_allclose(total / weight, golden("loss"), rtol=1e-5)
  gradient = np.array(gradient / weight)
  assert not gradient[:, :PROMPT].any()
  np.testing.assert_allclose(gradient[:, PROMPT:], golden("grad_logprobs"), rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(metrics["clip_fraction_low"], golden("clip_low"), rtol=1e-6)
  np.testing.assert_allclose(metrics["clip_fraction_high"], golden("clip_high"), rtol=1e-6)
  assert golden("clip_low") > 0.05 and golden("clip_high") > 0.05
  if kl == "beta=0.04/bias=0":  # with the importance weight TRL logs the weighted one
    np.testing.assert_allclose(metrics["kl"], golden("kl"), rtol=1e-5)


def _token_logprobs(lm_head: jax.Array, hidden: np.ndarray, tokens: np.ndarray) -> jax.Array:
  logits = jnp.einsum("btd,vd->btv", hidden, lm_head, precision="highest")
  return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl", KLS)
def test_grpo_parameter_gradient_over_two_microbatches(preset, kl):
  """TRL accumulates halves; ours adds sums and divides once. Down to the output matrix."""
  chosen = _chosen(preset, kl, (0.2, 0.28))

  def total(lm_head, rows):
    logprobs = _token_logprobs(lm_head, GRPO["hidden"][rows], GRPO["tokens"][rows])
    logprobs = jnp.pad(logprobs, ((0, 0), (PROMPT, 0)), constant_values=-7.0)
    return _sums(logprobs, chosen, rows)

  halves = [
    jax.value_and_grad(total, has_aux=True)(jnp.asarray(GRPO["lm_head"]), rows)
    for rows in (slice(0, 4), slice(4, 8))
  ]
  weight = sum(aux[0] for (_, aux), _ in halves)
  golden = lambda what: _golden(preset, kl, (0.2, 0.28), 2, what)
  np.testing.assert_allclose(sum(v for (v, _), _ in halves) / weight, golden("loss"), rtol=1e-5)
  gradient, wanted = sum(g for _, g in halves) / weight, golden("grad_lm_head")
  np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_the_cases_differ():
  """Goldens equal to each other would let a wrong option pass; TRL's dapo is its bnpo here."""
  cases = [case for case in CASES if case[0] != "bnpo"]
  losses = np.sort([_golden(*case, 1, "loss") for case in cases])
  assert (np.diff(losses) > 1e-5 * losses[1:]).all()


@pytest.mark.parametrize("items", ["batch", "global"])
def test_sft_loss_and_gradients(items):
  """`global`: the weight of a larger batch, to which this is one contribution."""
  mask = jnp.asarray(SFT["mask"][:, 1:], jnp.float32)
  ids = jnp.where(np.arange(1, 12) < SFT["lengths"][:, None], 0, -1).astype(jnp.int32)
  tokens = SFT["tokens"][:, 1:]

  def of_logprobs(logprobs):
    whole = reduce.reduce("token_mean", supervised.nll(logprobs, mask), mask, ids)
    return whole.total, whole.weight

  def of_lm_head(lm_head):
    return of_logprobs(_token_logprobs(lm_head, SFT["hidden"], tokens))

  weight = SFT[f"{items}/items"]
  for of, at, name in (
    (of_logprobs, SFT["logprobs"], "grad_logprobs"),
    (of_lm_head, SFT["lm_head"], "grad_lm_head"),
  ):
    (total, count), gradient = jax.value_and_grad(of, has_aux=True)(jnp.asarray(at))
    assert items == "global" or count == weight
    np.testing.assert_allclose(total / weight, SFT[f"{items}/loss"], rtol=1e-5)
    wanted = SFT[f"{items}/{name}"]
    if name == "grad_logprobs":  # TRL's sum has a slope at ignored positions too: they are set to 0
      wanted = wanted * np.asarray(mask)
    np.testing.assert_allclose(
      gradient / weight, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("scale", advantages.SCALES)
def test_advantages(scale):
  golden = np.load(ORACLES / "trl_advantages.npz")
  for batch in (slice(0, 2), slice(2, 4)):
    rewards, wanted = golden["rewards"][batch].ravel(), golden[scale][batch].ravel()
    got = advantages.group_relative(rewards, np.arange(8) // 4, scale=scale, epsilon=1e-4)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
