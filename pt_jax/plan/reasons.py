"""Why a choice of a sweep stands where it does: one sentence each."""

from collections.abc import Mapping

from pt_jax.plan.compile import Plan
from pt_jax.plan.measure import Measured
from pt_jax.plan.page import GIB, seconds
from pt_jax.plan.sweep import Candidate, Pick, has_room
from pt_jax.plan.topology import Slice

NAMED = 0.05  # of the time: programs that take less are not named
RESOURCES = {"compute": "compute", "HBM traffic": "hbm", "exposed collectives": "exposed"}


def of_pick(pick: Pick, best: Pick) -> str:
  """Of a choice that was compiled: what does not fit, what takes the time of the best one, or what
  another needs more than that."""
  plan = pick.plan
  if not plan.fits:
    worst = plan.worst.memory
    over = f"{(worst.total - worst.usable) / GIB:.1f} GiB over"
    return f"does not fit: {plan.worst.program.name} is {over}, {_largest(worst.parts)}"
  if pick is best:
    return _what_takes_the_time(plan)
  return _difference(plan, best.plan)


def of_other(one: Candidate, best: Candidate, piece: Slice) -> str:
  """Of a mesh of which nothing was compiled, by closed forms: what does not fit, or what takes
  longer than on the best one."""
  if not has_room(one, piece):
    return f"no choice has room; of the smallest {_largest(one.forecast.parts)}"
  ours, theirs = one.forecast, best.forecast
  name, more = _most({n: ours.seconds[n] - theirs.seconds.get(n, 0.0) for n in ours.seconds})
  if name == "train step" and more > 0:
    resource, _ = _most({n: ours.binding[n] - theirs.binding[n] for n in ours.binding})
    name = f"{resource} of the train step"
  return f"{_slower(ours.time, theirs.time)}, most of it {name}" if more > 0 else "as fast"


def _what_takes_the_time(plan: Plan) -> str:
  parts = []
  for one in sorted(plan.programs, key=lambda one: -_all_calls(one, "in_order")):
    share = _all_calls(one, "in_order") / plan.seconds
    if one.xla and share >= NAMED:
      parts.append(f"{one.program.name} takes {share:.0%}, bound by {one.xla.roofline.binding}")
  exposed = sum(_all_calls(one, "exposed") for one in plan.programs) / plan.seconds
  return f"{'; '.join(parts)}; collectives that nothing runs beside are {exposed:.0%} of all"


def _difference(plan: Plan, best: Plan) -> str:
  """The program that takes most more than in the best plan, and the resource that it needs most
  more of."""
  before = {one.program.name: one for one in best.programs}
  name, more = _most(
    {
      one.program.name: _all_calls(one, "in_order")
      - _all_calls(before[one.program.name], "in_order")
      for one in plan.programs
    }
  )
  (one,) = (one for one in plan.programs if one.program.name == name)
  label, extra = _most(
    {
      label: _all_calls(one, field) - _all_calls(before[name], field)
      for label, field in RESOURCES.items()
    }
  )
  where = f"{name} {seconds(more)} longer"
  cause = f", with {seconds(extra)} more of {label}" if extra > 0 else ""
  return f"{_slower(plan.seconds, best.seconds)}: {where}{cause}"


def _all_calls(one: Measured, field: str) -> float:
  """Seconds of a program's calls in an update; of one resource."""
  return one.program.calls * (getattr(one.xla.roofline, field) if one.xla else 0.0)


def _slower(time: float, best: float) -> str:
  return f"{time / best - 1:.1%} slower than 1"


def _most(parts: Mapping[str, float]) -> tuple[str, float]:
  return max(parts.items(), key=lambda part: part[1])


def _largest(parts: Mapping[str, int]) -> str:
  name, size = _most(parts)
  return f"{size / GIB:.1f} GiB are {name}"
