"""The TPU chips that kernels are written for: what they can do, and how to compile for one.

Peaks are the published ones per chip; what a JAX device is (a chip, or one of its two cores) is in
`device_cores`. Sources: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} for peaks, memory and links;
`jax.experimental.pallas.tpu.get_tpu_info_for_chip` for VMEM and the MXU; `usable_hbm` is the limit
that libtpu 0.0.52 names when a program does not fit (E1000, CompileTimeHbmOom).
"""

import dataclasses

GIB = 1 << 30
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip. Everything is of the whole chip unless it says "core" or "device"."""

  name: str
  device_kinds: tuple[str, ...]  # what `jax.Device.device_kind` calls it
  topology: str  # the smallest that libtpu compiles for
  accelerator: str  # TPU_ACCELERATOR_TYPE that goes with it
  bf16_flops: float  # per second
  hbm_bytes: int
  hbm_bandwidth: float  # bytes per second
  usable_hbm: int  # bytes of a device that a program may use
  ici_bandwidth: float  # bytes per second, all links, both directions together
  ici_links: int
  cores: int  # TensorCores
  device_cores: int  # TensorCores behind one JAX device
  mxu: int  # edge of a matrix unit
  mxu_rows: int  # bfloat16 rows that the matrix units of a core take in a cycle, all together
  vmem_bytes: int  # of a core

  @property
  def flops_per_cycle(self) -> int:
    """bfloat16 FLOPs that the matrix units of one core do in a cycle: 2 rows edge^2."""
    return 2 * self.mxu_rows * self.mxu**2

  @property
  def clock(self) -> float:
    """Cycles per second, such that the matrix units reach the published peak."""
    return self.bf16_flops / self.cores / self.flops_per_cycle

  @property
  def device_share(self) -> float:
    """The part of a chip that one JAX device is."""
    return self.device_cores / self.cores


# mxu_rows of v6e and tpu7x: two matrix units that take two rows a cycle. XLA's bfloat16 product of
# 4096^3 has flops_per_cycle FLOPs for every busy cycle of its schedule, within 0.2 %, on all four.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v5e",
      device_kinds=("TPU v5 lite", "TPU v5e"),
      topology="v5e:1x1",
      accelerator="v5litepod-1",
      bf16_flops=197e12,
      hbm_bytes=16 * GIB,
      hbm_bandwidth=819e9,
      usable_hbm=int(15.75 * GIB),
      ici_bandwidth=400e9,
      ici_links=4,
      cores=1,
      device_cores=1,
      mxu=128,
      mxu_rows=4,
      vmem_bytes=128 * MIB,
    ),
    Chip(
      name="v5p",
      device_kinds=("TPU v5", "TPU v5p"),
      topology="v5p:1x1x1",
      accelerator="v5p-2",
      bf16_flops=459e12,
      hbm_bytes=95 * GIB,
      hbm_bandwidth=2765e9,
      usable_hbm=int(95.73 * GIB),
      ici_bandwidth=1200e9,
      ici_links=6,
      cores=2,
      device_cores=2,
      mxu=128,
      mxu_rows=4,
      vmem_bytes=64 * MIB,
    ),
    Chip(
      name="v6e",
      device_kinds=("TPU v6 lite", "TPU v6e"),
      topology="v6e:1x1",
      accelerator="v6e-1",
      bf16_flops=918e12,
      hbm_bytes=32 * GIB,
      hbm_bandwidth=1638e9,
      usable_hbm=int(31.24 * GIB),
      ici_bandwidth=800e9,
      ici_links=4,
      cores=1,
      device_cores=1,
      mxu=256,
      mxu_rows=4,
      vmem_bytes=128 * MIB,
    ),
    Chip(
      name="tpu7x",
      device_kinds=("TPU7x",),
      topology="tpu7x:1x1x1",
      accelerator="tpu7x-2",
      bf16_flops=2307e12,
      hbm_bytes=192 * GIB,
      hbm_bandwidth=7380e9,
      usable_hbm=int(94.74 * GIB),
      ici_bandwidth=1200e9,
      ici_links=6,
      cores=2,
      device_cores=1,
      mxu=256,
      mxu_rows=4,
      vmem_bytes=64 * MIB,
    ),
  )
}


def get(name: str) -> Chip:
  """The chip of this name. Raises ValueError for a name that is none."""
  if name not in CHIPS:
    raise ValueError(f"chip: expected one of {', '.join(CHIPS)}, found {name!r}")
  return CHIPS[name]


def of_kind(device_kind: str) -> str | None:
  """The name of the chip that `jax.Device.device_kind` calls `device_kind`, None for any other."""
  return next((chip.name for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
