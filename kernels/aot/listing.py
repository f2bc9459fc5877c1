"""Reads the schedule of a compiled kernel out of libtpu's dumps.

`*-packed-bundles-post-ra.txt` is the program as it is issued, one bundle a cycle, stalls written
out as empty bundles. (`*-final_bundles.txt` has the stalls folded away: a size, not a time.)
`*-pre-delay_hlo-static-per-bundle-utilization.txt` says for each of those bundles how many of each
unit it uses. A branch backward makes a loop; a branch forward skips what is between.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:[\s>]*\{(.*)$")
BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?)%([\w.]+)\))?\s*target bundleno = (\d+)")
COMPARE = re.compile(r"%([\w.]+) = scmp\.(\w+)\.[su]32(?:\.\w+)? %[\w.]+, (-?\d+)")
BOUNDS = re.compile(r"iteration_bounds: \(([\d, ]+)\)")
DELAY = 4  # bundles behind a branch that are still issued
PIPELINE = "iteration index, stage"  # in what the pipeline emitter leaves where its loop starts
FILL_AND_DRAIN = 2  # turns of a pipelined loop that skip the kernel's body


@dataclasses.dataclass
class Region:
  """Bundles start <= i < end of a program, and the regions in it."""

  start: int
  end: int
  loop: bool = False  # or else it may be skipped
  turns: float | None = None  # of a loop; None: known at run time only
  pipelined: bool = False
  inner: list["Region"] = dataclasses.field(default_factory=list)

  def walk(self) -> list["Region"]:
    """The region and all in it, in the order of the listing, outer first."""
    return [self, *(deep for region in self.inner for deep in region.walk())]


@dataclasses.dataclass
class Schedule:
  """A kernel as it is issued on one core."""

  units: tuple[str, ...]
  capacity: np.ndarray  # [units] of each in a bundle
  used: np.ndarray  # [bundles, units]
  program: Region
  grid: tuple[int, ...]  # () where the compiler does not say


def read(dumps: Path, name: str) -> Schedule:
  """The schedule of instruction `name`. Raises ValueError when libtpu left none."""
  bundles = _bundles(_file(dumps, name, "packed-bundles-post-ra"))
  units, capacity, used = _utilization(
    _file(dumps, name, "pre-delay_hlo-static-per-bundle-utilization")
  )
  rows = np.zeros((len(bundles), len(units)), np.int64)
  rows[: len(used)] = used[: len(bundles)]
  bounds = next((m for text in bundles if (m := BOUNDS.search(text))), None)
  grid = tuple(int(n) for n in bounds[1].split(",") if n.strip()) if bounds else ()
  return Schedule(units, capacity, rows, _regions(bundles), grid)


def _file(dumps: Path, name: str, what: str) -> Path:
  """The largest file of this kind: a kernel may have several programs."""
  exact = re.compile(rf"\d+-{re.escape(name)}-\d+-{what}\.txt")
  files = [path for path in dumps.iterdir() if exact.fullmatch(path.name)]
  if not files:
    raise ValueError(f"schedule of {name}: expected a dump {what!r} in {dumps}, found none")
  return max(files, key=lambda path: path.stat().st_size)


def _bundles(path: Path) -> list[str]:
  """The text of each bundle, comments with it."""
  bundles: list[str] = []
  for line in path.read_text(errors="replace").splitlines():
    if found := BUNDLE.match(line):
      bundles += [""] * (int(found[1], 16) - len(bundles)) + [found[2]]
    elif bundles:
      bundles[-1] += " " + line
  return bundles


def _utilization(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
  """Names of the units, how many there are of each, how many of each a bundle uses."""
  units: tuple[str, ...] = ()
  numbers = []
  for line in path.read_text().splitlines():
    if not line.strip() or line.startswith("=="):
      continue
    if line.lstrip()[0].isalpha():
      units = tuple(name.strip() for name in line.split(","))
    else:
      numbers.append([int(n) for n in line.split()])
  table = np.asarray(numbers, np.int64).reshape(-1, len(units))
  return units, table[0], table[1:]


def _regions(bundles: list[str]) -> Region:
  """Loops and skippable regions, nested. What is nested across a border is cut there."""
  compares: dict[str, tuple[str, int]] = {}
  for text in bundles:
    for name, relation, bound in COMPARE.findall(text):
      compares.setdefault(name, (relation, int(bound)))
  found = []
  for i, text in enumerate(bundles):
    behind = min(i + 1 + DELAY, len(bundles))
    for negated, predicate, target in BRANCH.findall(text):
      to = int(target)
      if to <= i:
        turns = _turns(compares.get(predicate), bool(negated))
        found.append(Region(to, behind, True, turns, PIPELINE in bundles[to]))
      elif to > behind:
        found.append(Region(behind, min(to, len(bundles))))
  return _nest(found, len(bundles))


def _turns(compare: tuple[str, int] | None, negated: bool) -> float | None:
  """Turns of a loop that counts from 0 up to a constant, of which the branch asks."""
  if compare is None or compare[1] <= 0:
    return None
  ends = compare[0] in ("ge", "eq") or (compare[0] == "lt" and not negated)
  return float(compare[1]) if ends else None


def _nest(regions: list[Region], length: int) -> Region:
  program = Region(0, length, True, 1.0)
  stack = [program]
  for region in sorted(regions, key=lambda r: (r.start, -r.end, not r.loop)):
    while stack[-1].end <= region.start:
      stack.pop()
    region.end = min(region.end, stack[-1].end)
    if region.end > region.start:
      stack[-1].inner.append(region)
      stack.append(region)
  return program
