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


_FIRST_GUESS = "no search: fits VMEM"
ROWS: tuple[Row, ...] = (
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
