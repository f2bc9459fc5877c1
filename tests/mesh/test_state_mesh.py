"""Where a train state lives under each ZeRO stage, that its values do not depend on the mesh, and
that a mesh which does not divide the model is an error."""

import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding, weights
from pt_jax.models import decoder
from tests.mesh import training

pytestmark = pytest.mark.mesh


@functools.cache
def initial_state(shape, stage):
  """A state whose parameters were drawn on the mesh itself."""
  with jax.set_mesh(training.make_mesh(shape)):
    updater = training.make_updater(stage, "grpo")
    create = lambda key: updater.create(decoder.init(key, training.MODEL, updater.layout.params))
    return jax.jit(create)(jax.random.key(0))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 1, 1, 4), (2, 2, 1, 2)])
def test_init_is_the_same_on_every_mesh(shape, stage):
  got = jax.device_get(initial_state(shape, stage).params)
  jax.tree.map(np.testing.assert_array_equal, got, training.initial_params("grpo"))


def bytes_of_device(tree, device) -> int:
  shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
  return sum(s.data.nbytes for s in shards if s.device == device)


def test_zero_divides_what_it_says():
  """On 8 data-parallel devices: the optimizer under every stage, the parameters under stage 3."""
  one, three = (initial_state((8, 1, 1, 1), stage) for stage in (1, 3))
  table = decoder.table(training.MODEL)
  whole = 4 * weights.count(table)
  split = 4 * sum(
    int(np.prod(row.shape)) for _, row in weights.named_rows(table) if "embed" in row.axes
  )
  shared = whole - split + split // 8  # norms, biases and head-wide gains are on every device
  assert shared < whole / 6
  for device in jax.devices():
    assert bytes_of_device(one.params, device) == whole
    assert bytes_of_device(three.params, device) == shared
    for state in (one, three):
      assert bytes_of_device(state.optimizer[0].mu, device) == shared
      assert bytes_of_device(state.optimizer[0].nu, device) == shared


def test_batch_is_split_over_rows_and_sequence():
  case = training.Case("sft", (2, 2, 1, 2), 1, 2, "packed")
  with jax.set_mesh(training.make_mesh(case.mesh)):
    tokens = training.make_batch(case).tokens
  assert tokens.shape == (2, 16, 16)
  assert {s.data.shape for s in tokens.addressable_shards} == {(2, 8, 8)}


@pytest.mark.parametrize(
  ("changes", "shape", "stage", "message"),
  [
    (
      {"kv_heads": 4},
      (1, 1, 1, 8),
      1,
      "parameter blocks.k: axis 'kv_heads' of size 4 does not divide into the 8 parts of mesh "
      "axis tensor",
    ),
    (
      {"vocab_size": 65},
      (4, 1, 1, 2),
      1,
      "parameter embed: axis 'vocab' of size 65 does not divide into the 2 parts of mesh axis "
      "tensor",
    ),
    (
      {"width": 36},
      (8, 1, 1, 1),
      3,
      "parameter blocks.down: axis 'embed' of size 36 does not divide into the 8 parts of mesh "
      "axis data",
    ),
  ],
)
def test_mesh_that_does_not_divide_the_model(changes, shape, stage, message):
  table = decoder.table(training.MODEL.__class__(**(vars(training.MODEL) | changes)))
  with pytest.raises(ValueError) as error:
    weights.check_mesh(table, sharding.zero(stage).params, training.make_mesh(shape))
  assert str(error.value) == message
  fine = {1: (2, 2, 2, 1), 3: (4, 2, 1, 1)}[stage]
  weights.check_mesh(table, sharding.zero(stage).params, training.make_mesh(fine))


def test_mesh_that_does_not_match_the_devices():
  with pytest.raises(ValueError, match=r"^mesh 4x1x1x1 .* needs 4 devices, found 8$"):
    sharding.make_mesh(4)
  with pytest.raises(ValueError, match=r"^mesh -1x1x1x3 .* needs 3 devices, found 8$"):
    sharding.make_mesh(-1, tensor=3)
  assert sharding.make_mesh(-1, tensor=2).shape["data"] == 4
