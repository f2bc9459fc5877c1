"""Compiles the programs of a stage for a slice."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from pt_jax.experiment import Experiment, Stage
from pt_jax.plan.choices import Choice, applied, chosen
from pt_jax.plan.depth import Line, extrapolated
from pt_jax.plan.measure import Measured, measure
from pt_jax.plan.program import Program
from pt_jax.plan.stage import model_of, train_programs
from pt_jax.plan.topology import Slice, mesh_on


@dataclasses.dataclass(frozen=True)
class Plan:
  """A stage on a slice."""

  experiment: Experiment
  stage: Stage
  piece: Slice
  choice: Choice  # in full
  programs: tuple[Measured, ...]

  @property
  def fits(self) -> bool:
    """Whether every program fits."""
    return all(one.memory.fits for one in self.programs)

  @property
  def worst(self) -> Measured:
    """The program that is nearest to what is usable, or farthest over it."""
    return max(self.programs, key=lambda one: (not one.memory.fits, one.memory.total))

  @property
  def seconds(self) -> float:
    """Of all calls of an update, or of a step of an online stage, one after the other."""
    return sum(one.program.calls * one.in_order for one in self.programs)

  @property
  def compiled(self) -> bool:
    """Whether XLA refused none of them."""
    return all(one.xla is not None for one in self.programs)

  @property
  def unknown(self) -> tuple[str, ...]:
    """Kernels that state no cost, and whose time is missing."""
    found = [one.xla for one in self.programs if one.xla is not None]
    return tuple({k.name for xla in found for k in xla.kernels if k.cost is None})


def plan_stage(
  experiment: Experiment,
  stage: Stage,
  piece: Slice,
  choice: Choice,
  *,
  tell: Callable[[str], None] = lambda text: None,
  first: Sequence[str] = (),
  engine_layers: int | None = None,
) -> Plan:
  """Compiles what `stage` runs on the slice, with the changes of `choice`.

  Args:
    experiment: its model, mesh and ZeRO stage are planned with, unless `choice` has others.
    stage: one of its stages.
    piece: the slice.
    choice: what is changed.
    tell: is told the name of each program that is being compiled.
    first: names of programs; where one of them does not fit, the others are not compiled.
    engine_layers: where the model has more, prefill and decode are compiled with half as many and
      with as many, and extrapolated.

  Raises ValueError for what does not divide, and where XLA fails for another reason than memory.
  """
  experiment, stage = applied(experiment, stage, choice)
  config = model_of(experiment)
  mesh = mesh_on(piece, dataclasses.asdict(experiment.mesh))
  measured: dict[str, Measured] = {}
  with jax.set_mesh(mesh):
    programs = train_programs(experiment, stage, mesh)
    for program in sorted(programs, key=lambda program: program.name not in first):
      tell(program.name)
      depths = _depths(program, config.layers, engine_layers)
      if depths is None:
        one = measure(program, piece, mesh)
      else:
        one = _at_depths(program, depths, experiment, stage, piece, mesh)
      measured[program.name] = one
      if first and not one.memory.fits:
        break
  ordered = tuple(measured[p.name] for p in programs if p.name in measured)
  return Plan(experiment, stage, piece, chosen(experiment, stage, mesh.shape), ordered)


def _depths(program: Program, layers: int, most: int | None) -> Line | None:
  if most is None or layers <= most or program.kind not in ("prefill", "decode"):
    return None
  if most < 2:
    raise ValueError(f"engine layers: expected at least 2, found {most}")
  return Line(most // 2, most, layers)


def _at_depths(
  program: Program,
  line: Line,
  experiment: Experiment,
  stage: Stage,
  piece: Slice,
  mesh: jax.sharding.Mesh,
) -> Measured:
  """A program of the engine, from the same of two models with fewer layers."""
  found = []
  for layers in (line.shallow, line.deep):
    model = dataclasses.replace(model_of(experiment), layers=layers)
    programs = train_programs(dataclasses.replace(experiment, model=model), stage, mesh)
    (same,) = (other for other in programs if other.name == program.name)
    found.append(measure(same, piece, mesh))
  if any(one.xla is None for one in found):
    return found[-1]  # it does not even fit with fewer
  shallow, deep = found
  return extrapolated(program, shallow, deep, line)
