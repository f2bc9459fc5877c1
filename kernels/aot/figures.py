"""Static figures of a schedule: cycles of a turn of the main loop, what is busy, a time.

What a turn of a loop costs depends on which of its regions are skipped. Assumed is:

- Regions with work for the matrix units run as often as the case says, or else in the share of
  turns that it says is active (the innermost of them counts); two that lie side by side and have
  the same such work are then two arms of one choice.
- Other regions (to start a DMA, to write a result) run once a sweep of the innermost grid axis, or
  in every turn where that axis is known at run time only.
- A pipelined loop has two turns more than the grid, which skip the kernel's body.
- Every DMA has landed when it is waited for.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kernels.aot.listing import FILL_AND_DRAIN, Region, Schedule
from kernels.chip import Chip

LIMITS = """What static figures cannot say:
- A wait for a DMA counts one cycle. The time of HBM stands beside that of the core; a real time is
  at least the larger one, with the start and the end of the pipeline on top.
- Turns of a loop that are known at run time only are those that the case's data would give, or the
  time is left out.
- Bank conflicts, misses of the instruction overlays, an uneven split over two cores, throttling and
  the real clock are not modelled; the clock is the one at which the peak is reached.
- They rank variants. None of them is a measured time."""

UNKNOWN = 2**31 - 1  # an axis of the grid that is known at run time only
BODY = 0.3  # of a pipelined loop's bundles: a region at least as long is the kernel's body


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of one kernel on one core."""

  name: str
  turn: float  # cycles of a turn of the main loop that does the work
  matrix: float  # share of those cycles that the matrix units are busy
  vector: float  # and the vector units
  spills: int  # stores of registers, in the whole listing
  fills: int  # and loads
  cycles: float  # of a call
  unknown: int  # loops whose turns nothing says; cycles count one turn of each
  vmem: int  # bytes


def measure(
  name: str,
  schedule: Schedule,
  *,
  active: float = 1.0,
  turns: Sequence[float] = (),
  kinds: Sequence[float] = (),
  vmem: int = 0,
) -> Figures:
  """The figures of a kernel.

  Args:
    name: of the kernel.
    schedule: of it.
    active: share of the turns that do the work.
    turns: of the loops whose turns are known at run time only, outer first.
    kinds: `Case.kinds`.
    vmem: bytes that it takes.

  Raises ValueError when there are not as many regions with matrix work as `kinds`.
  """
  model = _Model(schedule, name, kinds)
  unsaid = [region for region in schedule.program.walk() if region.loop and region.turns is None]
  for region, given in zip(unsaid, turns):
    region.turns = given
  units = schedule.units
  column = lambda unit: units.index(unit) if unit in units else None
  total = lambda unit: int(schedule.used[:, c].sum()) if (c := column(unit)) is not None else 0
  main = model.main_loop()
  turn = model.cost(main, 1.0)
  share = lambda unit: float(turn[1 + units.index(unit)] / schedule.capacity[units.index(unit)])
  return Figures(
    name=name,
    turn=float(turn[0]),
    matrix=share("MATMUL") / turn[0],
    vector=share("VALU") / turn[0],
    spills=total("VSTORE:SPILL"),
    fills=total("VLOAD:FILL"),
    cycles=float(model.cost(schedule.program, active)[0]),
    unknown=sum(region.turns is None for region in unsaid),
    vmem=vmem,
  )


class _Model:
  """Costs of regions: vectors of cycles and uses of each unit."""

  def __init__(self, schedule: Schedule, name: str = "", kinds: Sequence[float] = ()):
    cycles = np.ones((len(schedule.used), 1), np.int64)
    rows = np.concatenate([cycles, schedule.used], axis=1)
    self.until = np.concatenate([np.zeros_like(rows[:1]), rows.cumsum(0)])
    self.matmul = 1 + schedule.units.index("MATMUL")
    self.program = schedule.program
    known = schedule.grid and UNKNOWN not in schedule.grid
    self.sweep = schedule.grid[-1] if known else 1
    works = [region for region in self.program.walk() if self.innermost(region)]
    if kinds and len(kinds) != len(works):
      raise ValueError(f"{name}: expected {len(kinds)} regions of matrix work, found {len(works)}")
    self.kinds = {id(region): share for region, share in zip(works, kinds)}

  def plain(self, region: Region) -> np.ndarray:
    """Of its bundles, each once."""
    return self.until[region.end] - self.until[region.start]

  def work(self, region: Region) -> int:
    """Of the matrix units in its bundles."""
    return int(self.plain(region)[self.matmul])

  def innermost(self, region: Region) -> bool:
    """Whether it may be skipped and has work for the matrix units that no region in it has."""
    deeper = any(not r.loop and self.work(r) for r in region.walk()[1:])
    return not region.loop and self.work(region) > 0 and not deeper

  def cost(self, region: Region, active: float) -> np.ndarray:
    """Of running it once."""
    total = self.plain(region).astype(float)
    for inner in region.inner:
      total += self.weight(inner, region, active) * self.cost(inner, active) - self.plain(inner)
    return total

  def weight(self, region: Region, outer: Region, active: float) -> float:
    """How often it runs when `outer` runs once."""
    if region.loop:
      return 1.0 if region.turns is None else region.turns
    work = self.work(region)
    if not work:
      often = 1.0 / self.sweep
    elif id(region) in self.kinds:
      often = self.kinds[id(region)]
    else:
      often = active if self.innermost(region) else 1.0
      often /= sum(not r.loop and self.work(r) == work for r in outer.inner)
    turns = outer.turns or 0.0
    body = region.end - region.start > BODY * (outer.end - outer.start)
    if outer.pipelined and turns > FILL_AND_DRAIN and body:
      often *= (turns - FILL_AND_DRAIN) / turns
    return often

  def main_loop(self) -> Region:
    """The loop in which the matrix units do most, the outer one of two that are nested.

    A loop in it whose turns nothing says, and so counts as one, is looked into if it has most of
    the work. The whole program where there is no loop.
    """
    loops = [region for region in self.program.walk()[1:] if region.loop]
    work = lambda loop: self.cost(loop, 1.0)[self.matmul] * (loop.turns or 1.0)
    main = max(loops, key=work, default=self.program)
    while inner := [r for r in main.walk()[1:] if r.loop and r.turns is None]:
      best = max(inner, key=work)
      if 2 * work(best) < self.cost(main, 1.0)[self.matmul]:
        break
      main = best
    return main


def seconds(kernels: Sequence[Figures], chip: Chip) -> float | None:
  """That a device takes for kernels; None where turns of a loop are not known."""
  if any(figures.unknown for figures in kernels):
    return None
  return sum(figures.cycles for figures in kernels) / chip.clock


def roofline(flops: float, chip: Chip) -> float:
  """Seconds that the matrix units of a device take for `flops` at their peak."""
  return flops / (chip.bf16_flops * chip.device_share)


def memory_seconds(traffic: float, chip: Chip) -> float:
  """Seconds that a device's share of HBM takes for `traffic` bytes."""
  return traffic / (chip.hbm_bandwidth * chip.device_share)


def of_kernel(given: Mapping[str, Sequence[float]], kernel: str, chip: str = "") -> Sequence[float]:
  """The first whose words are each the chip or in the name of an instruction: "v5e flash" goes with
  "transpose_jvp_flash__.1" on v5e."""
  fits = lambda words: all(word == chip or word in kernel for word in words.split())
  return next((numbers for words, numbers in given.items() if fits(words)), ())
