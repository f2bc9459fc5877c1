"""Programs of a deep model from those of two shallow ones. The engine's blocks are not scanned, so
its programs take as long to compile as there are blocks; all are alike, and every figure is linear
in their number."""

import dataclasses
from collections.abc import Sequence

from pt_jax.plan.collectives import Collective
from pt_jax.plan.cost import Kernel
from pt_jax.plan.measure import Analysis, Measured
from pt_jax.plan.memory import Memory, device_bytes
from pt_jax.plan.program import Program
from pt_jax.plan.roofline import Roofline


@dataclasses.dataclass(frozen=True)
class Line:
  """Through two depths, to a third."""

  shallow: int
  deep: int
  layers: int

  def at(self, shallow: float, deep: float) -> float:
    """The value at `layers`."""
    return deep + (deep - shallow) * (self.layers - self.deep) / (self.deep - self.shallow)


def extrapolated(program: Program, shallow: Measured, deep: Measured, line: Line) -> Measured:
  """The figures of a program from those that were measured with fewer layers.

  Args:
    program: with all layers; what it holds is counted and not extrapolated.
    shallow, deep: the same with `line.shallow` and `line.deep` layers; both fit.
    line: the depths.
  """
  assert shallow.xla is not None and deep.xla is not None  # see `compile.plan_stage`
  parts = {name: device_bytes(tree) for name, tree in program.held.items()}
  for name in deep.memory.parts.keys() - parts.keys():
    before, after = shallow.memory.parts.get(name, 0), deep.memory.parts[name]
    parts[name] = max(0, round(line.at(before, after)))
  depths = (line.shallow, line.deep)
  return Measured(
    program,
    Memory(parts, deep.memory.usable, True),
    shallow.seconds + deep.seconds,
    _analysis(shallow.xla, deep.xla, line),
    depths,
  )


def _analysis(shallow: Analysis, deep: Analysis, line: Line) -> Analysis:
  return Analysis(
    flops=line.at(shallow.flops, deep.flops),
    bytes=line.at(shallow.bytes, deep.bytes),
    collectives=_collectives(shallow.collectives, deep.collectives, line),
    kernels=_kernels(shallow.kernels, deep.kernels, line),
    roofline=_roofline(shallow.roofline, deep.roofline, line),
  )


def _collectives(
  shallow: Sequence[Collective], deep: Sequence[Collective], line: Line
) -> tuple[Collective, ...]:
  before = {(c.kind, c.axes, c.dtype): c for c in shallow}
  found = []
  for c in deep:
    old = before.get((c.kind, c.axes, c.dtype))
    along = lambda name, c=c, old=old: line.at(getattr(old, name, 0.0), getattr(c, name))
    numbers = [along(name) for name in ("runs", "bytes", "moved", "beside")]
    found.append(Collective(c.kind, c.axes, c.dtype, *numbers))
  return tuple(found)


def _kernels(shallow: Sequence[Kernel], deep: Sequence[Kernel], line: Line) -> tuple[Kernel, ...]:
  before = {kernel.name: kernel.runs for kernel in shallow}
  runs = lambda kernel: line.at(before.get(kernel.name, 0.0), kernel.runs)
  return tuple(dataclasses.replace(kernel, runs=runs(kernel)) for kernel in deep)


def _roofline(shallow: Roofline, deep: Roofline, line: Line) -> Roofline:
  along = lambda name: line.at(getattr(shallow, name), getattr(deep, name))
  names = ("compute", "hbm", "ici", "exposed", "in_order", "model_flops")
  return dataclasses.replace(deep, **{name: along(name) for name in names})
