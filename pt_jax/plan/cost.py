"""FLOPs and HBM bytes of a scheduled program, instruction by instruction.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import functools
import json
import math
import re

import numpy as np

from pt_jax.plan.hlo import HBM, Array, Computation, Instruction, Module

# What moves nothing: names for what is there, and the ends of transfers that began elsewhere.
FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
  *("partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update"),
  *("all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv-done"),
  *("optimization-barrier", "domain"),
}
KERNEL = "tpu_custom_call"
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one run of an instruction costs on one device."""

  flops: float  # of matrix products
  bytes: float  # read from and written to HBM


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A Pallas kernel of the program."""

  name: str
  runs: float  # in one call of the program
  cost: Cost | None  # of one run as its author states it; None if nothing is stated


@dataclasses.dataclass(frozen=True)
class Operation:
  """What is executed: an instruction, how often, and what each run costs."""

  instruction: Instruction
  computation: Computation
  runs: float
  cost: Cost


def operations(module: Module, dynamic_trips: int) -> list[Operation]:
  """Everything that is executed, with its cost; kernels cost what they state."""
  found = []
  for computation, i, runs in module.executed(dynamic_trips):
    if i.opcode in FREE:
      continue
    stated = stated_cost(i) if is_kernel(i) else None
    cost = stated or Cost(flops_of(module, computation, i), bytes_of(module, computation, i))
    found.append(Operation(i, computation, runs, cost))
  return found


def kernels(module: Module, dynamic_trips: int) -> list[Kernel]:
  """The Pallas kernels of a program, those of one name together."""
  runs: dict[str, float] = {}
  costs: dict[str, Cost | None] = {}
  for _, i, times in module.executed(dynamic_trips):
    if is_kernel(i):
      name = i.attribute(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call"') or i.name
      runs[name] = runs.get(name, 0.0) + times
      costs[name] = stated_cost(i)
  return [Kernel(name, count, costs[name]) for name, count in runs.items()]


def is_kernel(i: Instruction) -> bool:
  """Whether it is a Pallas kernel."""
  return i.opcode == "custom-call" and f'custom_call_target="{KERNEL}"' in i.rest


def stated_cost(i: Instruction) -> Cost | None:
  """What a kernel's `cost_estimate` says, None where it has none."""
  found = re.search(r'"cost_estimate":(\{[^{}]*\})', i.rest)
  if found is None:
    return None
  stated = json.loads(found[1])
  number = lambda name: float(stated.get(name, 0))
  return Cost(number("flops"), number("bytes_accessed"))


def flops_of(module: Module, computation: Computation, i: Instruction) -> float:
  """FLOPs of the matrix products in an instruction and in what it calls."""
  if i.opcode == "dot":
    return _dot(computation, i)
  if i.opcode == "convolution":
    return _convolution(computation, i)
  if i.opcode in ("fusion", "async-start"):
    inner = [module.computations[name] for name in i.called]
    return sum(flops_of(module, c, part) for c in inner for part in c.instructions)
  return 0.0


def bytes_of(module: Module, computation: Computation, i: Instruction) -> float:
  """Bytes that an instruction reads from HBM and writes to it: operands and results that live
  there, or the part of an operand that is sliced out of it or written into it."""
  operands = [computation.by_name.get(name) for name in i.operands]
  sizes = [0 if x is None or x.opcode == "constant" else _in_hbm(x.shapes) for x in operands]
  if i.opcode == "fusion":
    inner = module.computations[i.called[0]]
    read = sum(min(size, _read(module, inner, at, size)) for at, size in enumerate(sizes) if size)
    return read + _written(inner, i)
  if i.opcode in ("slice", "dynamic-slice"):
    return (sizes[0] > 0) * _in_any(i.shapes) + _in_hbm(i.shapes)
  if i.opcode == "async-start":  # what it runs, where that is a slice of a weight to come
    root = module.computations[i.called[0]].root
    if root.opcode in ("slice", "dynamic-slice"):
      return (sizes[0] > 0) * _in_any(root.shapes) + _in_hbm(root.shapes)
  if i.opcode == "dynamic-update-slice":
    return 2 * sizes[1]
  if i.opcode == "slice-start":  # (source, destination, context)
    return (sizes[0] > 0) * _in_any(i.shapes[1:2]) + _in_hbm(i.shapes[1:2])
  if i.opcode == "copy-start":  # (destination, source, context)
    return sizes[0] + _in_hbm(i.shapes[:1])
  return sum(sizes) + _in_hbm(i.shapes)


def _in_hbm(shapes: tuple[Array, ...]) -> int:
  return sum(shape.bytes for shape in shapes if shape.space == HBM)


