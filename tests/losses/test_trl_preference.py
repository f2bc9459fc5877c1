"""Losses and gradients of TRL 1.16 on pairs and labels (tests/oracles/make_trl_preference.py).

Run as a module it prints the largest differences that docs/objectives.md lists.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import preference_objective as objectives
from pt_jax.losses.preference import Completions, pair_loss, unpaired_loss

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "oracles" / "trl_preference.npz"))
BETAS = (0.1, 0.5)
# Name of the frozen case, without its beta -> our objective at that beta.
PAIRS = {
  "sigmoid": objectives.dpo,
  "hinge": objectives.hinge,
  "ipo": objectives.ipo_mean,
  "nca_pair": objectives.nca,
  "bco_pair": objectives.bco_pair,
  "sppo_hard": objectives.sppo,
  "apo_zero": objectives.apo_zero,
  "apo_down": objectives.apo_down,
  "discopop": objectives.discopop,
  "sigmoid_norm": objectives.dpo_normalized,
  "robust/smoothing=0.0": functools.partial(objectives.rdpo, 0.0),
  "robust/smoothing=0.1": functools.partial(objectives.rdpo, 0.1),
  "robust/smoothing=0.3": functools.partial(objectives.rdpo, 0.3),
  "exo_pair/smoothing=0.001": objectives.exo,
  "exo_pair/smoothing=0.2": functools.partial(objectives.exo, label_smoothing=0.2),
  "sigmoid/sft=0.7": functools.partial(objectives.rpo, sft=0.7),
  "apo_zero/sft=0.2": lambda beta: dataclasses.replace(objectives.apo_zero(beta), sft=0.2),
  "sigmoid/weighted": objectives.wpo,
  "ipo/weighted": lambda beta: dataclasses.replace(
    objectives.ipo_mean(beta), confidence_weighted=True
  ),
  "apo_down/weighted": lambda beta: dataclasses.replace(
    objectives.apo_down(beta), confidence_weighted=True
  ),
  "cpo_simpo/smoothing=0.0": functools.partial(objectives.simpo, gamma=0.4),
  "cpo_simpo/smoothing=0.2": lambda beta: dataclasses.replace(
    objectives.simpo(beta, 0.4), label_smoothing=0.2
  ),
  "cpo_sigmoid/smoothing=0.0": functools.partial(objectives.cpo, sft=0.0),
  "cpo_sigmoid/smoothing=0.2": lambda beta: dataclasses.replace(
    objectives.cdpo(0.2, beta), reference=False
  ),
  "cpo_hinge": lambda beta: dataclasses.replace(objectives.hinge(beta), reference=False),
  "cpo_ipo": lambda beta: dataclasses.replace(objectives.ipo(beta), reference=False),
  "odds_ratio": functools.partial(objectives.orpo, sft=0.0),
}
WEIGHTS = ((1.0, 1.0), (1.5, 0.8))
UNPAIRED = ("kto", "apo_zero_unpaired")


def _completions(side: int, logprobs=None) -> Completions:
  fields = {
    k: jnp.asarray(GOLDEN[k][side], jnp.float32)
    for k in ("logprobs", "lengths", "reference_logprobs", "expected_logprobs")
  }
  return Completions(**fields | ({} if logprobs is None else {"logprobs": logprobs}))


def _pairs(objective) -> tuple[np.ndarray, np.ndarray, dict]:
  """Losses [N], gradients [N, 2] by the summed log-probs, metrics."""

  def total(c, j):
    losses, metrics = pair_loss(_completions(0, c), _completions(1, j), objective=objective)
    return losses.sum(), (losses, metrics)

  start = (_completions(0).logprobs, _completions(1).logprobs)
  gradients, (losses, metrics) = jax.grad(total, (0, 1), has_aux=True)(*start)
  return np.asarray(losses), np.stack(gradients, 1), metrics


def _singles(objective, baseline) -> tuple[np.ndarray, np.ndarray]:
  labels = jnp.asarray(GOLDEN["kto/labels"], jnp.float32)

  def total(lp):
    losses, _ = unpaired_loss(_completions(0, lp), labels, objective=objective, baseline=baseline)
    return losses.sum(), losses

  gradient, losses = jax.grad(total, has_aux=True)(_completions(0).logprobs)
  return np.asarray(losses), np.asarray(gradient)


def _objective_of(loss, beta, right, wrong):
  return objectives.PreferenceObjective(
    loss=loss, beta=beta, desirable_weight=right, undesirable_weight=wrong
  )


def _assert_close(got, wanted):
  """The sums frozen are exact in float32, so what is left is the rounding of the formula."""
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("case", PAIRS)
def test_pair_losses_and_gradients(case, beta):
  losses, gradients, _ = _pairs(PAIRS[case](beta))
  _assert_close(losses, GOLDEN[f"{case}/beta={beta}/loss"])
  _assert_close(gradients, GOLDEN[f"{case}/beta={beta}/grad"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss", UNPAIRED)
def test_unpaired_losses_and_gradients(loss, beta, weights):
  """A baseline of each completion's own, 0 where it is negative; then one of the whole batch."""
  objective = _objective_of(loss, beta, *weights)
  golden = lambda what: GOLDEN[f"{loss}/beta={beta}/weights={weights[0]},{weights[1]}/{what}"]
  baselines = jnp.asarray(GOLDEN["kto/baselines"], jnp.float32)
  losses, gradient = _singles(objective, baselines)
  _assert_close(losses, golden("loss"))
  _assert_close(gradient, golden("grad"))
  losses, gradient = _singles(objective, jnp.mean(baselines))
  _assert_close(losses.mean(), golden("batch_loss"))
  _assert_close(gradient / len(losses), golden("batch_grad"))


