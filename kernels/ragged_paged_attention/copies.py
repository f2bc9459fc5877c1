"""What the TPU kernel moves: queries, tiles of keys, new keys and outputs.

A function with `start` starts the copies of a step, or waits for the same copies.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.ragged_paged_attention.layout import Class, Layout
from kernels.ragged_paged_attention.state import Refs, Step, aligned, div, heads, rem


def load(r: Refs, parity, step: Step, sizes: Layout, *, start: bool) -> None:
  """Starts to copy a step's queries and new keys, or waits for them."""
  for size in sizes.classes:

    def copy(size=size):
      begin = aligned(step.row * sizes.repeat, sizes.align)
      rows = r.q.at[heads(sizes), pl.ds(begin, size.rows)]
      new = r.new.at[heads(sizes), pl.ds(aligned(step.row, sizes.align), size.new)]
      for source, target in (
        (rows, r.q_buffer.at[parity, :, pl.ds(0, size.rows)]),
        (new, r.new_buffer.at[parity, :, pl.ds(0, size.new)]),
      ):
        one = pltpu.make_async_copy(source, target, r.load_sems.at[parity])
        one.start() if start else one.wait()

    pl.when(step.small == size.small)(copy)


def tile_of_keys(r: Refs, step: Step, j, slot, sizes: Layout, *, start: bool) -> None:
  """Starts to copy the pages of tile j that the step sees, or waits for them."""
  each = sizes.keys // sizes.page
  for i in range(each):
    index = j * each + i

    def copy(index=index, i=i):
      page = r.page_table[step.sequence * sizes.pages + index]
      for c in range(sizes.blocks):
        one = pltpu.make_async_copy(
          r.pages.at[page, heads(sizes), :, pl.ds(c * sizes.lanes, sizes.lanes)],
          r.keys.at[slot, c, :, pl.ds(i * sizes.page, sizes.page)],
          r.key_sems.at[slot],
        )
        one.start() if start else one.wait()

    pl.when(index * sizes.page < step.stop)(copy)


def arrange(r: Refs, parity, size: Class, sizes: Layout) -> None:
  """The new keys in float32, of which rows can be read from anywhere, behind `unit` rows that mean
  nothing."""

  @pl.loop(0, sizes.block)
  def _(g):
    for c in range(sizes.blocks):
      rows = r.new_buffer[parity, g, pl.ds(0, size.new), pl.ds(c * sizes.lanes, sizes.lanes)]
      r.fresh[c, g, pl.ds(sizes.unit, size.new)] = rows.astype(jnp.float32)


def insert(r: Refs, step: Step, j, slot, sizes: Layout) -> None:
  """Puts the step's new keys of tile j into the tile, and starts to write them to their pages."""
  unit, each = sizes.unit, sizes.keys // sizes.unit
  base = div(step.start, unit)
  low = jnp.maximum(base, j * each)
  high = jnp.minimum(div(step.stop + unit - 1, unit), (j + 1) * each)

  @pl.loop(low, high)
  def _(u):
    here = pl.ds(pl.multiple_of((u - j * each) * unit, unit), unit)
    there = pl.ds(pl.multiple_of((u - base) * unit, unit), unit)
    source = pl.ds(u * unit - step.shift - aligned(step.row, sizes.align) + unit, unit)
    position = u * unit + jax.lax.broadcasted_iota(jnp.int32, (unit, sizes.lanes), 0)
    new = (position >= step.start) & (position < step.stop)
    for c, g in itertools.product(range(sizes.blocks), range(sizes.block)):
      lanes = pl.ds(c * sizes.lanes, sizes.lanes)
      old = r.keys[slot, c, g, here].astype(jnp.float32)
      rows = jnp.where(new, r.fresh[c, g, source], old)
      r.stage[g, there, lanes] = rows.astype(r.stage.dtype)
      r.keys[slot, c, g, here] = jnp.where(position < step.stop, rows, 0).astype(r.keys.dtype)
    write(r, step, u, sizes).start()


def write(r: Refs, step: Step, u, sizes: Layout):
  """The copy of rows u * unit : (u + 1) * unit of the sequence to their page."""
  unit = sizes.unit
  row = u * unit
  page = r.page_table[step.sequence * sizes.pages + div(row, sizes.page)]
  from_ = pl.ds(pl.multiple_of((u - div(step.start, unit)) * unit, unit), unit)
  into = pl.ds(pl.multiple_of(rem(row, sizes.page), unit), unit)
  return pltpu.make_async_copy(
    r.stage.at[:, from_], r.pages.at[page, heads(sizes), into], r.write_sem
  )


def written_out(r: Refs, step: Step, sizes: Layout) -> None:
  """Waits until the step's new keys are in their pages."""

  unit = sizes.unit

  @pl.loop(div(step.start, unit), div(step.stop + unit - 1, unit))
  def _(u):
    write(r, step, u, sizes).wait()


def clear(r: Refs, step: Step, j, slot, sizes: Layout) -> None:
  """Zeros behind the step's last position: what stands there may be NaN, and 0 NaN = NaN."""
  unit, each = sizes.unit, sizes.keys // sizes.unit
  nothing = jnp.zeros((unit, sizes.lanes), jnp.float32).astype(r.keys.dtype)

  @pl.loop(div(step.stop + unit - 1, unit) - j * each, each)
  def _(u):
    for c, g in itertools.product(range(sizes.blocks), range(sizes.block)):
      r.keys[slot, c, g, pl.ds(pl.multiple_of(u * unit, unit), unit)] = nothing


def store(r: Refs, step: Step, sizes: Layout, *, start: bool) -> None:
  """Starts to copy a step's output to its rows, or waits until it is there.

  The rows behind the step's own are its successors', who write them after it.
  """
  for size in sizes.classes:

    def copy(size=size):
      rows = pl.ds(aligned(step.row * sizes.repeat, sizes.align), size.rows)
      for source, target in ((r.out_buffer, r.out), (r.lse_buffer, r.lse)):
        if source is None or target is None:
          continue
        one = pltpu.make_async_copy(
          source.at[:, pl.ds(0, size.rows)], target.at[heads(sizes), rows], r.out_sem
        )
        one.start() if start else one.wait()

    pl.when(step.small == size.small)(copy)
