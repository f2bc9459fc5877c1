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


_FORWARD = {"q_block": 1024, "k_block": 1024, "parts": 4}
# Four blocks of queries a turn are 2 % faster than two on v5e. But a turn moves 6 MiB for them, of
# that 4 MiB of the queries' gradients: on v6e that takes longer than one block, which is all that
# there may be to do where segments are short.
_BACKWARD = {"q_block": 1024, "k_block": 1024, "q_tile": 256, "k_tile": 512}
_ATTENTION = (
  "static 2026-11-25, v5e and v6e, heads of 128 in bfloat16: fewest cycles of a whole block, of "
  "4 tiles in 256, 512 and 1024; parts by what a turn has around its blocks"
)
_FIRST_GUESS = "no search: fits VMEM"


def _linear_logprob(width: int, sizes: tuple[int, int, int, int], found: str) -> Row:
  names = ("rows", "tokens", "backward_rows", "backward_tokens")
  return Row("linear_logprob", ANY, f"width<={width}", dict(zip(names, sizes)), found)


_STATIC = (
  "static 2026-11-25, v5e and v6e, 4096 rows, vocabulary 151,936: the fewest cycles of a call of "
  "5 pairs of tiles in 256, 512 and 1024"
)
ROWS: tuple[Row, ...] = (
  Row("flash_attention", ANY, "forward", _FORWARD | {"q_tile": 512, "k_tile": 1024}, _ATTENTION),
  Row("flash_attention", "v5e", "forward", _FORWARD | {"q_tile": 256, "k_tile": 512}, _ATTENTION),
  Row("flash_attention", "v5p", "forward", _FORWARD | {"q_tile": 256, "k_tile": 512}, "as v5e"),
  Row("flash_attention", ANY, "backward", _BACKWARD | {"parts": 2}, _ATTENTION),
  Row("flash_attention", "v5e", "backward", _BACKWARD | {"parts": 4}, _ATTENTION),
  Row("flash_attention", "v5p", "backward", _BACKWARD | {"parts": 4}, "as v5e"),
  Row(
    "ragged_paged_attention",
    ANY,
    ANY,
    {"rows": 512, "keys": 512, "heads": 8},
    "static 2026-11-25, v5e and v6e, of 5 pairs in 256, 512 and 1024: docs/results.md",
  ),
  _linear_logprob(1024, (512, 1024, 512, 512), _STATIC),
  _linear_logprob(2048, (512, 512, 512, 512), "no search: those of width<=4096"),
  _linear_logprob(4096, (512, 512, 512, 512), _STATIC),
  Row("grouped_matmul", ANY, ANY, {"rows": 256, "columns": 512, "depth": 512}, _FIRST_GUESS),
  _linear_logprob(8192, (512, 256, 256, 512), "no search: fits the VMEM of v5p and tpu7x"),
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
