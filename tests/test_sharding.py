"""Rules, meshes and layouts on one device; what needs eight is in tests/mesh."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from pt_jax import sharding
from pt_jax.sharding import USE, ZERO, P, Rules


def mesh(*sizes):
  """A mesh that needs no devices: rules and checks read only its sizes."""
  return AbstractMesh(sizes, sharding.MESH_AXES, (AxisType.Explicit,) * 4)


def test_specs():
  full = mesh(2, 2, 2, 2)
  assert USE.spec("vocab", "embed", mesh=full) == P("tensor", None)
  assert ZERO.spec("vocab", "embed", mesh=full) == P("tensor", "data")
  assert ZERO.spec("layer", "embed", "heads", "head", mesh=full) == P(None, "data", "tensor", None)
  assert USE.spec("batch", "seq", None, mesh=full) == P(("data", "expert"), "context", None)


def test_mesh_axes_of_size_one_are_left_out():
  assert USE.spec("batch", "seq", mesh=mesh(4, 1, 1, 2)) == P("data", None)
  assert USE.spec("batch", "seq", mesh=mesh(1, 2, 4, 1)) == P("expert", "context")
  assert ZERO.spec("vocab", "embed", mesh=mesh(1, 1, 1, 1)) == P(None, None)


def test_the_mesh_in_context_is_the_default(one_device):
  assert USE.spec("batch", "seq") == P(None, None)
  assert sharding.batch_spec(2) == P(None, None, None, None)


def test_two_logical_axes_on_one_mesh_axis():
  message = "logical axes 'batch' and 'embed' of one array are both mapped to mesh axis 'data'"
  with pytest.raises(ValueError, match=f"^{message}$"):
    ZERO.spec("batch", "seq", "embed", mesh=mesh(1, 1, 1, 1))
  with pytest.raises(ValueError, match=r"'heads' and 'hidden' .* 'tensor'"):
    USE.spec("heads", "hidden", mesh=mesh(2, 1, 1, 1))
  moved = dataclasses.replace(USE, hidden="data")
  assert moved.spec("heads", "hidden", mesh=mesh(2, 1, 1, 2)) == P("tensor", "data")


def test_unknown_logical_axis():
  with pytest.raises(AttributeError, match="width"):
    USE.spec("width", mesh=mesh(1, 1, 1, 1))


def test_zero_stages():
  split = {stage: [rules == ZERO for rules in sharding.zero(stage)] for stage in (1, 2, 3)}
  # parameters, gradients, optimizer state: arXiv 1910.02054, figure 1
  assert split == {1: [False, False, True], 2: [False, True, True], 3: [True, True, True]}
  with pytest.raises(ValueError, match=r"^zero stage: expected 1, 2 or 3, found 4$"):
    sharding.zero(4)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((0,), "mesh: sizes must be positive, at most one of them -1, found .*'data': 0"),
    ((-1, -1), "mesh: sizes must be positive, at most one of them -1, found .*'context': -1"),
    ((-2,), "mesh: sizes must be positive, at most one of them -1, found .*'data': -2"),
    ((2, 1, 1, 3), r"mesh 2x1x1x3 \(data, context, expert, tensor\) needs 6 devices, found 1"),
  ],
)
def test_bad_meshes(sizes, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    sharding.make_mesh(*sizes, devices=jax.devices()[:1])


def test_make_mesh_fills_the_free_axis():
  made = sharding.make_mesh(-1, devices=jax.devices()[:1])
  assert made.axis_names == ("data", "context", "expert", "tensor")
  assert made.axis_types == (AxisType.Explicit,) * 4
  assert dict(made.shape) == {"data": 1, "context": 1, "expert": 1, "tensor": 1}


def test_check_divides():
  both = Rules(embed=("data", "expert"))
  check = lambda size, rules: sharding.check_divides(
    "parameter w", (size, 6), ("embed", None), rules, mesh(2, 1, 2, 1)
  )
  check(8, both)
  check(5, USE)
  message = (
    "parameter w: axis 'embed' of size 6 does not divide into the 4 parts of mesh axis "
    "data x expert"
  )
  with pytest.raises(ValueError, match=f"^{message}$"):
    check(6, both)
