"""TPU slices that are not there: their devices, as libtpu describes them, and meshes over them."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from kernels import chip
from kernels.chip import Chip
from pt_jax import sharding
from pt_jax.sharding import MESH_AXES

# Slices that are offered (cloud.google.com/tpu/docs); libtpu describes others of the same chips.
KNOWN = {
  "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x4", "8x8x8", "8x8x16"),
  "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
# What libtpu must be told where there is no TPU: to ask no metadata server, to share the machine
# with other processes that compile, and to be silent about who its workers are.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of a pod."""

  name: str  # "v5p:4x4x4"
  chip: Chip
  bounds: tuple[int, ...]  # chips along each axis of the torus
  devices: tuple[jax.Device, ...]  # descriptions: programs can be compiled for them, and no more

  @property
  def chips(self) -> int:
    """How many chips."""
    return math.prod(self.bounds)


def open_slice(name: str) -> Slice:
  """The slice that is called like "v5p:4x4x4" or "v5e:2x4". Needs libtpu, and no TPU.

  Raises ValueError with the list of known slices for a name that is none.
  """
  kind, _, shape = name.partition(":")
  if kind not in KNOWN or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
    raise ValueError(f"topology: expected one of {_known()}; found {name!r}")
  described = chip.get(kind)
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", described.accelerator)
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  try:
    found = topologies.get_topology_desc(topology_name=name, platform="tpu")
  except Exception as error:  # whatever libtpu and its loader raise
    why = str(error).splitlines()[0]
    raise ValueError(
      f"topology {name!r}: libtpu does not open it ({why}); known: {_known()}"
    ) from error
  bounds = tuple(int(n) for n in shape.split("x"))
  return Slice(name, described, bounds, tuple(found.devices))


def _known() -> str:
  return ", ".join(f"{kind}:{shape}" for kind, shapes in KNOWN.items() for shape in shapes)


def read_mesh(text: str) -> dict[str, int]:
  """ "data=16,tensor=4" -> {"data": 16, "tensor": 4}; an axis may be -1, what is left.

  Raises ValueError for an axis or a size that is none.
  """
  sizes: dict[str, int] = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if name not in MESH_AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
      raise ValueError(
        f"mesh: expected AXIS=SIZE,... with axes {', '.join(MESH_AXES)}, found {part!r}"
      )
    sizes[name] = int(size)
  return sizes


def mesh_on(piece: Slice, sizes: Mapping[str, int]) -> jax.sharding.Mesh:
  """The mesh that a run on this slice would make; `data` takes what is left unless it is given.

  Raises ValueError when the sizes do not multiply to the number of devices.
  """
  given = {"data": -1} | dict(sizes)
  try:
    return sharding.make_mesh(**given, devices=piece.devices)
  except ValueError as error:
    raise ValueError(f"{piece.name}: {error}") from error


def wraps(piece: Slice, dim: int) -> bool:
  """Whether the torus is closed along one of its axes: v5e and v6e where it is the pod's 16 long,
  the three-dimensional ones where its length is a multiple of 4."""
  size = piece.bounds[dim]
  return size == 16 if len(piece.bounds) == 2 else size % 4 == 0


def axis_bandwidth(piece: Slice, mesh: jax.sharding.Mesh, axes: Sequence[str]) -> float:
  """Bytes per second that a chip sends, and as many that it receives, in a ring over mesh axes.

  Counted are the links along the torus axes that the mesh axes run along: both where they run all
  around a closed one, one where they run along an open one or a part.
  """
  places = np.moveaxis(mesh.devices, [MESH_AXES.index(a) for a in axes], range(len(axes))).reshape(
    math.prod(mesh.shape[a] for a in axes), -1
  )[:, 0]
  coords = np.array([device.coords for device in places])
  link = piece.chip.ici_bandwidth / piece.chip.ici_links / 2  # one direction
  found = 0.0
  for dim in range(len(piece.bounds)):
    extent = len(set(coords[:, dim].tolist()))
    if extent > 1:
      closed = extent == piece.bounds[dim] and wraps(piece, dim)
      found += link * (2 if closed else 1)
  return found or link * piece.chip.ici_links  # the cores of one chip
