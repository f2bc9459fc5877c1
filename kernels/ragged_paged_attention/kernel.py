"""The TPU kernel: steps one after the other, tiles of keys fetched while the one before is used.

A step is described in `layout`. Its tiles of keys go from the first that its window reaches to the
one with its last position; every tile is fetched page by page into one of two buffers. The step's
own keys are in those pages' places only after it: they are put into the tile in fast memory and,
from there, written to their pages. The next step's first tile is fetched during this one's last,
unless it holds what this step writes.

Letters: see `layout`; G here is the heads of one program, `block`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.ragged_paged_attention import copies
from kernels.ragged_paged_attention.attend import begin, finish, use_tile
from kernels.ragged_paged_attention.layout import Class
from kernels.ragged_paged_attention.state import Kernel, Refs, Step, describe, div, rem


def kernel(*refs, static: Kernel, names: tuple[str, ...]) -> None:
  """A program of the launch: all steps for `block` key heads."""
  r = Refs(**(dict.fromkeys(Refs._fields) | dict(zip(names, refs))))
  sizes = static.sizes
  count = r.count[0]
  r.slot[0] = 0
  r.out_end[...] = jnp.zeros(r.out_end.shape)
  if r.lse_end is not None:
    r.lse_end[...] = jnp.zeros(r.lse_end.shape)

  @pl.when(count > 0)
  def _():
    step = describe(r, jnp.int32(0), static)
    copies.load(r, 0, step, sizes, start=True)
    copies.tile_of_keys(r, step, step.first, 0, sizes, start=True)

  @pl.loop(0, count)
  def _(index):
    step = describe(r, index, static)
    for size in sizes.classes:
      run = functools.partial(run_step, r, index, step, size, static)
      pl.when(step.small == size.small)(run)

  @pl.when(count > 0)
  def _():
    copies.store(r, describe(r, count - 1, static), sizes, start=False)


def run_step(r: Refs, index: jax.Array, step: Step, size: Class, static: Kernel) -> None:
  """One step: its queries over the tiles of keys, while the pages of the next tile or step come."""
  sizes = static.sizes
  parity = rem(index, 2)
  more = index + 1 < r.count[0]
  after = describe(r, jnp.minimum(index + 1, r.count[0] - 1), static)
  written = div(step.start, sizes.keys)  # the first tile that this step changes
  early = (after.sequence != step.sequence) | (after.first < written)
  copies.load(r, parity, step, sizes, start=False)
  pl.when(more)(lambda: copies.load(r, 1 - parity, after, sizes, start=True))
  begin(r, step, size, static)
  copies.arrange(r, parity, size, sizes)

  @pl.loop(step.first, step.last + 1)
  def _(j):
    slot = r.slot[0]
    final = j == step.last
    coming = Step(*(jnp.where(final, a, b) for a, b in zip(after, step)))
    fetch = lambda: copies.tile_of_keys(
      r, coming, jnp.where(final, after.first, j + 1), 1 - slot, sizes, start=True
    )
    pl.when(~final | (more & early))(fetch)
    copies.tile_of_keys(r, step, j, slot, sizes, start=False)
    pl.when(j >= written)(lambda: copies.insert(r, step, j, slot, sizes))
    pl.when(final)(lambda: copies.clear(r, step, j, slot, sizes))
    use_tile(r, parity, step, j, slot, size, static)
    pl.when(final)(lambda: copies.written_out(r, step, sizes))
    pl.when(final & more & ~early)(fetch)
    r.slot[0] = 1 - slot

  pl.when(index > 0)(
    lambda: copies.store(r, describe(r, jnp.maximum(index - 1, 0), static), sizes, start=False)
  )
  finish(r, step, size, static)
  copies.store(r, step, sizes, start=True)
