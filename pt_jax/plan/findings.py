"""Advice and sweeps as text."""

from pt_jax.plan import reasons
from pt_jax.plan.advice import Advice
from pt_jax.plan.compile import Plan
from pt_jax.plan.page import GIB, columns, seconds
from pt_jax.plan.sweep import Sweep, has_room
from pt_jax.plan.topology import Slice

LARGEST = 3  # residents that are named


def advice_text(advice: Advice, plan: Plan) -> str:
  """What does not fit, and what a compiled change makes of it."""
  lines = [""]
  worst = plan.worst
  parts = sorted(worst.memory.parts.items(), key=lambda part: -part[1])[:LARGEST]
  named = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
  left = (worst.memory.usable - worst.memory.total) / GIB
  room = f"leaves {left:.2f} GiB free" if plan.fits else f"is {-left:.2f} GiB over"
  lines.append(f"{worst.program.name} {room}; the largest residents: {named}")
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


def sweep_text(sweep: Sweep, piece: Slice) -> str:
  """The table of what was compiled, a sentence for each, and one for every other mesh."""
  head = ("", "choice", "GiB", "of", "in order", "closed form", "")
  rows, best = [head], sweep.picks[0]
  for number, pick in enumerate(sweep.picks, 1):
    memory, closed = pick.plan.worst.memory, pick.candidate.forecast
    time = seconds(pick.plan.seconds) if pick.plan.fits else "-"
    notes = ["does not fit"] * (not pick.plan.fits) + ["the experiment's own"] * pick.own
    used = (f"{memory.total / GIB:.2f}", f"{memory.usable / GIB:.2f}")
    rows.append(
      (f"{number}", str(pick.plan.choice), *used, time, seconds(closed.time), ", ".join(notes))
    )
  lines = [
    f"{sweep.considered:,} choices divide the model and the rows, {sweep.roomy:,} have room by "
    f"closed forms; {len(sweep.picks)} compiled, {len(sweep.refused)} that the compiler fails on",
    *columns(rows),
    *(f"  {n}: {reasons.of_pick(pick, best)}" for n, pick in enumerate(sweep.picks, 1)),
    *(f"  the compiler fails on {c.choice}: {_one_line(why)}" for c, why in sweep.refused),
  ]
  unknown = {name for pick in sweep.picks for name in pick.plan.unknown}
  if unknown:
    lines.append(f"  without the time of kernels that state no cost: {', '.join(sorted(unknown))}")
  return "\n".join([*lines, *_others(sweep, piece)])


def _others(sweep: Sweep, piece: Slice) -> list[str]:
  """The first of each mesh of which nothing was compiled."""
  best, rows = sweep.picks[0].candidate, []
  for one in sweep.others:
    closed = one.forecast
    time = seconds(closed.time) if has_room(one, piece) else "-"
    why = reasons.of_other(one, best, piece)
    rows.append((str(one.choice), f"{closed.total / GIB:.2f} GiB", time, why))
  head = "other meshes, not compiled: by closed forms the first that has room on each"
  return [head, *columns(rows)] if rows else []


def _one_line(text: str) -> str:
  return " ".join(text.split())
