"""Static schedules of the kernels of a program, from the checked-in budget: those of a named shape
for the same chip, as `python -m kernels.schedule` measured them."""

import dataclasses
import re

from kernels.aot import budget


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Of one kernel."""

  case: str  # "flash_attention causal_4096 v5e", as the budget calls it
  turn: float  # cycles of a turn of the main loop
  cycles: float | None  # of a call at the shape of the case; None where only data says its turns
  spills: int  # stores of registers


def schedule_of(kernel: str, chip: str, kind: str = "") -> Schedule | None:
  """The schedule of a kernel on a chip.

  Args:
    kernel: its name.
    chip: the chip's.
    kind: of the program that it is in; a case that is named after it is preferred.

  Returns None where the budget has none, or another compiler's.
  """
  known = budget.read()
  if known["versions"] != budget.versions():
    return None
  found = [
    Schedule(
      case,
      figures["turn"],
      None if figures["unknown"] else figures["cycles"],
      int(figures["spills"]),
    )
    for case, kernels in known["cases"].items()
    for name, figures in kernels.items()
    if case.endswith(f" {chip}") and _is(kernel, name)
  ]
  return min(found, key=lambda one: not (kind and f" {kind}_" in one.case), default=None)


def _is(kernel: str, name: str) -> bool:
  """Whether XLA would call a kernel so: "transpose_jvp_NAME__.1" is one of NAME."""
  return re.fullmatch(rf"(?:.*_)?{re.escape(kernel)}_*(?:\.\d+)?", name) is not None
