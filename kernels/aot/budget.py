"""What the schedules of kernels may cost: figures that were written down, and a comparison.

The file holds what `python -m kernels.schedule --write-budget` measured, with the versions of jax
and libtpu; another compiler makes other schedules, and is not compared with it.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kernels.aot import compiler

PATH = Path(__file__).parents[1] / "budget.json"
TOLERANCE = 1.03  # a figure may grow by 3 %
FIGURES = ("turn", "cycles", "spills", "fills", "unknown")


def versions() -> dict[str, str]:
  """Of what makes the schedules."""
  return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def jobs(chips: Iterable[str]) -> list[compiler.Job]:
  """Every case that has a budget, for these chips."""
  return [
    compiler.Job(module, case.name, chip)
    for module in compiler.modules()
    for case in compiler.cases(module).values()
    if case.budget
    for chip in chips
  ]


def key(job: compiler.Job) -> str:
  """What a job is called in the file."""
  return f"{job.kernel} {job.case} {job.chip}"


def entry(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Kernel -> figures, of a compiled case."""
  return {
    kernel["name"]: {name: round(kernel[name], 1) for name in FIGURES}
    for kernel in result["kernels"]
  }


def write(measured: Mapping[str, dict], path: Path = PATH) -> None:
  """Adds to the file, or begins it anew where other versions wrote it."""
  before = read(path) if path.exists() else {}
  kept = before["cases"] if before.get("versions") == versions() else {}
  cases = dict(sorted((kept | dict(measured)).items()))
  path.write_text(json.dumps({"versions": versions(), "cases": cases}, indent=1) + "\n")


def read(path: Path = PATH) -> dict[str, Any]:
  """{"versions", "cases"} of the file."""
  return json.loads(path.read_text())


def exceeded(name: str, measured: Mapping[str, Any], allowed: Mapping[str, Any]) -> list[str]:
  """One line for each figure of a case that is over its budget, or has none."""
  lines = []
  if measured.keys() != allowed.keys():
    lines.append(f"{name}: expected kernels {sorted(allowed)}, found {sorted(measured)}")
  for kernel in measured.keys() & allowed.keys():
    for figure, found in measured[kernel].items():
      most = allowed[kernel][figure] * TOLERANCE
      if found > most:
        lines.append(f"{name}: {kernel}: {figure}: expected at most {most:.1f}, found {found}")
  return lines
