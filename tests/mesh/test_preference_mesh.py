"""Preference updates on 8 devices equal those on one, whatever the mesh, ZeRO stage, microbatches
and packing."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data import packing
from pt_jax.data.batch import ComparisonBatch
from pt_jax.data.groups import MISMATCHED, Group, group_length, pack_groups
from pt_jax.data.packing import Example
from pt_jax.losses import preference_objective as objectives
from pt_jax.steps.preference import PreferenceUpdater, preference_evaluate, preference_step, score
from tests.mesh import training
from tests.mesh.training import make_mesh

pytestmark = pytest.mark.mesh

LENGTH, GROUPS = 32, 32
OBJECTIVES = {
  "rpo": objectives.rpo(0.3, sft=0.5),
  "kto": objectives.kto(0.3, desirable_weight=1.5),
}


class Case(NamedTuple):
  """One way to run an update; the result must not depend on anything but the objective."""

  objective: str
  mesh: tuple[int, int, int, int]  # data, context, expert, tensor
  zero: int
  microbatches: int
  packed: bool


CASES = [
  Case("rpo", (8, 1, 1, 1), 3, 2, True),
  Case("kto", (2, 1, 1, 4), 3, 4, False),
  Case("kto", (2, 2, 1, 2), 3, 1, True),
  Case("rpo", (2, 2, 2, 1), 1, 1, False),
]


@functools.cache
def groups(unpaired: bool) -> tuple[Group, ...]:
  """Pairs of unequal samples with weights, or one and a mismatched one."""
  samples, made = training.samples(), []
  for i in range(GROUPS):
    both = samples[2 * i : 2 * i + 2]
    labels = (float(i % 2), MISMATCHED) if unpaired else (1.0, 0.0)
    examples = tuple(Example(s["tokens"], s["mask"]) for s in both)
    references = tuple(s["reference_logprobs"] for s in both)
    made.append(Group(examples, labels, 0.5 + i % 3, references=references))
  return tuple(made)


def batch(case: Case) -> ComparisonBatch:
  """The groups as [A, B, S] on the mesh in context."""
  made = groups(OBJECTIVES[case.objective].unpaired)
  place = packing.pack if case.packed else packing.one_per_row
  plan = place([group_length(group) for group in made], LENGTH, rows=32)
  rows = pack_groups(made, plan)
  assert (rows.group_ids.max() > 0) == case.packed
  split = lambda x: x.reshape(-1, case.microbatches, LENGTH).swapaxes(0, 1)
  return jax.device_put(jax.tree.map(split, rows), sharding.batch_spec(1))


@functools.cache
def update(case: Case):
  """State and metrics after one update."""
  with jax.set_mesh(make_mesh(case.mesh)):
    updater = training.make_updater(case.zero, "grpo")
    step = functools.partial(
      preference_step,
      config=training.MODEL,
      updater=updater,
      objective=OBJECTIVES[case.objective],
    )
    state = jax.jit(PreferenceUpdater(updater).create)(training.initial_params("grpo"))
    return jax.jit(step)(state, batch(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_is_that_of_one_device(case):
  want, want_metrics = update(Case(case.objective, (1, 1, 1, 1), 1, 1, False))
  got, metrics = update(case)
  assert metrics.keys() == want_metrics.keys()
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
  error = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
  largest = lambda a, b: max(jax.tree.leaves(jax.tree.map(error, a, b)))
  assert largest(got.train.optimizer[0].mu, want.train.optimizer[0].mu) < 1e-5
  assert largest(got.params, want.params) < 1e-5
  if case.objective == "kto":
    assert float(want_metrics["preference/baseline"]) != 0


def test_scores_and_held_out_figures():
  """Where the batch and the sequence are split."""

  def run(shape):
    with jax.set_mesh(make_mesh(shape)):
      updater = training.make_updater(1, "grpo")
      state = jax.jit(PreferenceUpdater(updater).create)(training.initial_params("grpo"))
      rows = batch(Case("rpo", shape, 1, 2, True))
      scores = jax.jit(functools.partial(score, config=training.MODEL))(state.params, rows)
      assert scores.sharding.spec == rows.mask.sharding.spec
      one = jax.tree.map(lambda x: np.asarray(x)[0], rows)
      evaluate = functools.partial(
        preference_evaluate, config=training.MODEL, objective=OBJECTIVES["rpo"]
      )
      return scores, jax.jit(evaluate)(state, jax.device_put(one, sharding.batch_spec()))

  scores, (sums, at, outputs) = run((2, 2, 1, 2))
  wanted, (want, want_at, want_outputs) = run((1, 1, 1, 1))
  np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(at, want_at)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, (sums, outputs), (want, want_outputs))
