"""What a plan may change of an experiment: mesh, ZeRO stage, rematerialisation, microbatches, slots
of the engine. None of them changes what is learned."""

import dataclasses
from collections.abc import Mapping

from pt_jax.experiment import Experiment, MeshShape, Offline, Online, Stage
from pt_jax.models.config import Remat
from pt_jax.plan.stage import model_of, work_of


@dataclasses.dataclass(frozen=True)
class Choice:
  """Changes to an experiment; None leaves what it says."""

  mesh: Mapping[str, int] | None = None  # axis -> size; `data` takes what is left
  zero: int | None = None
  remat: Remat | None = None
  microbatches: int | None = None  # of an update
  slots: int | None = None  # completions that an engine decodes at once

  def __str__(self) -> str:
    mesh = ",".join(f"{name}={size}" for name, size in (self.mesh or {}).items())
    names = [field.name for field in dataclasses.fields(self) if field.name != "mesh"]
    rest = {name: getattr(self, name) for name in names}
    options = [f"--{name} {value}" for name, value in rest.items() if value is not None]
    return " ".join([f"--mesh {mesh}"] * bool(mesh) + options)


def applied(experiment: Experiment, stage: Stage, choice: Choice) -> tuple[Experiment, Stage]:
  """The experiment and one of its stages with the changes.

  Raises ValueError for a change that the stage cannot have.
  """
  config = model_of(experiment)
  if choice.remat is not None:
    config = dataclasses.replace(config, remat=choice.remat)
  stage = _with_slots(_with_microbatches(stage, choice.microbatches), choice.slots)
  return dataclasses.replace(
    experiment,
    model=config,
    stages=tuple(stage if other.name == stage.name else other for other in experiment.stages),
    mesh=MeshShape(**choice.mesh) if choice.mesh is not None else experiment.mesh,
    zero=choice.zero or experiment.zero,
  ), stage


def _with_microbatches(stage: Stage, count: int | None) -> Stage:
  if count is None:
    return stage
  work = work_of(stage)
  rows = work.rows * work.microbatches
  if count < 1 or rows % count:
    raise ValueError(
      f"microbatches: expected a divisor of the {rows} rows of an update, found {count}"
    )
  if isinstance(stage, Online):
    return dataclasses.replace(stage, rows=rows // count)
  assert isinstance(stage, Offline)  # see `work_of`
  return dataclasses.replace(stage, microbatches=count)


def _with_slots(stage: Stage, count: int | None) -> Stage:
  if count is None:
    return stage
  if not isinstance(stage, Online):
    raise ValueError(f"slots: expected an Online stage, found {type(stage).__name__}")
  return dataclasses.replace(stage, slots=count)


def chosen(experiment: Experiment, stage: Stage, sizes: Mapping[str, int]) -> Choice:
  """What the experiment says on a mesh of these sizes, in full."""
  return Choice(
    mesh={name: size for name, size in sizes.items() if size > 1} or {"data": 1},
    zero=experiment.zero,
    remat=model_of(experiment).remat,
    microbatches=work_of(stage).microbatches,
    slots=stage.slots if isinstance(stage, Online) else None,
  )
