"""TRL 1.16's GSPO, CISPO, SAPO, two-sided clip, mismatch correction, entropy bonus and RLOO
(tests/oracles/make_trl_policy.py)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import advantages, objective, policy, reduce
from pt_jax.losses.objective import Cispo, Clip, Correction, Kl, Objective, Sapo

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "oracles" / "trl_policy.npz"))
PROMPT = 2  # untrained tokens put before every completion: in TRL each row counts, even if masked
GRPO = Objective(reduction="segment_mean")


def _grpo(**changes) -> Objective:
  return dataclasses.replace(GRPO, **changes)


def _corrected(level, mode, low, high) -> Objective:
  return _grpo(correction=Correction(level, mode, low, high))


# TRL weighs the KL of GSPO by nothing here; CISPO's reduction is that of DAPO.
CASES = {
  "gspo": _grpo(ratio="sequence", surrogate=Clip(0.1, 0.1)),
  "gspo, tight": objective.gspo(),
  "gspo, kl": _grpo(ratio="sequence", kl=Kl(0.04)),
  "cispo": objective.cispo(),
  "cispo, low bound": Objective(surrogate=Cispo(0.0, 1.2)),
  "sapo": objective.sapo(),
  "sapo, sharp": _grpo(surrogate=Sapo(3.0, 5.0)),
  "two-sided": _grpo(surrogate=Clip(0.2, 0.2, dual=1.3)),
  "token_truncate": _corrected("token", "truncate", 0.0, 1.2),
  "token_mask": _corrected("token", "mask", 0.8, 1.2),
  "sequence_truncate": _corrected("sequence", "truncate", 0.0, 1.2),
  "sequence_mask": _corrected("sequence", "mask", 0.5, 1.2),
}


def _prefixed(values: np.ndarray, fill: float = 0.0) -> jax.Array:
  values = np.asarray(values, np.float32)
  return jnp.asarray(np.pad(values, ((0, 0), (PROMPT, 0)), constant_values=fill))


MASK = _prefixed(GOLDEN["mask"])
IDS = jnp.asarray(np.pad(GOLDEN["mask"] - 1, ((0, 0), (PROMPT, 0))), jnp.int32)
SCORES = {f"{k}_logprobs": _prefixed(GOLDEN[f"{k}_logprobs"], -3.0) for k in ("old", "reference")}
SCORES["sampler_logprobs"] = _prefixed(GOLDEN["sampler_logprobs"], -2.0)
ADVANTAGES = _prefixed(GOLDEN["advantages"][:, None] * GOLDEN["mask"], 5.0)


def _loss(logprobs: jax.Array, chosen: Objective, **fields) -> jax.Array:
  scores = dict(SCORES)
  old = scores.pop("old_logprobs")
  loss, _ = policy.policy_loss(
    logprobs, old, ADVANTAGES, MASK, IDS, objective=chosen, **scores, **fields
  )
  return reduce.reduce(chosen.reduction, loss, MASK, IDS).mean()


def _close(got: jax.Array, wanted: np.ndarray) -> None:
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def largest_difference(name: str) -> tuple[float, float]:
  """Of the loss and of the gradient by log-probs, relative to the largest value of each."""
  value, gradient = jax.value_and_grad(_loss)(_prefixed(GOLDEN["logprobs"]), CASES[name])
  loss, wanted = GOLDEN[f"{name}/loss"], GOLDEN[f"{name}/grad_logprobs"]
  of_gradient = np.abs(gradient[:, PROMPT:] - wanted).max() / np.abs(wanted).max()
  return abs(float(value) / float(loss) - 1), float(of_gradient)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_token_gradients(name):
  value, gradient = jax.value_and_grad(_loss)(_prefixed(GOLDEN["logprobs"]), CASES[name])
  np.testing.assert_allclose(value, GOLDEN[f"{name}/loss"], rtol=1e-5)
  assert not gradient[:, :PROMPT].any()
  _close(gradient[:, PROMPT:], GOLDEN[f"{name}/grad_logprobs"])


def _log_softmax(lm_head: jax.Array) -> jax.Array:
  hidden = jnp.asarray(GOLDEN["hidden"])
  return jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, lm_head, precision="highest"))


def _prefixed_logprobs(lm_head: jax.Array) -> jax.Array:
  tokens = GOLDEN["tokens"][..., None]
  logprobs = jnp.take_along_axis(_log_softmax(lm_head), tokens, -1)[..., 0]
  return jnp.pad(logprobs, ((0, 0), (PROMPT, 0)), constant_values=-7.0)


@pytest.mark.parametrize("name", ["gspo", "cispo", "sapo", "two-sided", "sequence_mask"])
def test_parameter_gradient(name):
  of_head = lambda lm_head: _loss(_prefixed_logprobs(lm_head), CASES[name])
  _close(jax.grad(of_head)(jnp.asarray(GOLDEN["lm_head"])), GOLDEN[f"{name}/grad_lm_head"])


def test_entropy_bonus():
  """TRL takes the mean over tokens whatever the objective; so does ours under `token_mean`."""
  chosen = Objective(entropy=0.1)

  def of_head(lm_head):
    log_p = _log_softmax(lm_head)
    entropy = jnp.pad(-(jnp.exp(log_p) * log_p).sum(-1), ((0, 0), (PROMPT, 0)))
    return _loss(_prefixed_logprobs(lm_head), chosen, entropy=entropy)

  value, gradient = jax.value_and_grad(of_head)(jnp.asarray(GOLDEN["lm_head"]))
  np.testing.assert_allclose(value, GOLDEN["entropy/loss"], rtol=1e-5)
  _close(gradient, GOLDEN["entropy/grad_lm_head"])


def test_rloo():
  """One ratio for a whole completion; TRL's loss is the mean over completions."""
  chosen = dataclasses.replace(objective.rloo(), kl=None, surrogate=Clip(0.3, 0.3))
  np.testing.assert_allclose(GOLDEN["rloo/logprobs"], GOLDEN["logprobs"], rtol=1e-6)
  value, gradient = jax.value_and_grad(_loss)(_prefixed(GOLDEN["logprobs"]), chosen)
  # TRL counts a completion without tokens as ratio 1: its loss is -A. Ours has no token, so 0.
  empty = GOLDEN["mask"].sum(1) == 0
  missing = -(GOLDEN["advantages"] * empty).sum() / len(empty)
  np.testing.assert_allclose(value + missing, GOLDEN["rloo/loss"], rtol=1e-5)
  _close(gradient[:, PROMPT:], GOLDEN["rloo/grad_logprobs"])
  of_head = lambda lm_head: _loss(_prefixed_logprobs(lm_head), chosen)
  _close(jax.grad(of_head)(jnp.asarray(GOLDEN["lm_head"])), GOLDEN["rloo/grad_lm_head"])


def test_leave_one_out():
  rewards, wanted = GOLDEN["rloo/rewards"], GOLDEN["rloo/advantages"]
  got = advantages.leave_one_out(rewards.ravel(), np.arange(16) // 4)
  np.testing.assert_allclose(got, wanted.ravel(), rtol=1e-5, atol=1e-7)


def test_the_cases_differ():
  losses = np.sort([float(GOLDEN[f"{name}/loss"]) for name in (*CASES, "entropy", "rloo")])
  assert (np.diff(losses) > 1e-5 * np.abs(losses[1:])).all()
