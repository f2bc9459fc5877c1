"""What to change of a plan that does not fit, or that leaves much of the memory free. Closed forms,
scaled to what was compiled, order the changes; advice is only what was then compiled and holds."""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator

from pt_jax.experiment import Experiment, Stage
from pt_jax.models.config import Remat
from pt_jax.plan.choices import Choice, applied
from pt_jax.plan.compile import Plan, plan_stage
from pt_jax.plan.forecast import forecast
from pt_jax.plan.memory import MARGIN, TEMPORARIES
from pt_jax.plan.stage import check_mesh
from pt_jax.plan.topology import mesh_on

FREE = 0.5  # of the usable memory: a plan that leaves more is looked at for a faster one
SLOWER = ("none", "projections", "heads", "attention", "block", "offload")  # keep less and less
assert set(SLOWER) == set(typing.get_args(Remat))


@dataclasses.dataclass(frozen=True)
class Change:
  """A plan that differs from another in a few options."""

  options: str  # as launch.plan takes them
  choice: Choice
  count: int  # of options
  bytes: int  # of a device, by closed forms scaled to the other plan
  seconds: float  # by closed forms


@dataclasses.dataclass(frozen=True)
class Advice:
  """What was found for a plan."""

  over: tuple[Change, ...]  # single changes that would not fit, by closed forms
  tried: tuple[tuple[Change, Plan], ...]  # compiled, in this order
  found: tuple[Change, Plan] | None  # the last of them, if it fits (and is faster, where one did)


def advise(
  plan: Plan,
  experiment: Experiment,
  stage: Stage,
  count: int,
  tell: Callable[[str], None] = lambda text: None,
  engine_layers: int | None = None,
) -> Advice:
  """Looks for a change that makes a plan fit; where it fits and leaves much free, for a faster one.

  Args:
    plan: of `stage`.
    experiment: as the config function returned it.
    stage: one of its stages.
    count: changed plans that are compiled at most.
    tell: is told what is being compiled.
    engine_layers: see `plan_stage`.
  """
  usable = plan.piece.chip.usable_hbm
  found = sorted(changes(plan, experiment, stage), key=lambda c: (c.count, c.seconds))
  over = tuple(c for c in found if c.count == 1 and c.bytes > usable)
  rooms = [c for c in found if c.bytes + MARGIN <= usable]
  if plan.fits:
    wasted = plan.worst.memory.total < FREE * usable
    now = _closed(plan, plan.choice, experiment, stage)[1]
    rooms = sorted((c for c in rooms if c.seconds < now), key=lambda c: c.seconds) if wasted else []
  tried, culprits = [], tuple(p.program.name for p in plan.programs if not p.memory.fits)
  for change in rooms[:count]:
    say = lambda name, c=change: tell(f"advice {c.options}: {name}")
    new = plan_stage(
      *(experiment, stage, plan.piece, change.choice),
      tell=say,
      first=culprits,
      engine_layers=engine_layers,
    )
    tried.append((change, new))
    if new.fits and (not plan.fits or new.seconds < plan.seconds):
      return Advice(over, tuple(tried), tried[-1])
  return Advice(over, tuple(tried), None)


def changes(plan: Plan, experiment: Experiment, stage: Stage) -> list[Change]:
  """Plans that differ in one option or two, and divide the model and the rows."""
  singles = list(_singles(plan.choice))
  pairs = ((a | b) for a, b in itertools.combinations(singles, 2) if not a.keys() & b.keys())
  found = []
  for fields in (*singles, *pairs):
    choice = dataclasses.replace(plan.choice, **fields)
    try:
      size, seconds = _closed(plan, choice, experiment, stage)
    except ValueError:
      continue
    found.append(Change(str(Choice(**fields)), choice, len(fields), size, seconds))
  return found


def _singles(choice: Choice) -> Iterator[dict[str, typing.Any]]:
  """Options that take or save memory, one at a time."""
  yield from ({"zero": zero} for zero in (1, 2, 3) if zero != choice.zero)
  yield from ({"remat": remat} for remat in SLOWER if remat != choice.remat)
  count, mesh = choice.microbatches or 1, {"data": 1} | dict(choice.mesh or {})
  yield from ({"microbatches": n} for n in (count // 4, count // 2, 2 * count, 4 * count) if n)
  for axis in ("tensor", "context"):
    wide = mesh.get(axis, 1)
    if mesh["data"] % 2 == 0:
      yield {"mesh": mesh | {"data": mesh["data"] // 2, axis: 2 * wide}}
    if wide % 2 == 0:
      yield {"mesh": mesh | {"data": mesh["data"] * 2, axis: wide // 2}}
  if choice.slots:
    yield from ({"slots": n} for n in (choice.slots // 4, choice.slots // 2, 2 * choice.slots))


def _closed(plan: Plan, choice: Choice, experiment: Experiment, stage: Stage) -> tuple[int, float]:
  """(bytes, seconds) by closed forms, the temporaries scaled by what those of `plan` turned out."""
  changed, piece = applied(experiment, stage, choice), plan.piece
  mesh = mesh_on(piece, choice.mesh or {})
  check_mesh(*changed, mesh)
  new = forecast(*changed, piece, mesh)
  old = forecast(plan.experiment, plan.stage, piece, mesh_on(piece, plan.choice.mesh or {}))
  train = next((p for p in plan.programs if p.program.kind == "train"), plan.worst)
  scale = train.memory.parts.get(TEMPORARIES, 0) / old.parts[TEMPORARIES]
  return int(new.total + new.parts[TEMPORARIES] * (scale - 1)), new.time
