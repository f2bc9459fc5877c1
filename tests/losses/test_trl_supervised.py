"""Supervised losses of TRL 1.16 and torch, value and gradient down to the output matrix
(tests/oracles/make_trl_supervised.py).

  python -m tests.losses.test_trl_supervised    prints the largest differences
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.losses import reduce, supervised
from pt_jax.losses.supervised import ReferenceKl, SupervisedObjective
from pt_jax.models.divergence import next_token_kl
from pt_jax.models.logprobs import next_token_mean_logit, next_token_statistics

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "oracles/trl_supervised.npz"))
MASK = GOLDEN["mask"].astype(np.float32)
IDS = np.where(GOLDEN["real"], 0, -1).astype(np.int32)
TOKENS = GOLDEN["tokens"].astype(np.int32)
OBJECTIVES = {
  "dft": supervised.dft(),
  **{f"smoothed={s}": supervised.label_smoothed(s) for s in (0.1, 0.35)},
  **{f"torch/smoothed={s}": supervised.label_smoothed(s) for s in (0.1, 0.35)},
  **{
    f"psft=0.3/{way}": SupervisedObjective(kl=ReferenceKl(0.3, "exact", way))
    for way in ("policy_reference", "reference_policy")
  },
  **{f"clipped={clip}": supervised.psft_clipped(clip, None) for clip in (0.2, 0.28)},
}

pytestmark = pytest.mark.usefixtures("one_device")


def _hidden(name):
  """Positions 0 to S - 2 predict a token; what the last one predicts is never read."""
  return np.pad(GOLDEN[name], ((0, 0), (0, 1), (0, 0)), constant_values=3.0)


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.value_and_grad, has_aux=True)
def _sums_and_gradient(lm_head, objective):
  """What a step does with the hidden states."""
  hidden, chunk = _hidden("hidden"), 10
  other, matrix = _hidden("reference_hidden"), GOLDEN["reference_lm_head"]
  stats = next_token_statistics(hidden, lm_head, TOKENS, chunk=chunk)
  way = objective.kl.direction if objective.kl else "policy_reference"
  loss, _ = supervised.supervised_loss(
    stats.logprobs,
    MASK,
    objective=objective,
    mean_logprobs=next_token_mean_logit(hidden, lm_head) - stats.logsumexp,
    reference_logprobs=next_token_statistics(other, matrix, TOKENS, chunk=chunk).logprobs,
    exact_kl=next_token_kl(hidden, lm_head, other, matrix, chunk=chunk, direction=way),
  )
  whole = reduce.reduce(objective.reduction, loss, MASK, IDS)
  return whole.total, whole.weight


def _differences(case):
  """Relative difference of the loss and of the gradient by its largest value."""
  (value, weight), gradient = _sums_and_gradient(jnp.asarray(GOLDEN["lm_head"]), OBJECTIVES[case])
  for items in ("batch", "global"):
    if f"{case}/{items}/loss" in GOLDEN:
      count = weight if items == "batch" else 31
      want, slope = (GOLDEN[f"{case}/{items}/{name}"] for name in ("loss", "grad_lm_head"))
      error = np.abs(np.asarray(gradient) / count - slope).max() / np.abs(slope).max()
      yield float(abs(value / count / want - 1)), float(error)


@pytest.mark.parametrize("case", OBJECTIVES)
def test_loss_and_gradient(case):
  found = list(_differences(case))
  assert len(found) == (1 if case.startswith(("torch", "psft", "clipped")) else 2)
  for loss, gradient in found:
    assert loss < 1e-5 and gradient < 1e-5


def test_the_gradient_of_dft_by_log_probs():
  """TRL's own log-probs, and the slope that its loss has at each of them."""
  stats = next_token_statistics(_hidden("hidden"), GOLDEN["lm_head"], TOKENS)

  def total(logprobs):
    loss, _ = supervised.supervised_loss(logprobs, MASK, objective=supervised.dft())
    return reduce.reduce("token_mean", loss, MASK, IDS).total

  gradient = jax.grad(total)(stats.logprobs)[:, 1:] / MASK.sum()
  want = GOLDEN["dft/batch/grad_logprobs"] * MASK[:, 1:]
  np.testing.assert_allclose(gradient, want, rtol=2e-5, atol=1e-7 * np.abs(want).max())


def test_the_cases_differ():
  """Goldens equal to each other would let a wrong option pass."""
  losses = [float(GOLDEN[f"{case}/batch/loss"]) for case in OBJECTIVES if "torch" not in case]
  losses += [
    float(GOLDEN[f"kl/{way}/batch/loss"]) for way in ("policy_reference", "reference_policy")
  ]
  assert np.diff(np.sort(losses)).min() > 1e-3


def main() -> None:
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    for case in OBJECTIVES:
      loss, gradient = np.max(list(_differences(case)), 0)
      print(f"{case:32} loss {loss:.1e}  gradient {gradient:.1e}")


if __name__ == "__main__":
  main()
