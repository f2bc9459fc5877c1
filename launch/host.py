"""The machine that a program starts on: which platform, and how a CPU is used as a device.

Both settings for a CPU have to be made before JAX computes anything. What they are worth stands in
`docs/results.md`.
"""

import ctypes
import dataclasses
import math
import mmap
import os
import sys
from pathlib import Path

import jax

from pt_jax.experiment import Experiment, Offline
from pt_jax.loops import record

ACCELERATORS = ("accel0", "vfio", "nvidia0", "kfd", "dxg")  # under /dev: TPUs and GPUs
# Options of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
RESERVE = 4 << 30  # bytes of address space, not of memory, that huge pages may back


def prepare(experiment: Experiment, folder: Path, cpu_devices: int) -> None:
  """Gets the machine ready for a run.

  Args:
    experiment: what will run.
    folder: of the run. One that has begun goes on with the number of CPU devices that it had, since
      its bits depend on it.
    cpu_devices: devices to make of the CPU; 0 leaves that to the folder or `devices_for`.

  Raises ValueError when there cannot be `cpu_devices` devices.
  """
  if choose_platform() == "cpu":
    before = record.last_environment(folder)
    recorded = before["devices"] if before.get("platform") == "cpu" else 0
    use_cpu(cpu_devices or recorded or devices_for(experiment))
  if cpu_devices:
    found = jax.device_count() if jax.default_backend() == "cpu" else 0
    if found != cpu_devices:
      raise ValueError(f"--cpu-devices: expected {cpu_devices} CPU devices, found {found}")


def use_cpu(devices: int) -> None:
  """Makes so many devices of the CPU, and keeps the memory that they free."""
  if split_cpu(devices):
    keep_freed_memory()


def choose_platform() -> str:
  """The CPU where no accelerator is attached, so that JAX does not look for a TPU and warn.

  JAX_PLATFORMS, where it is set, decides. Returns what was chosen, "" where that is left to JAX.
  """
  if chosen := os.environ.get("JAX_PLATFORMS", ""):
    return chosen
  if sys.platform != "linux" or any(Path("/dev", name).exists() for name in ACCELERATORS):
    return ""
  jax.config.update("jax_platforms", "cpu")
  return "cpu"


def split_cpu(devices: int) -> bool:
  """Makes so many devices of the CPU, unless XLA_FLAGS says how many.

  One device runs one small operation after the other and wakes its other threads for each; two of
  them run side by side. Returns False, and does nothing, where JAX has other devices already.
  """
  if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return True
  try:
    jax.config.update("jax_num_cpu_devices", devices)
  except RuntimeError:
    return False
  return True


def devices_for(experiment: Experiment) -> int:
  """As many CPU devices as the mesh of an experiment asks for. Where `data` takes what there is,
  that is the largest power of two, up to one device a core, that divides every batch."""
  mesh = experiment.mesh
  fixed = math.prod(size for size in dataclasses.astuple(mesh) if size > 0)
  if mesh.data != -1:
    return fixed
  sizes = [experiment.model.width] if experiment.model else []
  for stage in experiment.stages:
    if isinstance(stage, Offline):
      sizes.append(stage.layout.batch_size // stage.microbatches)
    else:
      sizes += [stage.slots, getattr(stage, "rows", stage.slots)]
  shared, cores = math.gcd(*(size // mesh.expert for size in sizes)), max(1, _cores() // fixed)
  return fixed * min(shared & -shared, 1 << (cores.bit_length() - 1))


def _cores() -> int:
  """Cores that this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # Linux
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def keep_freed_memory() -> None:
  """Keeps freed memory in the process, in one heap of huge pages (glibc only).

  XLA allocates the temporaries of a step anew each time, hundreds of megabytes, and glibc gives
  blocks of that size back to the system when they are freed: every step then pays for the same
  pages again. With this the process stays as large as it ever was. Call it before JAX starts its
  threads, each of which would have a heap of its own.
  """
  libc = ctypes.CDLL(None) if sys.platform == "linux" else None
  if libc is None or not hasattr(libc, "gnu_get_libc_version"):
    return
  for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
    libc.mallopt(option, value)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  libc.free.argtypes = [ctypes.c_void_p]
  if start := libc.malloc(RESERVE):  # None under a limit on address space
    page = mmap.PAGESIZE
    libc.madvise(-(-start // page) * page, RESERVE - page, mmap.MADV_HUGEPAGE)
    libc.free(start)
