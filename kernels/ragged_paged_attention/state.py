"""What the parts of the TPU kernel share: its memory, and a step in scalars."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.ragged_paged_attention.layout import Layout
from kernels.ragged_paged_attention.reference import Features

Ref = Any  # memory of a Pallas kernel
Scalar = Any  # int32 of a kernel: traced, or a Python number


class Refs(NamedTuple):
  """Memory of the kernel; the first six are scalars, prefetched."""

  step_sequence: Ref  # [steps]
  step_row: Ref  # [steps]
  count: Ref  # [1] steps
  kv_lengths: Ref  # [N]
  q_starts: Ref  # [N + 1]
  page_table: Ref  # [N P]
  sinks: Ref  # [H] SMEM, times log2(e)
  value_scales: Ref  # [G] SMEM
  q: Ref  # [G, rows, key lanes] HBM
  new: Ref  # [G, rows, W] HBM
  pages_before: Ref  # HBM; the same memory as `pages`
  out: Ref  # [G, rows, value lanes] HBM
  pages: Ref  # [pages, G, page, W] HBM
  lse: Ref | None  # [G, rows, 128] HBM
  q_buffer: Ref  # [2, G, rows, key lanes]
  new_buffer: Ref  # [2, G, new, W]
  keys: Ref  # [2, blocks, G, keys, lanes], two tiles
  fresh: Ref  # [blocks, G, new + 2 unit, lanes] float32, what is new
  stage: Ref  # [G, new, W], what is written
  top: Ref  # [G, rows, 128], the state of small steps, see `attention_tile`
  total: Ref  # [G, rows, 128]
  acc: Ref  # [G, rows, value lanes]
  top_columns: Ref  # [G, 1, rows], the state of other steps
  total_columns: Ref  # [G, 1, rows]
  acc_columns: Ref  # [G, value lanes, rows]
  out_buffer: Ref  # [G, rows, value lanes]
  out_end: Ref  # [G, align, value lanes] float32, the last rows that were written
  lse_buffer: Ref | None  # [G, rows, 128]
  lse_end: Ref | None  # [G, align, 128]
  slot: Ref  # [1] SMEM, the buffer of the tile that comes next
  load_sems: Ref  # [2] of queries and new keys
  key_sems: Ref  # [2]
  write_sem: Ref
  out_sem: Ref


class Step(NamedTuple):
  """A step, in scalars of the kernel. Its new tokens are rows row : end, its positions
  start : stop."""

  sequence: jax.Array
  row: jax.Array
  end: jax.Array
  shift: jax.Array  # position less row
  first: jax.Array  # tile of keys
  last: jax.Array  # tile of keys, with position stop - 1
  small: jax.Array  # bool, of the smallest class

  @property
  def start(self):
    return self.row + self.shift

  @property
  def stop(self):
    return self.end + self.shift


class Kernel(NamedTuple):
  """What is static."""

  sizes: Layout
  features: Features
  sinks: bool


def describe(r: Refs, index: jax.Array, static: Kernel) -> Step:
  """What step `index` does: its sequence, its rows, and the tiles of keys that it reads."""
  sizes, window = static.sizes, static.features.window
  sequence, row = r.step_sequence[index], r.step_row[index]
  q_end = r.q_starts[sequence + 1]
  small = q_end - r.q_starts[sequence] <= sizes.classes[0].tokens
  tokens = jnp.where(small, sizes.classes[0].tokens, sizes.largest.tokens)
  end = jnp.minimum(row + tokens, q_end)
  shift = r.kv_lengths[sequence] - q_end
  oldest = jnp.int32(0) if window is None else jnp.maximum(row + shift - window + 1, 0)
  first, last = div(oldest, sizes.keys), div(end + shift - 1, sizes.keys)
  return Step(sequence, row, end, shift, first, last, small)


# Of numbers that are not negative. `//` and `%` ask JAX's default device which TPU it is.
def div(x: jax.Array, n: int) -> jax.Array:
  """x // n."""
  return jax.lax.div(x, jnp.int32(n))


def rem(x: jax.Array, n: int) -> jax.Array:
  """x % n."""
  return jax.lax.rem(x, jnp.full_like(x, n))


def heads(sizes: Layout):
  """The key heads of this program, of all."""
  return pl.ds(pl.program_id(0) * sizes.block, sizes.block)


def aligned(rows: jax.Array, multiple: int) -> jax.Array:
  """The multiple at or before `rows`."""
  return pl.multiple_of(div(rows, multiple) * multiple, multiple)


def row_index(step: Step, sizes: Layout) -> tuple[jax.Array, jax.Array]:
  """(where the window starts among all query rows, where the step's own rows start in it)."""
  begin = aligned(step.row * sizes.repeat, sizes.align)
  return begin, step.row * sizes.repeat - begin
