"""Choices of mesh, ZeRO stage, rematerialisation and microbatches for a stage on a slice: ordered
by closed forms, the best compiled, ranked by what the compiled programs take."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Iterator

from pt_jax.experiment import Experiment, Stage
from pt_jax.models.config import Remat
from pt_jax.plan.choices import Choice, applied
from pt_jax.plan.compile import Plan, plan_stage
from pt_jax.plan.forecast import Forecast, forecast
from pt_jax.plan.measure import Measured
from pt_jax.plan.memory import MARGIN
from pt_jax.plan.stage import check_mesh, work_of
from pt_jax.plan.topology import Slice, mesh_on

ROOM = 1.25  # a forecast of temporaries may be too large by so much


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A choice and what closed forms say of it."""

  choice: Choice
  forecast: Forecast


@dataclasses.dataclass(frozen=True)
class Pick:
  """A candidate that was compiled."""

  candidate: Candidate
  plan: Plan


@dataclasses.dataclass(frozen=True)
class Sweep:
  """All that was looked at."""

  considered: int  # choices that divide the model and the rows
  roomy: int  # of those, the ones that closed forms let fit
  picks: tuple[Pick, ...]  # compiled: what fits first, then by time
  refused: tuple[tuple[Candidate, str], ...] = ()  # what the compiler fails on, and its words


def sweep(
  experiment: Experiment,
  stage: Stage,
  piece: Slice,
  fixed: Choice,
  count: int,
  tell: Callable[[str], None] = lambda text: None,
  engine_layers: int | None = None,
) -> Sweep:
  """Compiles the `count` choices that closed forms put first.

  Args:
    experiment: gives what is not chosen.
    stage: one of its stages.
    piece: the slice.
    fixed: what is not None here is the same in every choice.
    count: choices that are compiled.
    tell: is told what is being compiled.
    engine_layers: see `plan_stage`.

  Raises ValueError when no choice divides the model and the rows, or none has room.
  """
  found = candidates(experiment, stage, piece, fixed)
  fitting = [c for c in found if _fits(c.forecast, piece)]
  if not fitting:
    least = min(found, key=lambda c: c.forecast.total)
    raise ValueError(
      f"sweep: none of {len(found)} choices has room by closed forms; the smallest, "
      f"{least.choice}, needs {least.forecast.total / 2**30:.1f} GiB a device"
    )
  picks, refused = [], []
  for number, candidate in enumerate(fitting[:count]):
    say = lambda name, n=number, c=candidate: tell(f"{n + 1} of {count}, {c.choice}: {name}")
    try:
      plan = plan_stage(
        *(experiment, stage, piece, candidate.choice), tell=say, engine_layers=engine_layers
      )
    except ValueError as error:  # the compiler fails for another reason than memory
      tell(f"{candidate.choice}: {error}")
      refused.append((candidate, str(error)))
      continue
    picks.append(Pick(candidate, plan))
  if not picks:
    raise ValueError(f"sweep: {refused[-1][0].choice}: {refused[-1][1]}")
  picks.sort(key=lambda pick: (not pick.plan.fits, pick.plan.seconds))
  return Sweep(len(found), len(fitting), tuple(picks), tuple(refused))


def candidates(
  experiment: Experiment, stage: Stage, piece: Slice, fixed: Choice
) -> list[Candidate]:
  """Every choice that divides the model and the rows, the fastest by closed forms first; of those
  that take the same time, the smallest.

  Raises ValueError when there is none.
  """
  found, why = [], ""
  for sizes in _meshes(len(piece.devices), fixed):
    mesh = mesh_on(piece, sizes)
    for zero, remat, count in _options(stage, fixed):
      if zero > 1 and mesh.shape["data"] == 1:
        continue  # nothing to split
      choice = Choice(sizes, zero, remat, count, fixed.slots)
      try:
        changed = applied(experiment, stage, choice)
        check_mesh(*changed, mesh)
      except ValueError as error:
        why = str(error)
        continue
      found.append(Candidate(choice, forecast(*changed, piece, mesh)))
  if not found:
    raise ValueError(f"sweep: no choice divides the model and the rows; the last one: {why}")
  return sorted(found, key=lambda c: (round(c.forecast.time, 6), c.forecast.total))


def _fits(found: Forecast, piece: Slice) -> bool:
  return found.total / ROOM + MARGIN <= piece.chip.usable_hbm


def _meshes(devices: int, fixed: Choice) -> Iterator[dict[str, int]]:
  """Powers of two for context and tensor, and where both are 1 for expert, which is then one more
  axis of the batch; data is what is left."""
  if fixed.mesh is not None:
    yield dict(fixed.mesh)
    return
  powers = [1 << i for i in range(devices.bit_length()) if devices % (1 << i) == 0]
  for context, tensor in itertools.product(powers, powers):
    if devices % (context * tensor) == 0:
      yield {"data": devices // (context * tensor), "context": context, "tensor": tensor}
  yield from ({"data": devices // n, "expert": n} for n in powers if 1 < n < devices)


def _options(stage: Stage, fixed: Choice) -> Iterator[tuple[int, Remat, int]]:
  work = work_of(stage)
  counts = _powers(work.rows * work.microbatches)
  yield from itertools.product(
    (fixed.zero,) if fixed.zero else (1, 2, 3),
    (fixed.remat,) if fixed.remat else typing.get_args(Remat),
    (fixed.microbatches,) if fixed.microbatches else counts,
  )


def _powers(rows: int) -> list[int]:
  """Powers of two that divide the rows of an update."""
  return [1 << i for i in range(int(math.log2(rows)) + 1) if rows % (1 << i) == 0]


def reason(pick: Pick, best: Pick) -> str:
  """Why a pick stands where it does, in one sentence."""
  plan = pick.plan
  if not plan.fits:
    worst = plan.worst
    name = max(worst.memory.parts, key=lambda part: worst.memory.parts[part])
    over = (worst.memory.total - worst.memory.usable) / 2**30
    return f"does not fit: {worst.program.name} is {over:.1f} GiB over, most of it {name}"
  slowest = _slowest(plan)
  share = slowest.program.calls * slowest.in_order / plan.seconds
  roof = slowest.xla.roofline if slowest.xla else None
  where = f"{slowest.program.name} takes {share:.0%} of it, bound by {roof.binding}" if roof else ""
  if pick is best:
    exposed = roof.exposed / roof.in_order if roof else 0.0
    return f"{where}; collectives that nothing runs beside are {exposed:.0%} of its time"
  return f"{where}; {_difference(plan, best.plan)}"


def _difference(plan: Plan, best: Plan) -> str:
  """Of which resource a plan needs more than the best one."""
  total = lambda p, name: sum(
    one.program.calls * getattr(one.xla.roofline, name) for one in p.programs if one.xla
  )
  more = {
    label: total(plan, name) - total(best, name)
    for label, name in (
      ("compute", "compute"),
      ("HBM traffic", "hbm"),
      ("exposed collectives", "exposed"),
    )
  }
  label = max(more, key=lambda name: more[name])
  return f"{more[label]:+.3f} s of {label} beside the best"


def _slowest(plan: Plan) -> Measured:
  return max(plan.programs, key=lambda one: one.program.calls * one.in_order)
