"""Which tiles each kernel works in, for each chip and class of shapes, and how they were found.

A row holds for a kernel, a chip and a class of shapes that the kernel names ("head_dim=128"). "any"
stands for every chip or every class; the most special row counts. A row without a search says so.
Static: from `python -m kernels.schedule`, which ranks variants; no row was timed on a TPU.
"""

from collections.abc import Mapping
from typing import NamedTuple

ANY = "any"


class Row(NamedTuple):
  """Tiles of a kernel."""

  kernel: str  # the folder
  chip: str  # a name of `chip.CHIPS`, or "any"
  shape: str  # a class of shapes that the kernel names, or "any"
  tiles: Mapping[str, int]  # keyword arguments of the kernel's tiles
  found: str  # how


_SQUARES = {"q_block": 1024, "k_block": 1024, "q_tile": 512, "k_tile": 512}
_FIRST_GUESS = "no search: fits VMEM"
_RAGGED = "static, of 5 on v5e and v6e: docs/results.md"
ROWS: tuple[Row, ...] = (
  Row("flash_attention", ANY, "forward", _SQUARES, "static, of 12 at a head of 128"),
  Row("flash_attention", ANY, "backward", _SQUARES, _FIRST_GUESS),
  Row("ragged_paged_attention", ANY, ANY, {"rows": 512, "keys": 512, "heads": 8}, _RAGGED),
  Row("ragged_paged_attention", "v6e", ANY, {"rows": 512, "keys": 1024, "heads": 8}, _RAGGED),
  Row("ragged_paged_attention", "tpu7x", ANY, {"rows": 512, "keys": 1024, "heads": 8}, _RAGGED),
  Row(
    "linear_logprob",
    ANY,
    ANY,
    {"rows": 512, "tokens": 512, "backward_rows": 512, "backward_tokens": 512},
    _FIRST_GUESS,
  ),
)


def find(kernel: str, chip: str, shape: str = ANY) -> dict[str, int]:
  """Tiles of a kernel on a chip for a class of shapes.

  The first that there is of (chip, shape), (chip, any), (any, shape), (any, any).

  Raises ValueError when there is no row.
  """
  rows = {(row.chip, row.shape): row.tiles for row in ROWS if row.kernel == kernel}
  for key in ((chip, shape), (chip, ANY), (ANY, shape), (ANY, ANY)):
    if key in rows:
      return dict(rows[key])
  known = ", ".join(" ".join(key) for key in rows) or "none"
  raise ValueError(f"tiles of {kernel}: expected a row for {chip} {shape}, found {known}")
