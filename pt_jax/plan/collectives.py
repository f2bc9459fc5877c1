"""The collectives of a scheduled program: kind, mesh axes, bytes, and what runs beside them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from pt_jax.plan.cost import COLLECTIVES
from pt_jax.plan.hlo import Array, Instruction, Module

SCATTERED = "all-reduce-scatter"  # an all-reduce in a fusion of this name is a reduce-scatter


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same mesh axes, in one call of the program."""

  kind: str
  axes: tuple[str, ...]  # of the mesh; empty where every group is one device
  dtype: str
  runs: float
  bytes: float  # of the whole array (gathered, or before it is scattered) on a device, all runs
  moved: float  # bytes that a device has to send and receive for it, each way, on a ring
  beside: float  # of `bytes`, those whose transfer other work runs beside


def collectives(module: Module, mesh: Mapping[str, int], dynamic_trips: int) -> list[Collective]:
  """The collectives of a program for `mesh` (axis -> size, in order), the largest first."""
  sums: dict[tuple[str, tuple[str, ...], str], np.ndarray] = {}
  seen: set[tuple[str, str]] = set()
  for computation, outer, runs in module.executed(dynamic_trips):
    for i, kind, beside in _within(module, outer):
      channel, chain = i.attribute(r"channel_id=(\d+)"), i.attribute(r'chain_id="(\d+)"')
      step = (computation.name, f"{channel} {chain}")
      if chain is not None and step in seen:
        continue  # another step of a collective that was counted
      seen.add(step)
      axes, size = _axes(i, mesh), _size(i, kind)
      count = math.prod(mesh[axis] for axis in axes)
      moved = size * traffic(kind, count)
      found = np.array([1, size, moved, size * beside]) * runs
      key = kind, axes, i.shapes[0].dtype
      sums[key] = sums.get(key, 0) + found
  made = [Collective(*key, *total.tolist()) for key, total in sums.items()]
  return sorted(made, key=lambda c: -c.moved)


def traffic(kind: str, count: int) -> float:
  """Share of the whole array that a device sends (and receives) among `count` devices."""
  if count == 1:
    return 0.0
  share = (count - 1) / count
  return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _within(module: Module, outer: Instruction) -> list[tuple[Instruction, str, bool]]:
  """The collectives that an executed instruction is or runs: each with its kind, and whether other
  work runs beside it."""
  kind = outer.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    return [(outer, kind, outer.opcode.endswith("-start"))]
  found = []
  if outer.opcode in ("fusion", "async-start"):
    beside = "all-reduce-scatter" not in outer.called[0]
    for name in outer.called:
      for i in module.computations[name].instructions:
        for inner, kind, _ in _within(module, i):
          scattered = kind == "all-reduce" and name.startswith(SCATTERED)
          found.append((inner, "reduce-scatter" if scattered else kind, beside))
  return found


def _size(i: Instruction, kind: str) -> int:
  """Bytes of the whole array on a device: the result of a gathering, the operand of the others."""
  shapes = _largest_half(i) if i.opcode.endswith("-start") else i.shapes
  size = sum(shape.bytes for shape in shapes)
  if kind == "reduce-scatter" and i.opcode.startswith("reduce-scatter"):
    return size * _group_size(i)
  return size


def _largest_half(i: Instruction) -> Sequence[Array]:
  """The result of an asynchronous collective, whose shape also has its operands and contexts."""
  return (max(i.shapes, key=lambda shape: shape.bytes),)


def _group_size(i: Instruction) -> int:
  return len(_first_group(i) or (0,))


def _axes(i: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ."""
  group = _first_group(i)
  shape = tuple(mesh.values())
  if group is None:
    return tuple(name for name, size in mesh.items() if size > 1)
  places = np.array(np.unravel_index(np.array(group), shape))
  differ = (places != places[:, :1]).any(1)
  return tuple(name for name, differs in zip(mesh, differ) if differs)


def _first_group(i: Instruction) -> list[int] | None:
  """Numbers of the devices of one group of a collective; None if it is over all devices.

  The forms are {{0,1},{2,3}}, [2,2]<=[4], [2,2]<=[2,2]T(1,0) and mesh['a'=2,'b'=2] {'b'}.
  """
  if pairs := i.attribute(r"source_target_pairs=\{\{([\d,]+)\}"):
    return [int(n) for n in pairs.split(",")]
  if listed := i.attribute(r"replica_groups=\{\{([\d,]+)\}"):
    return [int(n) for n in listed.split(",")]
  found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest)
  if found:
    groups, dims, order = ([int(n) for n in (x or "").split(",") if n] for x in found.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(groups)[0].tolist()
  found = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", i.rest
  )
  return _mesh_group(found[1], found[2]) if found else None


def _mesh_group(mesh: str, axes: str) -> list[int]:
  """mesh 'a'=4,'b'=2 and axes 'a':(2)2,'b' -> the first group; ':(2)2' is the part of size 2 of an
  axis behind a part of size 2."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
  strides = dict(zip(sizes, np.cumprod([1, *list(sizes.values())[::-1]])[-2::-1].tolist()))
  ids = np.zeros(1, int)
  for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
    size = int(part or sizes[name])
    stride = strides[name] * sizes[name] // (int(before or 1) * size)
    ids = (ids[:, None] + np.arange(size) * stride).ravel()
  return ids.tolist()
