"""Static schedules of the kernels of a program, from the checked-in budget: those of a named shape
for the same chip, as `python -m kernels.schedule` measured them."""

import dataclasses

from kernels.aot import budget


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Of one kernel."""

  case: str  # "flash_attention causal_4096 v5e", as the budget calls it
  turn: float  # cycles of a turn of the main loop
  cycles: float  # of a call at the shape of the case
  spills: int  # stores of registers


def schedule_of(kernel: str, chip: str) -> Schedule | None:
  """The schedule of a kernel on a chip; None where the budget has none, or another compiler's."""
  known = budget.read()
  if known["versions"] != budget.versions():
    return None
  for case, found in known["cases"].items():
    for name, figures in found.items():
      if case.endswith(f" {chip}") and kernel in name:
        return Schedule(case, figures["turn"], figures["cycles"], int(figures["spills"]))
  return None
