"""What the HBM of a device holds while a program runs."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from pt_jax.plan.program import Program

TEMPORARIES = "activations and other temporaries"
MARGIN = 256 << 20  # bytes a device that advice leaves free: buffers of the runtime, alignment


def device_bytes(tree: Any) -> int:
  """Bytes of abstract arrays on one device, without the padding of tiles."""
  leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
  held = lambda x: math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
  return sum(held(x) * x.dtype.itemsize for x in leaves)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device."""

  parts: Mapping[str, int]  # name -> bytes; together the peak of the program
  usable: int  # what libtpu lets programs use
  compiled: bool  # the temporaries are those of the compiled program, not what libtpu refused

  @property
  def total(self) -> int:
    """All parts."""
    return sum(self.parts.values())

  @property
  def fits(self) -> bool:
    """Whether the program, beside what else is in memory, is within what is usable."""
    return self.compiled and self.total <= self.usable


def measure(program: Program, compiled: Any, usable: int) -> Memory:
  """Memory of a compiled program: XLA's temporaries beside what is held.

  Gradients are the float32 accumulator where the program has that many temporaries; what is left of
  those is activations, gathered weights and workspace.
  """
  stats = compiled.memory_analysis()
  parts = {name: device_bytes(tree) for name, tree in program.held.items()}
  new = stats.output_size_in_bytes - stats.alias_size_in_bytes
  gradients = min(device_bytes(program.gradients), stats.temp_size_in_bytes)
  if gradients:
    parts["gradients"] = gradients
  parts[TEMPORARIES] = stats.temp_size_in_bytes - gradients
  parts["new outputs and code"] = new + stats.generated_code_size_in_bytes
  padding = stats.argument_size_in_bytes - device_bytes((program.args, dict(program.given)))
  if padding > 0:
    parts["padding of arguments"] = padding
  return Memory(parts, usable, True)


def refused(program: Program, message: str, usable: int) -> Memory | None:
  """Memory of a program that libtpu did not compile because it needs too much; None if that is not
  what the message says."""
  found = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
  found = found or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  if found is None:
    return None
  asked = int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
  parts = {name: device_bytes(tree) for name, tree in program.held.items()}
  gradients = min(device_bytes(program.gradients), asked)
  if gradients:
    parts["gradients"] = gradients
  parts[TEMPORARIES] = asked - gradients
  return Memory(parts, usable, False)
