"""Plans of a small SFT stage on a v5e of 4 chips, compiled by libtpu without a TPU."""

import dataclasses

import numpy as np
import pytest

from experiments import sft_qwen3
from pt_jax.data.groups import Group, pack_groups
from pt_jax.data.packing import Example, pack, pack_rows
from pt_jax.loops.rollouts import pack_rollouts
from pt_jax.models.config import ModelConfig
from pt_jax.plan import estimate, page, programs
from pt_jax.plan.choices import Choice, applied
from pt_jax.plan.compile import Plan, plan_stage
from pt_jax.plan.memory import TEMPORARIES
from pt_jax.plan.topology import axis_bandwidth, mesh_on, open_slice, read_mesh
from pt_jax.rollout.rollouts import Rollouts

pytest.importorskip("libtpu")
TINY = ModelConfig(
  vocab_size=512,
  width=256,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=128,
  hidden=512,
  compute_dtype="bfloat16",
)
EXAMPLE = Example(np.arange(4, dtype=np.int32), np.ones(4, np.float32))


@pytest.fixture(scope="module")
def experiment():
  """Two microbatches of 4 rows of 256 tokens."""
  base = sft_qwen3.config(batch_size=8, row_length=256, microbatches=2)
  return dataclasses.replace(base, model=TINY)


@pytest.fixture(scope="module")
def plan(experiment) -> Plan:
  """On data=2, tensor=2."""
  choice = Choice(mesh={"data": 2, "tensor": 2})
  return plan_stage(experiment, experiment.stages[0], open_slice("v5e:2x2"), choice)


def test_memory_is_that_of_the_parameter_table(plan):
  (step,) = plan.programs
  count, parts = estimate.parameters(TINY), step.memory.parts
  whole = TINY.width * (2 * TINY.layers + 1)  # norms, on every device
  split = count - whole
  assert parts["parameters"] == 4 * (split // 4 + whole)
  assert parts["optimizer"] == 2 * parts["parameters"] + 2 * 4  # moments, and two counters
  assert parts["gradients"] == parts["parameters"]
  assert parts["batch"] == 5 * 4 * 8 * 256 // 2  # fields, bytes, rows, tokens; over data
  assert parts[TEMPORARIES] > 0
  assert plan.fits


def test_flops_are_the_models_and_what_is_computed_twice(plan):
  xla = plan.programs[0].xla
  assert xla is not None
  tokens = 8 * 256
  assert plan.programs[0].program.model_flops == 3 * tokens * estimate.forward_flops(TINY, 256)
  again = xla.flops * 4 / plan.programs[0].program.model_flops
  # `remat` computes a block twice. Kernels state what they cost.
  assert all(kernel.cost for kernel in xla.kernels)
  assert 1.2 < again < 1.6


def test_collectives_have_the_axes_of_the_mesh(plan):
  found = plan.programs[0].xla.collectives
  gathered = sum(c.bytes for c in found if (c.kind, c.axes) == ("all-gather", ("data",)))
  matrices = (estimate.parameters(TINY) - 2 * 512 * 256) / 2  # of the blocks, over tensor
  # In each of two microbatches, forward and backward, in bfloat16 or float32.
  assert 2 * 2 * matrices * 2 * 0.98 < gathered < 2 * 2 * matrices * 4 + 4 * 512 * 256
  assert any((c.kind, c.axes) == ("all-reduce", ("tensor",)) for c in found)


def test_gradients_of_split_parameters_are_scattered(plan):
  found = plan.programs[0].xla.collectives
  over_data = lambda kind: sum(c.bytes for c in found if (c.kind, c.axes) == (kind, ("data",)))
  # Of two microbatches in bfloat16, half over tensor. The matrices of keys, values and the
  # vocabulary are so small here that XLA sums them whole, a quarter of all.
  every = 2 * 2 * estimate.parameters(TINY) / 2
  assert over_data("reduce-scatter") > 0.74 * every
  assert over_data("reduce-scatter") + over_data("all-reduce") < 1.01 * every


def test_page_says_everything(plan):
  text = page.page(plan)
  for word in ("fits", "parameters", "optimizer", "gradients", "all-gather", "compute", "ICI"):
    assert word in text
  assert "MFU" in text
  assert "mesh      data=2 tensor=2; ZeRO 3" in text


def _rows():
  return pack_rows([EXAMPLE], pack([4], 8))


def _pairs():
  return pack_groups([Group((EXAMPLE, EXAMPLE), (1.0, 0.0))], pack([8], 8))


def _rollouts():
  one = lambda dtype, value: np.full((1, 4), value, dtype)
  size = lambda n: np.array([n], np.int32)
  drawn = Rollouts(
    *(one(np.int32, 1), size(2), size(4), one(float, -1), one(np.int32, 0), size(0)),
    forced=one(bool, False),
  )
  return pack_rollouts(drawn, 1, 8, share_prompts=True).batch


@pytest.mark.parametrize("pack_one", [_rows, _pairs, _rollouts])
def test_dtypes_of_abstract_batches_are_those_of_real_ones(pack_one):
  batch = pack_one()
  for field in dataclasses.fields(batch):
    expected = np.int32 if field.name in programs.INTEGERS else np.float32
    assert getattr(batch, field.name).dtype == expected, field.name


@pytest.mark.parametrize(
  ("name", "line"),
  [
    ("v9:2x2", "topology: expected one of v5e:1x1, v5e:2x2"),
    ("v5e", "topology: expected one of v5e:1x1"),
    ("v5e:3x3", "topology 'v5e:3x3': libtpu does not open it"),
  ],
)
def test_unknown_topology(name, line):
  with pytest.raises(ValueError, match=line):
    open_slice(name)


def test_mesh_errors(experiment):
  with pytest.raises(ValueError, match=r"mesh: expected AXIS=SIZE,.* found 'rows=2'"):
    read_mesh("rows=2")
  with pytest.raises(ValueError, match=r"v5e:2x2: mesh 3x1x1x1 .* needs 3 devices, found 4"):
    mesh_on(open_slice("v5e:2x2"), {"data": 3})
  stage = experiment.stages[0]
  with pytest.raises(ValueError, match="microbatches: expected a divisor of the 8 rows"):
    applied(experiment, stage, Choice(microbatches=3))
  with pytest.raises(ValueError, match="axis 'kv_heads' of size 2 does not divide into the 4"):
    plan_stage(experiment, stage, open_slice("v5e:2x2"), Choice(mesh={"tensor": 4}))


def test_bandwidth_of_a_mesh_axis():
  """v5p links do 100 GB/s each way; an axis of 4 is closed, a part of one is not."""
  piece = open_slice("v5p:4x4x4")
  mesh = mesh_on(piece, {"data": 16, "tensor": 4})
  assert axis_bandwidth(piece, mesh, ("tensor",)) == pytest.approx(2 * 100e9)
  assert axis_bandwidth(piece, mesh, ("data",)) == pytest.approx(4 * 100e9)
  piece = open_slice("v6e:16x16")
  mesh = mesh_on(piece, {"data": 32, "tensor": 8})
  assert axis_bandwidth(piece, mesh, ("tensor",)) == pytest.approx(100e9)
