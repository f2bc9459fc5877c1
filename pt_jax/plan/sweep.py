"""Choices of mesh, ZeRO stage, rematerialisation and microbatches for a stage on a slice: ordered
by closed forms, the first compiled, ranked by what the compiled programs take."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Sequence

from pt_jax.experiment import Experiment, Stage
from pt_jax.models.config import Remat
from pt_jax.plan.choices import Choice, applied, chosen
from pt_jax.plan.compile import Plan, plan_stage
from pt_jax.plan.forecast import Forecast, forecast
from pt_jax.plan.memory import MARGIN, TEMPORARIES
from pt_jax.plan.stage import check_mesh, work_of
from pt_jax.plan.topology import Slice, mesh_on

ROOM = 1.25  # a forecast of temporaries may be too large by so much
# Closed forms are no finer: each choice before it on the same mesh puts one behind as if it took so
# much longer, or all that is compiled may differ in remat and microbatches alone.
SPREAD = 0.1
# Nothing here knows how long transfers to the host take.
RANKED = tuple(remat for remat in typing.get_args(Remat) if remat != "offload")
TRIES = 2  # for each choice asked for, where the compiler fails on some


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
  own: bool = False  # what the experiment says


@dataclasses.dataclass(frozen=True)
class Sweep:
  """All that was looked at."""

  considered: int  # choices that divide the model and the rows
  roomy: int  # of those, the ones that closed forms let fit
  picks: tuple[Pick, ...]  # compiled: what fits first, then by time
  refused: tuple[tuple[Candidate, str], ...]  # what the compiler fails on, and its words
  # Of every mesh of which nothing was compiled: the first that has room, or else the smallest.
  others: tuple[Candidate, ...]


def sweep(
  experiment: Experiment,
  stage: Stage,
  piece: Slice,
  fixed: Choice,
  count: int,
  tell: Callable[[str], None] = lambda text: None,
  engine_layers: int | None = None,
) -> Sweep:
  """Compiles the `count` choices that come first (see `in_turn`) and that the compiler takes, and
  the experiment's own to compare them with, where it has room.

  Args:
    experiment: gives what is not chosen.
    stage: one of its stages.
    piece: the slice.
    fixed: what is not None here is the same in every choice.
    count: choices that are compiled.
    tell: is told what is being compiled.
    engine_layers: see `plan_stage`.

  Raises ValueError when no choice divides the model and the rows, none has room, or the compiler
  fails on all that were tried.
  """
  found = candidates(experiment, stage, piece, fixed)
  fitting = [c for c in found if has_room(c, piece)]
  if not fitting:
    least = min(found, key=lambda c: c.forecast.total)
    raise ValueError(
      f"sweep: none of {len(found)} choices has room by closed forms; the smallest, "
      f"{least.choice}, needs {least.forecast.total / 2**30:.1f} GiB a device"
    )
  own = _own(fitting, experiment, stage, piece, fixed)
  picks, refused = [], []

  def compile_one(candidate: Candidate) -> None:
    say = lambda name: tell(f"{len(picks) + 1} of {count}, {candidate.choice}: {name}")
    options = {"tell": say, "first": ("train step",), "engine_layers": engine_layers}
    try:
      plan = plan_stage(experiment, stage, piece, candidate.choice, **options)
    except ValueError as error:  # the compiler fails for another reason than memory
      refused.append((candidate, str(error)))
    else:
      picks.append(Pick(candidate, plan, candidate is own))

  for candidate in in_turn(fitting)[: TRIES * count]:
    if len(picks) < count:
      compile_one(candidate)
  tried = [pick.candidate for pick in picks] + [one for one, _ in refused]
  if own is not None and own not in tried:
    compile_one(own)
    tried.append(own)
  if not picks:
    raise ValueError(
      f"sweep: the compiler fails on all of {len(refused)} choices; "
      f"{refused[0][0].choice}: {refused[0][1]}"
    )
  picks.sort(key=lambda pick: (not pick.plan.fits, pick.plan.seconds))
  others = _others(found, fitting, tried)
  return Sweep(len(found), len(fitting), tuple(picks), tuple(refused), others)


def _own(
  found: Sequence[Candidate], experiment: Experiment, stage: Stage, piece: Slice, fixed: Choice
) -> Candidate | None:
  """What the experiment says where `fixed` does not, if it is among the candidates."""
  try:
    changed, stage = applied(experiment, stage, fixed)
    mesh = mesh_on(piece, dataclasses.asdict(changed.mesh))
  except ValueError:  # a mesh for another slice
    return None
  say = chosen(changed, stage, mesh.shape)
  wide = lambda c: {axis: size for axis, size in (c.mesh or {}).items() if size > 1}
  key = lambda c: (wide(c), c.zero, c.remat, c.microbatches)
  return next((one for one in found if key(one.choice) == key(say)), None)


def in_turn(found: Sequence[Candidate]) -> list[Candidate]:
  """Candidates, the fastest of each mesh first, in the order in which they are tried: by time,
  with `SPREAD` of it on top for each that is before it on the same mesh."""
  before: dict[str, int] = {}
  keys = []
  for one in found:
    rank = before.get(_mesh(one), 0)
    before[_mesh(one)] = rank + 1
    keys.append(one.forecast.time * (1 + SPREAD * rank))
  return [found[i] for i in sorted(range(len(found)), key=keys.__getitem__)]


def _mesh(one: Candidate) -> str:
  return str(Choice(one.choice.mesh))


def _others(
  found: Sequence[Candidate], fitting: Sequence[Candidate], tried: Sequence[Candidate]
) -> tuple[Candidate, ...]:
  """See `Sweep.others`."""
  seen = {_mesh(one) for one in tried}
  kept: dict[str, Candidate] = {}
  for one in (*fitting, *sorted(found, key=lambda c: c.forecast.total)):
    if _mesh(one) not in seen:
      kept.setdefault(_mesh(one), one)
  return tuple(kept.values())


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


def has_room(one: Candidate, piece: Slice) -> bool:
  """Whether it may fit: what is resident is exact, temporaries may turn out smaller."""
  parts = one.forecast
  need = parts.total - parts.parts[TEMPORARIES] * (1 - 1 / ROOM)
  return need + MARGIN <= piece.chip.usable_hbm


def _meshes(devices: int, fixed: Choice) -> Iterator[dict[str, int]]:
  """Powers of two for context and tensor, and where both are 1 for expert, which is then one more
  axis of the batch; data is what is left."""
  if fixed.mesh is not None:
    yield dict(fixed.mesh)
    return
  powers = [1 << i for i in range(devices.bit_length()) if devices % (1 << i) == 0]
  for context, tensor in itertools.product(powers, powers):
    if devices % (context * tensor) == 0:
      sizes = {"context": context, "tensor": tensor}
      wide = {axis: size for axis, size in sizes.items() if size > 1}
      yield {"data": devices // (context * tensor), **wide}
  yield from ({"data": devices // n, "expert": n} for n in powers if 1 < n < devices)


def _options(stage: Stage, fixed: Choice) -> Iterator[tuple[int, Remat, int]]:
  work = work_of(stage)
  counts = _powers(work.rows * work.microbatches)
  yield from itertools.product(
    (fixed.zero,) if fixed.zero else (1, 2, 3),
    (fixed.remat,) if fixed.remat else RANKED,
    (fixed.microbatches,) if fixed.microbatches else counts,
  )


def _powers(rows: int) -> list[int]:
  """Powers of two that divide the rows of an update."""
  return [1 << i for i in range(int(math.log2(rows)) + 1) if rows % (1 << i) == 0]
