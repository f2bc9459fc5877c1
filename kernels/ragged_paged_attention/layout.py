"""Sizes of a launch of the TPU kernel, and the steps that it is cut into.

A step is a tile of queries of one sequence: `tokens` of its new tokens, all heads. Sequences with
at most as many new tokens as the smallest class has go in steps of that class, others in the next.
Where the cuts lie depends on the sequence alone, never on what else is in the launch.

Query rows are [G, T R, ...]: the R heads of a group stand in R rows next to each other, so a step
is a range of rows. Ranges start anywhere, copies at multiples of `align`: a step works in a window
of `rows` rows that starts at such a multiple and may hold rows of its neighbours.

Letters: T rows of new tokens, G key/value heads, R query heads per key head, K key width, V value
width, W row width of a page.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.ragged_paged_attention import pages


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How much a step and a turn of its loop take. Raises ValueError for sizes that do not fit."""

  rows: int = 512  # query rows of a tile of a prompt: tokens times R, and some at its borders
  keys: int = 512  # of a tile; the same for prompts and single tokens, so both sum in one order
  heads: int = 8  # key heads at most that are worked on together, limited by VMEM

  def __post_init__(self):
    for name, unit in (("rows", pages.LANES), ("keys", 32), ("heads", 1)):
      if (found := getattr(self, name)) < unit or found % unit:
        raise ValueError(f"tiles: expected {name} to be a multiple of {unit}, found {found}")


class Class(NamedTuple):
  """Steps of one size."""

  small: bool
  tokens: int  # new tokens of a step at most
  rows: int  # query rows of its window
  new: int  # rows of its window of new keys


@dataclasses.dataclass(frozen=True)
class Layout:
  """Static sizes of a launch."""

  groups: int  # G
  block: int  # key heads of a program: G in one, or in parts
  repeat: int  # R
  width: int  # W
  key_lanes: int  # of a row, from 0: the key, and what queries have zeros for
  value_lane: int  # where the lanes start that weights are multiplied with
  page: int  # rows of a page
  pages: int  # of a sequence at most
  keys: int  # of a tile
  unit: int  # rows of a page that are written at once
  align: int  # rows at whose multiples copies of queries and of new keys start
  classes: tuple[Class, ...]

  @property
  def value_lanes(self) -> int:
    return self.width - self.value_lane

  @property
  def lanes(self) -> int:
    """Of a block of a row: a page is fetched in blocks of 128 lanes. Two bfloat16 rows of wider
    memory would have to be put together from halves at each load."""
    return min(self.width, pages.LANES)

  @property
  def blocks(self) -> int:
    return self.width // self.lanes

  @property
  def largest(self) -> Class:
    return self.classes[-1]


def up(x: int, multiple: int) -> int:
  """The next multiple, x itself if it is one."""
  return -(-x // multiple) * multiple


def layout(q, k_new, v_new, kv_pages, page_table, tiles: Tiles, cores: int) -> Layout:
  """Sizes for these arguments of `reference.attention`.

  Raises ValueError for pages whose rows are not a multiple of what is written at once.
  """
  groups, key_width, value_width = k_new.shape[1], k_new.shape[2], v_new.shape[2]
  repeat, page = q.shape[1] // groups, kv_pages.shape[2]
  align, unit = 32 // q.dtype.itemsize, 32 // kv_pages.dtype.itemsize
  if page % unit:
    raise ValueError(
      f"ragged_paged_attention: expected pages of a multiple of {unit} rows of {kv_pages.dtype}, "
      f"found {page}"
    )
  narrow = key_width + value_width <= pages.LANES
  width = pages.row_width(key_width, value_width)
  offset = pages.value_offset(key_width, value_width)
  return Layout(
    groups=groups,
    block=_block(groups, tiles.heads, cores),
    repeat=repeat,
    width=width,
    key_lanes=width if narrow else offset,
    value_lane=0 if narrow else offset,
    page=page,
    pages=page_table.shape[1],
    keys=up(tiles.keys, page),
    unit=unit,
    align=align,
    classes=_classes(tiles.rows, repeat, align, unit),
  )


def _block(groups: int, most: int, cores: int) -> int:
  """The most heads that divide G; half of them at most where two cores share a device."""
  parts = cores if groups % cores == 0 else 1
  return max(n for n in range(1, groups // parts + 1) if groups // parts % n == 0 and n <= most)


def _classes(rows: int, repeat: int, align: int, unit: int) -> tuple[Class, Class]:
  """Steps of single tokens, and steps whose window is `rows`, or as much as two tokens need."""
  before = align - math.gcd(repeat, align)  # rows of neighbours that a window may start with
  window = lambda tokens: up(before + tokens * repeat, align)
  rows = max(rows, up(window(2), pages.LANES))
  tokens, coarse = (rows - before) // repeat, max(align, unit)
  new = lambda tokens: up(tokens - 1 + coarse, coarse)
  return Class(True, 1, window(1), new(1)), Class(False, tokens, rows, new(tokens))


class Steps(NamedTuple):
  """What is done in which order; entries behind `count` mean nothing."""

  sequence: jax.Array  # [steps] int32
  row: jax.Array  # [steps] int32, the first new token of it
  count: jax.Array  # [1] int32


def steps(q_starts: jax.Array, tokens: int, sizes: Layout) -> Steps:
  """The steps of a launch of at most `tokens` new tokens, in the order of their rows."""
  small, large = sizes.classes[0].tokens, sizes.largest.tokens
  new = q_starts[1:] - q_starts[:-1]
  tile = jnp.where(new <= small, small, large)
  ends = jnp.cumsum(-(-new // tile), dtype=jnp.int32)
  most = min(tokens, tokens // large + len(new))
  index = jnp.arange(most, dtype=jnp.int32)
  sequence = jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32)
  sequence = jnp.minimum(sequence, len(new) - 1)
  within = index - jnp.where(sequence > 0, ends[sequence - 1], 0)
  return Steps(sequence, q_starts[sequence] + within * tile[sequence], ends[-1:])
