"""Loss, gradients and updated parameters do not depend on the mesh, ZeRO, microbatches or packing.

Every case is compared with one device, one microbatch, one sample a row. Truth for that one is in
tests/steps and tests/models.
"""

import itertools
import math

import jax
import numpy as np
import pytest

from pt_jax import weights
from tests.mesh import training
from tests.mesh.training import Case

pytestmark = pytest.mark.mesh

DATA, BOTH, HALF, TENSOR, CONTEXT = (
  (8, 1, 1, 1),
  (4, 1, 1, 2),
  (2, 1, 1, 4),
  (1, 1, 1, 8),
  (2, 2, 1, 2),
)
CASES = [
  Case("sft", DATA, 3, 1, "packed"),
  Case("grpo", DATA, 1, 2, "packed"),
  Case("sft", DATA, 2, 4, "unpacked"),
  Case("grpo", BOTH, 3, 1, "unpacked"),
  Case("sft", BOTH, 1, 2, "packed"),
  Case("grpo", BOTH, 3, 4, "packed"),
  Case("sft", HALF, 1, 1, "packed"),
  Case("grpo", HALF, 3, 2, "unpacked"),
  Case("grpo", HALF, 1, 4, "packed"),
  Case("grpo", TENSOR, 1, 1, "packed"),
  Case("sft", TENSOR, 3, 2, "unpacked"),
  Case("sft", TENSOR, 1, 4, "unpacked"),
  Case("sft", CONTEXT, 3, 1, "unpacked"),
  Case("grpo", CONTEXT, 1, 2, "packed"),
  Case("sft", CONTEXT, 3, 4, "packed"),
]
OTHERS = [  # the rest of the supervised and of the policy step, and the critic's
  Case("psft", CONTEXT, 3, 2, "packed"),
  Case("psft", TENSOR, 1, 1, "packed"),
  Case("psft", BOTH, 3, 4, "unpacked"),
  Case("all", BOTH, 3, 2, "packed"),
  Case("all", CONTEXT, 1, 1, "shared"),
  Case("critic", CONTEXT, 3, 2, "shared"),
  Case("critic", TENSOR, 1, 4, "unpacked"),
]
EVERY = [
  Case(*fields)
  for fields in itertools.product(
    ("sft", "grpo"), (DATA, BOTH, HALF, TENSOR), (1, 3), (1, 2, 4), ("packed", "unpacked")
  )
]


def test_cases_hold_every_pair():
  """Each mesh, ZeRO 1 and 3, number of microbatches, layout and kind appears with each other."""
  fields = {name: {getattr(case, name) for case in CASES} for name in Case._fields}
  fields["zero"] = {1, 3}
  for a, b in itertools.combinations(fields, 2):
    seen = {(getattr(case, a), getattr(case, b)) for case in CASES}
    assert set(itertools.product(fields[a], fields[b])) <= seen, (a, b)


def largest_error(got, want) -> float:
  """Largest difference in any leaf, relative to the largest value of that leaf."""
  error = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
  return max(jax.tree.leaves(jax.tree.map(error, got, want)))


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_update_is_that_of_one_device(case):
  check_update(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_update_is_that_of_one_device(case):
  check_update(case)


def check_update(case: Case) -> None:
  """Metrics, moments and parameters of one update against one device; where they live."""
  want = training.update(Case(case.kind, (1, 1, 1, 1), 1, 1, "unpacked"))
  got = training.update(case)
  assert got.metrics.keys() == want.metrics.keys()
  for name, value in want.metrics.items():
    np.testing.assert_allclose(got.metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
  adam, reference = got.state.optimizer[0], want.state.optimizer[0]
  # After one update the first moment is (1 - b1) times the clipped gradient.
  assert largest_error(adam.mu, reference.mu) < 1e-5
  assert largest_error(adam.nu, reference.nu) < 2e-5  # squares
  # The step is mu / (sqrt(nu) + epsilon): the error of mu and half of that of nu.
  assert largest_error(got.state.params, want.state.params) < 2e-5
  updater, mesh = training.make_updater(case.zero, case.kind), training.make_mesh(case.mesh)
  for tree, rules in (
    (got.state.params, updater.layout.params),
    (adam.mu, updater.layout.optimizer),
    (adam.nu, updater.layout.optimizer),
  ):
    check_where(tree, updater.table, rules, mesh)


def check_where(tree, table, rules, mesh) -> None:
  """Every leaf lives where the rules say, and each device holds its part of it only."""

  def check(row, w):
    sizes = [mesh.shape[a] for part in rules.spec(*row.axes, mesh=mesh) for a in as_names(part)]
    assert {s.data.size for s in w.addressable_shards} == {w.size // math.prod(sizes)}

  weights.map_table(check, table, tree)


def as_names(part) -> tuple[str, ...]:
  return (part,) if isinstance(part, str) else part or ()


def test_the_update_moves_and_the_kinds_differ():
  """What is compared above is not trivially equal."""
  sft, grpo, psft = (
    training.update(Case(kind, (1, 1, 1, 1), 1, 1, "unpacked")) for kind in ("sft", "grpo", "psft")
  )
  assert float(psft.metrics["loss/kl"]) > 0.01
  assert largest_error(sft.state.optimizer[0].mu, psft.state.optimizer[0].mu) > 1e-2
  before = training.initial_params("grpo")
  for outcome in (sft, grpo):
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), outcome.state.params, before)
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert min(np.abs(w).max() for w in jax.tree.leaves(outcome.state.optimizer[0].mu)) > 1e-6
  assert largest_error(sft.state.params, grpo.state.params) > 1e-2
  assert float(grpo.metrics["policy/clip_fraction"]) > 0
