"""Reward-model losses and updates on 8 devices equal those on one, the sequence split or not."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data.batch import ComparisonBatch
from pt_jax.losses import bootstrap, reduce, reward
from pt_jax.losses.reward import RewardObjective
from pt_jax.models import heads
from pt_jax.rewards.model import score_completions
from pt_jax.steps.reward_model import reward_step
from pt_jax.steps.state import Updater
from tests.losses import groups
from tests.mesh import training
from tests.mesh.training import make_mesh
from tests.rewards import test_model
from tests.steps import tiny

pytestmark = pytest.mark.mesh

OBJECTIVES = {
  "pairwise": RewardObjective(margins=True, center=0.1, bootstrap=True),
  "listwise": RewardObjective("listwise"),
  "outcome": RewardObjective("outcome", bootstrap=True),
  "process": RewardObjective("process"),
}


@pytest.mark.parametrize("shape", [(4, 2, 1, 1), (1, 4, 2, 1)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient(shape, name):
  objective = OBJECTIVES[name]
  rows = (*groups.PACKED, *groups.PACKED)
  batch = groups.lay_out(groups.groups(), rows, 20)  # 4 columns of 5 cut through completions
  want, want_gradient, _ = groups.value_and_gradient(batch, objective)

  def total(values, b):
    hashes = bootstrap.group_hashes(b["tokens"], b["positions"], b["group_ids"])
    fields = [b[k] for k in ("segment_ids", "group_ids", *groups.FIELDS)]
    loss, counts, _ = reward.reward_loss(values, *fields, objective=objective, hashes=hashes)
    sums = reduce.reduce("token_mean", loss, counts, b["segment_ids"])
    return sums.total, (sums.weight, loss)

  with jax.set_mesh(make_mesh(shape)):
    where = jax.P(("data", "expert") if shape[2] > 1 else "data", "context")
    place = lambda x: jax.device_put(x, jax.P(*where, *(None,) * (x.ndim - 2)))
    placed = {k: place(v) for k, v in batch.items()}
    (value, (weight, loss)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
      placed["values"], placed
    )
    assert loss.sharding.spec == placed["labels"].sharding.spec
  np.testing.assert_allclose(value / weight, want, rtol=1e-5)
  np.testing.assert_allclose(gradient / weight, want_gradient, rtol=1e-5, atol=1e-7)


class Case(NamedTuple):
  """One way to run an update; the result must not depend on it."""

  mesh: tuple[int, int, int, int]  # data, context, expert, tensor
  zero: int
  microbatches: int
  packed: bool  # two pairs a row, else one


ONE = Case((1, 1, 1, 1), 1, 1, False)
CASES = [
  Case((8, 1, 1, 1), 3, 2, True),
  Case((4, 1, 1, 2), 1, 4, True),
  Case((2, 1, 1, 4), 3, 1, False),
  Case((2, 2, 1, 2), 3, 2, True),
]


def _batch(case: Case) -> ComparisonBatch:
  """32 pairs of unequal samples, with margins, weights and labels."""
  fields = training.lay_out(2)
  fields = {k: fields[k] for k in ("tokens", "positions", "segment_ids", "mask")}
  held, rng = fields["segment_ids"] >= 0, np.random.default_rng(0)
  by_row = lambda low, high: (rng.uniform(low, high, (32, 1)) * held).astype(np.float32)
  fields |= {
    "group_ids": np.where(held, 0, -1).astype(np.int32),
    "labels": ((fields["segment_ids"] == 0) & held).astype(np.float32),
    "weights": by_row(0.5, 2),
    "margins": by_row(0, 1),
    "reference_logprobs": np.zeros(held.shape, np.float32),
  }
  if case.packed:  # the second half of the rows behind the first
    later = {"group_ids": 1, "segment_ids": 2}
    shift = lambda k, x: np.where(x[16:] >= 0, x[16:] + later[k], -1) if k in later else x[16:]
    fields = {k: np.concatenate([x[:16], shift(k, x)], 1) for k, x in fields.items()}
  batch = ComparisonBatch(**fields)
  split = lambda x: x.reshape(case.microbatches, -1, x.shape[-1])
  return jax.device_put(jax.tree.map(split, batch), sharding.batch_spec(1))


@functools.cache
def _update(case: Case):
  """State and metrics after one update of a reward model with three heads."""
  table = heads.table(training.MODEL, 3)
  head = np.random.default_rng(1).normal(size=(3, training.MODEL.width)).astype(np.float32)
  params = heads.from_decoder(training.initial_params("sft"), head)
  with jax.set_mesh(make_mesh(case.mesh)):
    updater = Updater(training.ADAM, table, sharding.zero(case.zero))
    objective = OBJECTIVES["pairwise"]
    step = functools.partial(
      reward_step, config=training.MODEL, updater=updater, objective=objective
    )
    return jax.jit(step)(jax.jit(updater.create)(params), _batch(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_is_that_of_one_device(case):
  (want, want_metrics), (got, metrics) = _update(ONE), _update(case)
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
  error = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
  largest = lambda a, b: max(jax.tree.leaves(jax.tree.map(error, a, b)))
  assert largest(got.optimizer[0].mu, want.optimizer[0].mu) < 1e-5
  assert largest(got.params, want.params) < 1e-5


def test_scores_of_rollouts():
  """Split over the batch and the sequence; every device ends with all of them."""
  r = test_model.rollouts()
  with jax.set_mesh(make_mesh((1, 1, 1, 1))):
    want = test_model.alone()[np.arange(11), r.length - 1]
  mesh = make_mesh((4, 2, 1, 1))
  with jax.set_mesh(mesh):
    params = jax.device_put(test_model.params(), jax.P())
    got = score_completions(params, tiny.MODEL, r, mesh=mesh, rows=4, row_length=20)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
