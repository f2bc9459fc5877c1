"""Reward-model losses on arrays split over the batch AND the sequence equal those on one device."""

import jax
import numpy as np
import pytest

from pt_jax.losses import bootstrap, reduce, reward
from pt_jax.losses.reward import RewardObjective
from tests.losses import groups
from tests.mesh.training import make_mesh

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
