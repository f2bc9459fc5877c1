"""Scheduled HLO text as XLA prints it: computations, instructions, and how often each runs.

Only what a plan reads is parsed: shapes with their memory space, operands, called computations and
the attributes of products, loops and collectives.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

ITEM_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8", "s4", "u4"), 1),
  **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz"), 1),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
  **dict.fromkeys(("f32", "s32", "u32"), 4),
  **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
HBM = 0  # the memory space that a layout without S(...) is in
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape."""

  dtype: str
  dims: tuple[int, ...]
  space: int  # 0 is HBM

  @property
  def bytes(self) -> int:
    """Without the padding of tiles."""
    return ITEM_BYTES.get(self.dtype, 0) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line."""

  name: str
  opcode: str
  shapes: tuple[Array, ...]  # of the result; several for a tuple
  operands: tuple[str, ...]
  rest: str  # attributes, as they stand
  root: bool

  def attribute(self, pattern: str) -> str | None:
    """The first group of a regular expression found in the attributes."""
    found = re.search(pattern, self.rest)
    return found[1] if found else None

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls."""
    branches = self.attribute(r"branch_computations=\{([^}]*)\}") or ""
    return (*_CALLED.findall(self.rest), *re.findall(r"%([\w.\-]+)", branches))


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    """Its instructions."""
    return {i.name: i for i in self.instructions}

  @property
  def root(self) -> Instruction:
    """The instruction whose result is returned."""
    return next(i for i in self.instructions if i.root)


@dataclasses.dataclass(frozen=True)
class Module:
  """All computations."""

  computations: Mapping[str, Computation]
  entry: str

  def executed(self, dynamic_trips: int) -> Iterator[tuple[Computation, Instruction, float]]:
    """Every instruction that runs by itself (not inside a fusion), with how often it does.

    Of the branches of a conditional the largest counts.

    Args:
      dynamic_trips: of a loop whose trip count is no constant.
    """
    yield from self._walk(self.entry, 1.0, dynamic_trips)

  def _walk(self, name: str, times: float, dynamic: int) -> Iterator:
    computation = self.computations[name]
    for i in computation.instructions:
      if i.opcode == "while":
        trips = self.trip_count(i)
        body = i.attribute(r"body=%([\w.\-]+)")
        assert body is not None
        yield from self._walk(body, times * (dynamic if trips is None else trips), dynamic)
      elif i.opcode == "conditional":
        largest = max(i.called, key=lambda c: len(self.computations[c].instructions))
        yield from self._walk(largest, times, dynamic)
      elif i.opcode == "call":
        yield from self._walk(i.called[0], times, dynamic)
      else:
        yield computation, i, times

  def trip_count(self, loop: Instruction) -> int | None:
    """How often a `while` runs, None where that is no constant: JAX's loops count up from 0 to a
    limit, which stands in the condition."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if known is not None:
      return int(known)
    condition = loop.attribute(r"condition=%([\w.\-]+)")
    assert condition is not None
    found = set()
    for i in self._with_fused(condition):
      if i.opcode == "constant" and i.shapes[0].dtype in ("s32", "u32", "s64"):
        found.add(i.operands[0])
    found.discard("0")  # where a sum in the condition begins
    return int(found.pop()) if len(found) == 1 else None

  def _with_fused(self, name: str) -> Iterator[Instruction]:
    for i in self.computations[name].instructions:
      yield i
      if i.opcode in ("fusion", "call"):
        yield from self._with_fused(i.called[0])


def parse(text: str) -> Module:
  """The module of `compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  entry, name, lines = "", "", []
  for line in text.splitlines():
    if begins := _COMPUTATION.match(line):
      name, lines = begins[2], []
      entry = name if begins[1] else entry
    elif line.startswith("}"):
      computations[name] = Computation(name, tuple(_instruction(x) for x in lines))
    elif _NAMED.match(line):
      lines.append(line)
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  named = _NAMED.match(line)
  assert named is not None
  shape_end = _shape_end(line, named.end())
  open_ = line.index("(", shape_end)
  close = _matching(line, open_)
  inner = line[open_ + 1 : close]
  opcode = line[shape_end:open_].strip()
  operands = tuple(re.findall(r"%([\w.\-]+)", inner)) or (inner,)
  shapes = _arrays(line[named.end() : shape_end])
  return Instruction(named[1], opcode, shapes, operands, line[close + 1 :], "ROOT" in named[0])


def _arrays(text: str) -> tuple[Array, ...]:
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    found.append(Array(dtype, sizes, int(space[1]) if space else HBM))
  return tuple(found)


def _shape_end(line: str, start: int) -> int:
  """Where the shape that begins at `start` ends."""
  if line[start] == "(":
    return _matching(line, start) + 1
  array = _ARRAY.match(line, start)
  return array.end() if array else line.index(" ", start)


def _matching(line: str, start: int) -> int:
  """Where the parenthesis at `start` is closed."""
  depth = 0
  for i in range(start, len(line)):
    depth += (line[i] == "(") - (line[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"HLO: expected a closing parenthesis in {line[:80]!r}")
