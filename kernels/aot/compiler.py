"""Compiles cases for chips in a process of their own, which loads libtpu once.

The process that asks keeps its devices, its flags and its memory.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kernels
from kernels import chip as chips
from kernels.case import Case

LOCKED = "libtpu_lockfile"  # in the message of a start that found another process of libtpu
ATTEMPTS = 5


class Job(NamedTuple):
  """A case to compile for a chip."""

  module: str  # that has `CASES`
  case: str
  chip: str

  @property
  def kernel(self) -> str:
    """The folder that the case is of."""
    return self.module.split(".")[-2]


def why_not() -> str:
  """Why nothing can be compiled for TPUs here; empty where it can."""
  if importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed (Linux on x86_64 only): nothing can be compiled for TPUs"
  return ""


def modules() -> list[str]:
  """The `shapes` modules of all kernels."""
  folders = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.ispkg]
  names = [f"kernels.{folder}.shapes" for folder in sorted(folders)]
  return [name for name in names if importlib.util.find_spec(name)]


def cases(module: str) -> dict[str, Case]:
  """The cases of a module by name. Raises ValueError when a name is there twice."""
  found: dict[str, Case] = {}
  for case in importlib.import_module(module).CASES:
    if case.name in found:
      raise ValueError(f"{module}: case {case.name!r} is there twice")
    found[case.name] = case
  return found


def case_of(job: Job) -> Case:
  """What a job compiles."""
  return cases(job.module)[job.case]


def compile_all(jobs: Sequence[Job], *, schedule: bool, timeout: float = 3600) -> list[dict]:
  """Compiles jobs one after the other.

  Args:
    jobs: what to compile.
    schedule: whether to read the schedule too (`worker.compiled` says what comes back).
    timeout: seconds for all of them.

  Returns:
    For each job what `worker.compiled` found, or {"error": one line}.

  Raises RuntimeError when libtpu does not start, or the process dies.
  """
  for attempt in range(ATTEMPTS):
    results, log = _run(jobs, schedule, timeout)
    if len(results) == len(jobs):
      return results
    if LOCKED not in log:
      break
    time.sleep(2 + 2 * attempt)
  lost = jobs[len(results)]
  raise RuntimeError(f"{lost.kernel} {lost.case} for {lost.chip}: the compiler died: {log[-2000:]}")


def _run(jobs: Sequence[Job], schedule: bool, timeout: float) -> tuple[list[dict], str]:
  with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as folder:
    out = Path(folder, "results.jsonl")
    dumps = Path(folder, "dumps")
    dumps.mkdir()
    environment = _environment(chips.get(jobs[0].chip), dumps if schedule else None)
    done = subprocess.run(
      [sys.executable, "-m", "kernels.aot.worker", str(out), str(dumps) if schedule else ""],
      input=json.dumps(jobs),
      env=environment,
      timeout=timeout,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      check=False,
    )
    lines = out.read_text().splitlines() if out.exists() else []
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return results, done.stdout


def _environment(chip: chips.Chip, dumps: Path | None) -> dict[str, str]:
  """Of the process that compiles. Programs out of a cache would leave no dumps."""
  drop = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
  environment = {name: value for name, value in os.environ.items() if name not in drop}
  environment |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": chip.accelerator,
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is of the whole machine
  }
  if dumps:
    flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
    environment["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
  return environment


@contextlib.contextmanager
def target(device: Any) -> Iterator[None]:
  """Kernels of JAX that ask which TPU this is are told the one that is compiled for."""
  try:
    from jax._src.pallas.mosaic import tpu_info
  except ImportError:
    yield
    return
  names = ("get_device_kind", "get_num_device_cores")
  before = {name: getattr(tpu_info, name, None) for name in names}
  tpu_info.get_device_kind = lambda: device.device_kind
  tpu_info.get_num_device_cores = lambda: device.num_cores
  try:
    yield
  finally:
    for name, function in before.items():
      setattr(tpu_info, name, function)
