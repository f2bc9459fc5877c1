"""How long a program takes at least, and what holds it up."""

import dataclasses
from collections.abc import Sequence

import jax

from pt_jax.plan.collectives import Collective
from pt_jax.plan.cost import Operation
from pt_jax.plan.topology import Slice, axis_bandwidth


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one call on every device, each resource at its published peak."""

  compute: float  # matrix products
  hbm: float
  ici: float  # collectives
  exposed: float  # of `ici`, collectives that no other work runs beside
  # Every operation the larger of its compute and HBM time, and what is exposed; at least `ici`.
  in_order: float
  model_flops: float  # of one device
  peak: float  # FLOPs per second of one device

  @property
  def seconds(self) -> float:
    """The longest of the three: no schedule is faster."""
    return max(self.compute, self.hbm, self.ici)

  @property
  def binding(self) -> str:
    """Which of the three that is."""
    times = {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici}
    return max(times, key=lambda name: times[name])

  def mfu(self, seconds: float) -> float:
    """Model FLOPs (nothing twice) in so many seconds, as a share of the peak."""
    return self.model_flops / self.peak / seconds if seconds else 0.0


def roofline(
  operations: Sequence[Operation],
  found: Sequence[Collective],
  model_flops: float,
  piece: Slice,
  mesh: jax.sharding.Mesh,
) -> Roofline:
  """The bounds of a program.

  Args:
    operations: of one device.
    found: its collectives.
    model_flops: of all devices.
    piece: the slice.
    mesh: over its devices.
  """
  chip = piece.chip
  peak, bandwidth = chip.bf16_flops * chip.device_share, chip.hbm_bandwidth * chip.device_share
  seconds = [(op.cost.flops / peak, op.cost.bytes / bandwidth, op.runs) for op in operations]
  ici = exposed = 0.0
  for one in found:
    if one.axes and one.bytes:
      time = one.moved / axis_bandwidth(piece, mesh, one.axes)
      ici += time
      exposed += time * (1 - one.beside / one.bytes)
  return Roofline(
    compute=sum(compute * runs for compute, _, runs in seconds),
    hbm=sum(hbm * runs for _, hbm, runs in seconds),
    ici=ici,
    exposed=exposed,
    in_order=max(sum(max(compute, hbm) * runs for compute, hbm, runs in seconds) + exposed, ici),
    model_flops=model_flops / mesh.size,
    peak=peak,
  )