def _in_any(shapes: tuple[Array, ...]) -> int:
  return sum(shape.bytes for shape in shapes)


def _read(module: Module, inner: Computation, position: int, size: int) -> int:
  """Bytes that a fusion reads of a parameter of `size` bytes: slices where it only slices, none
  where it only writes into it."""
  starts = [
    p for p in inner.instructions if p.opcode == "parameter" and p.operands[0] == str(position)
  ]
  total, names = 0, {p.name for p in starts}
  if not starts:
    return size
  for user in inner.instructions:
    used = [at for at, name in enumerate(user.operands) if name in names]
    if not used:
      continue
    if user.opcode == "bitcast":
      names.add(user.name)
    elif user.opcode in ("dynamic-slice", "slice", "gather") and used == [0]:
      total += _in_any(user.shapes)
    elif user.opcode in COLLECTIVES:
      continue  # a step of a collective that other work runs beside: see `collectives`
    elif user.opcode == "fusion":
      nested = module.computations[user.called[0]]
      if any(_is_parameter(nested, at) for at in used):
        names.add(user.name)  # a bitcast that is written as a fusion
        continue
      total += sum(_read(module, nested, at, size) for at in used)
    elif user.opcode != "dynamic-update-slice" or used != [0]:
      return size
  return total


def _is_parameter(inner: Computation, position: int) -> bool:
  """Whether a fusion returns a parameter as it is, or under another shape."""
  root = inner.root
  while root.opcode == "bitcast":
    root = inner.by_name[root.operands[0]]
  return root.opcode == "parameter" and root.operands[0] == str(position)


def _written(inner: Computation, i: Instruction) -> int:
  """Bytes of a fusion's result; of a slice that is written in place, the slice."""
  root = inner.root
  while root.opcode == "bitcast":
    root = inner.by_name[root.operands[0]]
  roots = [inner.by_name[x] for x in root.operands] if root.opcode == "tuple" else [root]
  if len(roots) != len(i.shapes):
    return _in_hbm(i.shapes)
  total = 0
  for one, shape in zip(roots, i.shapes):
    while one.opcode == "bitcast":
      one = inner.by_name[one.operands[0]]
    whole = 0 if one.opcode in (*COLLECTIVES, "parameter") else _in_hbm((shape,))
    if one.opcode == "dynamic-update-slice":
      whole = min(whole, _in_any(inner.by_name[one.operands[1]].shapes))
    total += whole
  return total


def _dot(computation: Computation, i: Instruction) -> float:
  left = computation.by_name[i.operands[0]].shapes[0]
  contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  depth = math.prod(left.dims[int(axis)] for axis in contracted.split(",") if axis)
  return 2.0 * math.prod(i.shapes[0].dims) * depth


def _convolution(computation: Computation, i: Instruction) -> float:
  """2 x multiplications whose input is neither padding nor a hole of a dilation: that is how XLA
  writes products with batch dimensions on TPU."""
  labels = i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
  if labels is None:
    return 0.0
  inputs, kernel, out = re.split(r"_|->", labels)
  left, right = (computation.by_name[name].shapes[0].dims for name in i.operands[:2])
  result = i.shapes[0].dims
  groups = int(i.attribute(r"batch_group_count=(\d+)") or 1)
  count = right[kernel.index("i")] * result[out.index("b")] * result[out.index("f")] / groups
  window = _window(i)
  spatial = sorted(c for c in out if c.isdigit())
  for axis, label in enumerate(spatial):
    size, stride, dilate, spread = (
      int(window[name][axis]) if name in window else 1
      for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    before, after = left[inputs.index(label)], result[out.index(label)]
    count *= _met(before, size, after, stride, low, dilate, spread)
  return 2.0 * count


def _window(i: Instruction) -> dict[str, tuple[str, ...]]:
  text = i.attribute(r"window=\{([^}]*)\}") or ""
  return {name: tuple(value.split("x")) for name, value in re.findall(r"(\w+)=([-\w]+)", text)}


@functools.cache
def _met(size: int, window: int, out: int, stride: int, low: int, dilate: int, spread: int) -> int:
  """Pairs of an output position and a window position that meet an element of the input: neither
  padding (`low` of it in front) nor a hole of a dilation."""
  last = (size - 1) * dilate
  if dilate == 1 and low == 0 and (out - 1) * stride + (window - 1) * spread <= last:
    return out * window
  at = np.arange(out)[:, None] * stride + np.arange(window) * spread - low
  return int(((at >= 0) & (at <= last) & (at % dilate == 0)).sum())
