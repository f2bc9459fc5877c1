"""What the parts of the TPU kernel share: its memory, and a step in scalars."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.ragged_paged_attention.layout import Layout
from kernels.ragged_paged_attention.reference import Features


class Refs(NamedTuple):
  """Memory of the kernel; the first six are scalars, prefetched."""

  step_sequence: jax.Ref  # [steps]
  step_row: jax.Ref  # [steps]
  count: jax.Ref  # [1] steps
  kv_lengths: jax.Ref  # [N]
  q_starts: jax.Ref  # [N + 1]
  page_table: jax.Ref  # [N P]
  sinks: jax.Ref  # [H] SMEM, times log2(e)
  value_scales: jax.Ref  # [G] SMEM
  q: jax.Ref  # [G, rows, key lanes] HBM
  new: jax.Ref  # [G, rows, W] HBM
  pages_before: jax.Ref  # HBM; the same memory as `pages`
  out: jax.Ref  # [G, rows, value lanes] HBM
  pages: jax.Ref  # [pages, G, page, W] HBM
  lse: jax.Ref | None  # [G, rows, 128] HBM
  q_buffer: jax.Ref  # [2, G, rows, key lanes]
  new_buffer: jax.Ref  # [2, G, new, W]
  keys: jax.Ref  # [2, blocks, G, keys, lanes], two tiles
  fresh: jax.Ref  # [blocks, G, new + 2 unit, lanes] float32, what is new
  stage: jax.Ref  # [G, new, W], what is written
  top: jax.Ref  # [G, rows, 128], the state of small steps, see `attention_tile`
  total: jax.Ref  # [G, rows, 128]
  acc: jax.Ref  # [G, rows, value lanes]
  top_columns: jax.Ref  # [G, 1, rows], the state of other steps
  total_columns: jax.Ref  # [G, 1, rows]
  acc_columns: jax.Ref  # [G, value lanes, rows]
  out_buffer: jax.Ref  # [G, rows, value lanes]
  out_end: jax.Ref  # [G, align, value lanes] float32, the last rows that were written
  lse_buffer: jax.Ref | None  # [G, rows, 128]
  lse_end: jax.Ref | None  # [G, align, 128]
  slot: jax.Ref  # [1] SMEM, the buffer of the tile that comes next
  load_sems: jax.Ref  # [2] of queries and new keys
  key_sems: jax.Ref  # [2]
  write_sem: jax.Ref
  out_sem: jax.Ref


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
  return jax.lax.div(x, jnp.int32(n))


def rem(x: jax.Array, n: int) -> jax.Array:
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
