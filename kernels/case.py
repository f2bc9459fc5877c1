"""A named program that a kernel is tested, compiled and measured with.

`kernels/<op>/shapes.py` holds `CASES: tuple[Case, ...]`, every combination of shapes and features
that models use. `tests/kernels/test_compile.py` compiles all of them for every chip, and
`python -m kernels.schedule` prints what the compiler made of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# The name of a chip -> a function of arrays and the `jax.ShapeDtypeStruct`s that it is called with.
Program = Callable[[str], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Case:
  """A program of one kernel, or of a kernel and its backward pass."""

  name: str  # [a-z0-9_]+, unique in its kernel
  program: Program
  flops: float = 0.0  # useful FLOPs of a call on one device: a causal mask counts half
  # For grids that visit dead blocks: the share of turns that do the work.
  active: float = 1.0
  # A part of a kernel's name, perhaps with a chip -> turns of its loops that are known at run time
  # only, in the order of the listing (outer first): what the case's data would give. Without it no
  # time is estimated.
  turns: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
  # The same -> how often each region with work for the matrix units runs when what is around it
  # does, in the order of the listing: for kernels with code for several kinds of block.
  kinds: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
  slow: bool = False  # takes more than some seconds to compile: for `make test-slow` only
  budget: bool = False  # its schedule is compared with the checked-in budget by `make test`
