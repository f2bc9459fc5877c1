"""Losses on arrays that are split over the batch AND the sequence equal those on one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from pt_jax.losses import mismatch, objective, segments
from tests.losses import layouts

pytestmark = pytest.mark.mesh

AXES = ("data", "context", "expert", "tensor")
SHAPES = ((4, 2, 1, 1), (2, 4, 1, 1), (8, 1, 1, 1))
OBJECTIVES = {
  "token_mean": objective.bnpo(),
  "segment_mean": objective.grpo(),
  "constant": objective.dr_grpo(9),
  "gspo": objective.gspo(),
  "rloo": objective.rloo(),
  "corrected": objective.Objective(
    surrogate=objective.Cispo(), correction=objective.Correction("sequence", "mask", 0.5, 1.5)
  ),
}


def _batch():
  """8 rows of 12: samples packed and apart; 12 columns split in 4 cut through segments."""
  rows = ((1, 2), (0, 3), (4, 5), (), (5, 4), (3, 2), (0,), (1,))
  return layouts.lay_out(layouts.samples(), rows, 12)


def _mesh(shape):
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_loss_and_gradient(shape, name):
  batch = _batch()
  expected, expected_gradient = layouts.value_and_gradient(batch, OBJECTIVES[name])
  with jax.set_mesh(_mesh(shape)):
    placed = jax.device_put(batch, jax.P("data", "context"))
    total = lambda lp, b: (lambda s: (s.total, s.weight))(layouts.total(lp, b, OBJECTIVES[name]))
    (value, weight), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
      placed["logprobs"], placed
    )
    assert gradient.sharding.spec == placed["logprobs"].sharding.spec
  np.testing.assert_allclose(value / weight, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient / weight, expected_gradient, rtol=1e-5, atol=1e-8)


def test_segment_sum_keeps_the_layout_of_its_input():
  batch = _batch()
  expected = segments.segment_sum(batch["mask"], batch["segment_ids"])
  with jax.set_mesh(_mesh(SHAPES[0])):
    placed = jax.device_put(batch, jax.P("data", "context"))
    got = jax.jit(segments.segment_sum)(placed["mask"], placed["segment_ids"])
    assert got.sharding.spec == jax.P("data", "context")
  np.testing.assert_array_equal(got, expected)


def test_logprob_gap():
  batch = _batch()
  fields = [batch[k] for k in ("logprobs", "old_logprobs", "mask")]
  expected = mismatch.logprob_gap(*fields)
  with jax.set_mesh(_mesh(SHAPES[0])):
    placed = jax.device_put(fields, jax.P("data", "context"))
    got = jax.jit(mismatch.logprob_gap)(*placed)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5)
