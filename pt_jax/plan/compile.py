"""Compiles the programs of a stage for a slice and measures them."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from pt_jax.experiment import Experiment, Stage
from pt_jax.plan import collectives, cost, hlo, memory
from pt_jax.plan.choices import Choice, applied, chosen
from pt_jax.plan.collectives import Collective
from pt_jax.plan.cost import Kernel
from pt_jax.plan.memory import Memory
from pt_jax.plan.programs import Program, train_programs
from pt_jax.plan.roofline import Roofline, roofline
from pt_jax.plan.topology import Slice, mesh_on


@dataclasses.dataclass(frozen=True)
class Measured:
  """One compiled program."""

  program: Program
  memory: Memory
  seconds: float  # tracing, lowering and compiling took
  xla: "Analysis | None"  # None where XLA refused it


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What the scheduled HLO says, of one device."""

  flops: float
  bytes: float
  collectives: tuple[Collective, ...]
  kernels: tuple[Kernel, ...]
  roofline: Roofline


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


def plan_stage(experiment: Experiment, stage: Stage, piece: Slice, choice: Choice) -> Plan:
  """Compiles what `stage` runs on the slice, with the changes of `choice`.

  Raises ValueError for what does not divide, and where XLA fails for another reason than memory.
  """
  experiment, stage = applied(experiment, stage, choice)
  sizes = dataclasses.asdict(experiment.mesh)
  mesh = mesh_on(piece, sizes)
  with jax.set_mesh(mesh):
    programs = train_programs(experiment, stage, mesh)
    measured = tuple(measure(program, piece, mesh) for program in programs)
  return Plan(experiment, stage, piece, chosen(experiment, stage, mesh.shape), measured)


def measure(program: Program, piece: Slice, mesh: jax.sharding.Mesh) -> Measured:
  """Compiles one program. Raises ValueError where XLA fails for another reason than memory."""
  start = time.perf_counter()
  lowered = program.lower()
  usable = piece.chip.usable_hbm
  try:
    compiled, text = _compiled(lowered)
  except jax.errors.JaxRuntimeError as error:
    refusal = memory.refused(program, str(error), usable)
    if refusal is None:
      raise ValueError(f"{program.name}: XLA: {str(error).splitlines()[0]}") from error
    return Measured(program, refusal, time.perf_counter() - start, None)
  seconds = time.perf_counter() - start
  held = memory.measure(program, compiled, usable)
  return Measured(program, held, seconds, analyse(text, program, piece, mesh))


def _compiled(lowered: Any) -> tuple[Any, str]:
  """The executable and its scheduled HLO, as libtpu writes it: what JAX is handed, it cannot always
  print (jaxlib 0.10.2 stops at an async-update of several operands)."""
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=dump)
    (path,) = Path(folder).glob("*.after_optimizations.txt")
    return compiled, path.read_text()


def analyse(text: str, program: Program, piece: Slice, mesh: jax.sharding.Mesh) -> Analysis:
  """What a scheduled module costs. Loops whose trip count is data are those over microbatches."""
  module, trips = hlo.parse(text), program.microbatches
  operations = cost.operations(module, trips)
  found = collectives.collectives(module, mesh.shape, trips)
  return Analysis(
    flops=sum(op.cost.flops * op.runs for op in operations),
    bytes=sum(op.cost.bytes * op.runs for op in operations),
    collectives=tuple(found),
    kernels=tuple(cost.kernels(module, trips)),
    roofline=roofline(operations, found, program.model_flops, piece, mesh),
  )
