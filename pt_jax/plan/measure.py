"""Compiles one program and measures it."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from pt_jax.plan import collectives, cost, hlo, memory
from pt_jax.plan.collectives import Collective
from pt_jax.plan.cost import Kernel
from pt_jax.plan.memory import Memory
from pt_jax.plan.program import Program
from pt_jax.plan.roofline import Roofline, roofline
from pt_jax.plan.topology import Slice


@dataclasses.dataclass(frozen=True)
class Measured:
  """One compiled program."""

  program: Program
  memory: Memory
  seconds: float  # tracing, lowering and compiling took
  xla: "Analysis | None"  # None where XLA refused it
  depths: tuple[int, ...] = ()  # layers that were compiled, where not all were

  @property
  def in_order(self) -> float:
    """Seconds of one call, no two operations at a time; 0 where XLA refused it."""
    return 0.0 if self.xla is None else self.xla.roofline.in_order


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What the scheduled HLO says, of one device."""

  flops: float
  bytes: float
  collectives: tuple[Collective, ...]
  kernels: tuple[Kernel, ...]
  roofline: Roofline


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
  """What a scheduled module costs. A kernel costs what the program says of it, or what it states
  itself."""
  module, trips, own = hlo.parse(text), program.trips, program.kernel
  operations, kernels = cost.operations(module, trips), cost.kernels(module, trips)
  if own is not None:
    kernels = [dataclasses.replace(kernel, cost=own) for kernel in kernels]
    known = lambda op: dataclasses.replace(op, cost=own) if cost.is_kernel(op.instruction) else op
    operations = [known(op) for op in operations]
  found = collectives.collectives(module, mesh.shape, trips)
  return Analysis(
    flops=sum(op.cost.flops * op.runs for op in operations),
    bytes=sum(op.cost.bytes * op.runs for op in operations),
    collectives=tuple(found),
    kernels=tuple(kernels),
    roofline=roofline(operations, found, program.model_flops, piece, mesh),
  )