def test_the_cases_differ():
  """Goldens equal to each other would let a wrong option pass."""
  cases = [f"{case}/beta={beta}" for case in PAIRS for beta in BETAS]
  cases.remove("robust/smoothing=0.0/beta=0.1"), cases.remove("robust/smoothing=0.0/beta=0.5")
  gradients = np.stack([GOLDEN[f"{case}/grad"].ravel() for case in cases])
  for i, case in enumerate(cases):
    apart = np.abs(gradients - gradients[i]).max(1)
    assert (apart > 1e-3).sum() == len(cases) - 1, case
  assert {name.rpartition("/")[0] for name in GOLDEN if "/loss" in name} == {
    *cases,
    *(f"robust/smoothing=0.0/beta={beta}" for beta in BETAS),
    *(
      f"{loss}/beta={beta}/weights={right},{wrong}"
      for loss in UNPAIRED
      for beta in BETAS
      for right, wrong in WEIGHTS
    ),
  }


def measured() -> dict[str, tuple[float, float]]:
  """Case -> largest difference of losses and of gradients, relative to the largest of the case."""
  apart = lambda got, wanted: float(np.abs(got - wanted).max() / np.abs(wanted).max())
  differences: dict[str, list[tuple[float, float]]] = {}
  for case in PAIRS:
    for beta in BETAS:
      losses, gradients, _ = _pairs(PAIRS[case](beta))
      name = f"{case}/beta={beta}"
      pair = (apart(losses, GOLDEN[f"{name}/loss"]), apart(gradients, GOLDEN[f"{name}/grad"]))
      differences.setdefault(case.split("/smoothing")[0], []).append(pair)
  for loss in UNPAIRED:
    for beta in BETAS:
      for right, wrong in WEIGHTS:
        name = f"{loss}/beta={beta}/weights={right},{wrong}"
        baselines = jnp.asarray(GOLDEN["kto/baselines"], jnp.float32)
        losses, gradient = _singles(_objective_of(loss, beta, right, wrong), baselines)
        pair = (apart(losses, GOLDEN[f"{name}/loss"]), apart(gradient, GOLDEN[f"{name}/grad"]))
        differences.setdefault(loss, []).append(pair)
  return {k: (max(a for a, _ in v), max(b for _, b in v)) for k, v in differences.items()}


if __name__ == "__main__":
  for name, (loss, gradient) in measured().items():
    print(f"{name:24s} loss {loss:.1e} gradient {gradient:.1e}")
