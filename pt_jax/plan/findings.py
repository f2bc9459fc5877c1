"""Advice and sweeps as text."""

from pt_jax.plan.advice import Advice
from pt_jax.plan.compile import Plan
from pt_jax.plan.page import GIB, columns, seconds
from pt_jax.plan.sweep import Sweep, reason

LARGEST = 3  # residents that are named


def advice_text(advice: Advice, plan: Plan) -> str:
  """What does not fit, and what a compiled change makes of it."""
  lines = [""]
  if not plan.fits:
    worst = plan.worst
    parts = sorted(worst.memory.parts.items(), key=lambda part: -part[1])[:LARGEST]
    named = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
    over = (worst.memory.total - worst.memory.usable) / GIB
    lines.append(f"{worst.program.name} is {over:.2f} GiB over; the largest residents: {named}")
  if advice.over:
    named = [f"{c.options} ({c.bytes / GIB:.1f} GiB)" for c in advice.over]
    lines.append(f"would not fit, by closed forms scaled to this plan: {', '.join(named)}")
  for change, new in advice.tried:
    lines.append(f"compiled {change.options}: {_outcome(new, plan)}")
  if advice.found is not None:
    lines.append(f"advice: {advice.found[0].options}")
  elif not plan.fits:
    lines.append("advice: none of the changes that were compiled fits")
  return "\n".join(lines)


def _outcome(new: Plan, plan: Plan) -> str:
  memory = new.worst.memory
  used = f"{memory.total / GIB:.2f} of {memory.usable / GIB:.2f} GiB"
  if not new.fits:
    return f"does not fit, {used} in {new.worst.program.name}"
  faster = f", {seconds(plan.seconds)} without it" if plan.compiled else ""
  return f"fits, {used}, {seconds(new.seconds)} in order{faster}"


def sweep_text(sweep: Sweep) -> str:
  """The table of what was compiled, and a sentence for each."""
  head = ("", "choice", "GiB", "of", "in order", "closed form", "")
  rows, reasons = [head], []
  best = sweep.picks[0]
  for number, pick in enumerate(sweep.picks, 1):
    memory, closed = pick.plan.worst.memory, pick.candidate.forecast
    time = seconds(pick.plan.seconds) if pick.plan.compiled else "-"
    fits = "" if pick.plan.fits else "does not fit"
    used = (f"{memory.total / GIB:.2f}", f"{memory.usable / GIB:.2f}")
    rows.append((f"{number}", str(pick.plan.choice), *used, time, seconds(closed.time), fits))
    reasons.append(f"  {number}: {reason(pick, best)}")
  lines = [
    f"{sweep.considered:,} choices divide the model and the rows, {sweep.roomy:,} have room by "
    f"closed forms; the first {len(sweep.picks)} were compiled",
    *columns(rows),
    *reasons,
  ]
  unknown = {name for pick in sweep.picks for name in pick.plan.unknown}
  if unknown:
    lines.append(f"  without the time of kernels that state no cost: {', '.join(sorted(unknown))}")
  return "\n".join(lines)
