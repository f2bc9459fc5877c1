"""One program of a plan: what is compiled, and what is in memory beside it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pt_jax.plan.cost import Cost

Kind = Literal["train", "score", "transfer", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function, and what it is called with."""

  name: str
  kind: Kind
  function: Any
  args: tuple[Any, ...]
  given: Mapping[str, Any]
  # Name -> abstract tree: what is in memory while it runs, its arguments included.
  held: Mapping[str, Any]
  gradients: Any = None  # abstract tree of the accumulator, None without one
  tokens: int = 0  # of one call, padding included
  trips: int = 1  # turns of loops whose count is data: microbatches, tokens of a launch
  model_flops: float = 0.0  # of one call on all chips, without what is computed twice
  calls: int = 1  # in an update, or in a step of an online stage
  kernel: Cost | None = None  # of a run of its Pallas kernel on one device, where data decides
  note: str = ""  # what the figures assume

  def lower(self) -> Any:
    """The program as XLA is given it."""
    return self.function.lower(*self.args, **self.given)
