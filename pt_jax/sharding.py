"""The mesh, the logical axes, and the one mapping between them.

Every mesh has the same four axes, every size 1 on one device, so no code asks whether there is a
mesh:

  data      the batch, and under ZeRO the width of parameters, gradients and optimizer state
  context   the sequence
  expert    the experts of a mixture; outside of one, the batch
  tensor    heads, MLP hidden units and the vocabulary

Models name logical axes ("embed", "heads"...). `Rules` says which mesh axes each of them is split
over. `USE` holds while a parameter is multiplied by; `zero(stage)` says where parameters, gradients
and optimizer state live between uses. A transfer from one to the other is a `jax.reshard`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from kernels import chip as chips

P = jax.P
MESH_AXES = ("data", "context", "expert", "tensor")
MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
  """For every logical axis, the mesh axes that it is split over (None: it is whole everywhere)."""

  layer: MeshAxes = None  # the stacked blocks
  vocab: MeshAxes = "tensor"
  embed: MeshAxes = None  # the residual width
  heads: MeshAxes = "tensor"  # query heads
  kv_heads: MeshAxes = "tensor"  # key and value heads
  head: MeshAxes = None  # the width of one head
  hidden: MeshAxes = "tensor"  # MLP hidden units
  batch: MeshAxes = ("data", "expert")
  seq: MeshAxes = "context"

  def spec(self, *axes: str | None, mesh: Mesh | None = None) -> P:
    """The PartitionSpec of an array with these logical axes on `mesh` (default: the one in
    context).

    Mesh axes of size 1 are left out: they split nothing, and without them JAX knows that an axis is
    whole (it may be merged with its neighbour, say). Raises ValueError when two logical axes are
    mapped to one mesh axis.
    """
    parts = [_names(getattr(self, axis)) if axis else () for axis in axes]
    taken: dict[str, str | None] = {}
    for axis, names in zip(axes, parts):
      for name in names:
        if name in taken:
          raise ValueError(
            f"logical axes {taken[name]!r} and {axis!r} of one array are both mapped to mesh "
            f"axis {name!r}"
          )
        taken[name] = axis
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
    kept = [tuple(name for name in names if sizes.get(name, 2) > 1) for names in parts]
    return P(*(names[0] if len(names) == 1 else names or None for names in kept))


def _names(part: MeshAxes) -> tuple[str, ...]:
  return (part,) if isinstance(part, str) else part or ()


USE = Rules()
ZERO = Rules(embed="data")


class Layout(NamedTuple):
  """Where the parts of a train state live between steps."""

  params: Rules
  grads: Rules  # of the gradient accumulator
  optimizer: Rules


def zero(stage: int) -> Layout:
  """ZeRO (arXiv 1910.02054): stage 1 splits the optimizer over `data`, 2 gradients too, 3 all."""
  layouts = {1: Layout(USE, USE, ZERO), 2: Layout(USE, ZERO, ZERO), 3: Layout(ZERO, ZERO, ZERO)}
  if stage not in layouts:
    raise ValueError(f"zero stage: expected 1, 2 or 3, found {stage}")
  return layouts[stage]


def make_mesh(
  data: int = 1,
  context: int = 1,
  expert: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over `devices` (default: all of them) with explicit axes.

  Args:
    data, context, expert, tensor: sizes; one of them may be -1, "whatever is left".
    devices: the devices to use, as many as the product of the sizes.

  Raises ValueError when the sizes do not multiply to the number of devices.
  """
  sizes = dict(zip(MESH_AXES, (data, context, expert, tensor)))
  count = len(jax.devices() if devices is None else devices)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"mesh: sizes must be positive, at most one of them -1, found {sizes}")
  known = math.prod(size for size in sizes.values() if size != -1)
  if free and count % known == 0:
    sizes[free[0]] = count // known
  if math.prod(sizes.values()) != count:
    raise ValueError(
      f"mesh {'x'.join(str(s) for s in sizes.values())} (data, context, expert, tensor) needs "
      f"{math.prod(abs(s) for s in sizes.values())} devices, found {count}"
    )
  kinds = (AxisType.Explicit,) * len(MESH_AXES)
  shape = tuple(sizes.values())
  try:
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)
  except NotImplementedError:  # an axis is no product of axes of the torus: it takes a part of one
    given = jax.devices() if devices is None else devices
    split = mesh_utils.create_device_mesh(shape, given, allow_split_physical_axes=True)
    return Mesh(split, MESH_AXES, axis_types=kinds)


def chip() -> str | None:
  """The TPU of the mesh in context, a name of `kernels.chip.CHIPS` that kernels are compiled for.
  None for any other device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return None if device is None else chips.of_kind(device.device_kind)


def check_divides(name: str, shape: Sequence[int], axes: Axes, rules: Rules, mesh: Mesh) -> None:
  """Raises ValueError when the mesh does not divide an array of this shape into equal parts."""
  for size, axis in zip(shape, axes):
    names = _names(getattr(rules, axis)) if axis else ()
    pieces = math.prod(mesh.shape[n] for n in names)
    if size % pieces:
      raise ValueError(
        f"{name}: axis {axis!r} of size {size} does not divide into the {pieces} parts of mesh "
        f"axis {' x '.join(names)}"
      )


def batch_spec(leading: int = 0) -> P:
  """The PartitionSpec of [B, S] token arrays, behind `leading` whole axes (microbatches)."""
  return P(*(None,) * leading, *USE.spec("batch", "seq"))


def put(tree: Any, spec: P, mesh: Mesh) -> Any:
  """Host arrays, the same on every host, onto the mesh; each device takes its own part."""
  where = jax.sharding.NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, where, lambda index, x=x: x[index]), tree
  )
