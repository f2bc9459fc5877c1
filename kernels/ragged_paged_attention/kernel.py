"""The TPU kernel: steps one after the other, tiles of keys fetched while the one before is used.

A step is described in `layout`. Its tiles of keys go from the first that its window reaches to the
one with its last position; every tile is fetched page by page into one of two buffers. The step's
own keys are in those pages' places only after it: they are put into the tile in fast memory and,
from there, written to their pages. The next step's first tile is fetched during this one's last,
unless it holds what this step writes.

Letters: see `layout`; G here is the heads of one program, `block`.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_tile
from kernels.ragged_paged_attention.layout import Class, Layout
from kernels.ragged_paged_attention.pages import LANES
from kernels.ragged_paged_attention.reference import Features

TOGETHER = 64  # query rows up to which the heads of a tile are worked on together


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
  fresh: jax.Ref  # [G, new, W] float32, what is new, by position
  stage: jax.Ref  # [G, new, W], what is written
  m: jax.Ref  # [G, rows, 128]
  l: jax.Ref  # [G, rows, 128]
  acc: jax.Ref  # [G, rows, value lanes]
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
    load(r, 0, step, sizes, start=True)
    tile_of_keys(r, step, step.first, 0, sizes, start=True)

  @pl.loop(0, count)
  def _(index):
    step = describe(r, index, static)
    for size in sizes.classes:
      small = size is sizes.classes[0]
      pl.when(step.small if small else ~step.small)(
        functools.partial(run_step, r, index, step, size, static)
      )

  @pl.when(count > 0)
  def _():
    store(r, describe(r, count - 1, static), sizes, start=False)


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


def run_step(r: Refs, index: jax.Array, step: Step, size: Class, static: Kernel) -> None:
  sizes = static.sizes
  parity = rem(index, 2)
  more = index + 1 < r.count[0]
  after = describe(r, jnp.minimum(index + 1, r.count[0] - 1), static)
  written = div(step.start, sizes.keys)  # the first tile that this step changes
  early = (after.sequence != step.sequence) | (after.first < written)
  load(r, parity, step, sizes, start=False)
  pl.when(more)(lambda: load(r, 1 - parity, after, sizes, start=True))
  begin(r, step, size, static)
  arrange(r, parity, step, size, sizes)

  @pl.loop(step.first, step.last + 1)
  def _(j):
    slot = r.slot[0]
    final = j == step.last
    fetch = functools.partial(tile_of_keys, r, sizes=sizes, start=True)
    pl.when(~final)(lambda: fetch(step, j + 1, 1 - slot))
    pl.when(final & more & early)(lambda: fetch(after, after.first, 1 - slot))
    tile_of_keys(r, step, j, slot, sizes, start=False)
    pl.when(j >= written)(lambda: insert(r, step, j, slot, sizes))
    pl.when(final)(lambda: clear(r, step, j, slot, sizes))
    use_tile(r, parity, step, j, slot, size, static)
    pl.when(final)(lambda: written_out(r, step, sizes))
    pl.when(final & more & ~early)(lambda: fetch(after, after.first, 1 - slot))
    r.slot[0] = 1 - slot

  pl.when(index > 0)(
    lambda: store(r, describe(r, jnp.maximum(index - 1, 0), static), sizes, start=False)
  )
  finish(r, step, size, static)
  store(r, step, sizes, start=True)


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

    pl.when(step.small if size is sizes.classes[0] else ~step.small)(copy)


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


def row_index(step: Step, sizes: Layout) -> tuple[jax.Array, jax.Array]:
  """(where the window starts among all query rows, where the step's own rows start in it)."""
  begin = aligned(step.row * sizes.repeat, sizes.align)
  return begin, step.row * sizes.repeat - begin


def begin(r: Refs, step: Step, size: Class, static: Kernel) -> None:
  """The state of no key, for all heads."""
  sizes = static.sizes
  window, _ = row_index(step, sizes)
  member = None
  if static.sinks:
    row = window + jax.lax.broadcasted_iota(jnp.int32, (size.rows, LANES), 0)
    member = rem(row, sizes.repeat)
  for g in range(sizes.block):
    sinks = None
    if member is not None:
      head = (pl.program_id(0) * sizes.block + g) * sizes.repeat
      sinks = jnp.full(member.shape, r.sinks[head])
      for i in range(1, sizes.repeat):
        sinks = jnp.where(member == i, r.sinks[head + i], sinks)
    m, l, acc = (x.at[g, pl.ds(0, size.rows)] for x in (r.m, r.l, r.acc))
    m[...] = jnp.full(m.shape, attention_tile.MASKED) if sinks is None else sinks
    l[...] = jnp.full(l.shape, 0.0 if sinks is None else 1.0)
    acc[...] = jnp.zeros(acc.shape)


def arrange(r: Refs, parity, step: Step, size: Class, sizes: Layout) -> None:
  """The new keys in the order of their places in pages: row i of `fresh` is position
  start // unit * unit + i."""
  down = rem(size.new + rem(step.start, sizes.unit) - rem(step.row, sizes.align), size.new)
  for g in range(sizes.block):
    rows = r.new_buffer[parity, g, pl.ds(0, size.new)].astype(jnp.float32)
    r.fresh[g, pl.ds(0, size.new)] = pltpu.roll(rows, down, 0)


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
    position = u * unit + jax.lax.broadcasted_iota(jnp.int32, (unit, sizes.lanes), 0)
    new = (position >= step.start) & (position < step.stop)
    for c, g in itertools.product(range(sizes.blocks), range(sizes.block)):
      lanes = pl.ds(c * sizes.lanes, sizes.lanes)
      old = r.keys[slot, c, g, here].astype(jnp.float32)
      rows = jnp.where(new, r.fresh[g, there, lanes], old)
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


def use_tile(r: Refs, parity, step: Step, j, slot, size: Class, static: Kernel) -> None:
  """Takes tile j into the state of all heads."""
  sizes, window = static.sizes, static.features.window
  begin = j * sizes.keys
  whole = begin + sizes.keys - 1 <= step.start
  if window is not None:
    whole &= begin > step.stop - 1 - window

  def some_heads(chosen, masked: bool):
    seen = seen_keys(step, begin, size, static) if masked else None
    update(r, parity, slot, chosen, seen, size, static)

  def all_heads(masked: bool):
    if size.rows <= TOGETHER:
      some_heads(range(sizes.block), masked)
    else:
      pl.loop(0, sizes.block)(lambda g: some_heads([g], masked))

  pl.when(whole)(lambda: all_heads(False))
  pl.when(~whole)(lambda: all_heads(True))


def keys_of(r: Refs, slot, g, first: int, sizes: Layout) -> jax.Array:
  """[keys, lanes] of a head from lane `first`, 0 for keys, in the dtype of the queries."""
  end = sizes.key_lanes if first == 0 else sizes.width
  blocks = range(first // sizes.lanes, end // sizes.lanes)
  parts = [r.keys[slot, c, g].astype(r.q_buffer.dtype) for c in blocks]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def update(r: Refs, parity, slot, chosen, seen, size: Class, static: Kernel) -> None:
  """Takes a tile of keys into the state of some heads.

  The products of all come first, then the softmax of all their rows, then the products with the
  values: with the few rows of single tokens, one head after the other would wait for each result.

  Args:
    chosen: the heads.
    seen: [rows, keys], which keys a row sees; None for all.
  """
  sizes = static.sizes
  own = pl.ds(0, size.rows)
  product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  logits = []
  for g in chosen:
    k = keys_of(r, slot, g, 0, sizes)
    x = product(r.q_buffer[parity, g, own], k, (((1,), (1,)), ((), ())))
    x = attention_tile.logits(x, static.features.soft_cap)
    logits.append(x if seen is None else jnp.where(seen, x, attention_tile.MASKED))
  rows = lambda parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0]
  state = (rows([x[g, own] for g in chosen]) for x in (r.m, r.l))
  weights, m, l, fade = attention_tile.update(rows(logits), *state, axis=1)
  for i, g in enumerate(chosen):
    part = slice(i * size.rows, (i + 1) * size.rows)
    v = keys_of(r, slot, g, sizes.value_lane, sizes)
    some = product(weights[part].astype(v.dtype), v, (((1,), (0,)), ((), ())))
    r.m[g, own], r.l[g, own] = m[part], l[part]
    r.acc[g, own] = r.acc[g, own] * fade[part, :1] + some


def seen_keys(step: Step, begin, size: Class, static: Kernel) -> jax.Array:
  """[rows, keys]: which keys of the tile that starts at position `begin` a row of the window sees.

  Row i is of the token (i + window) // R, at that plus `shift`. So that nothing is divided,
  positions are multiplied by R: they stay below 2^31 up to 2^31 / R.
  """
  sizes, repeat, reach = static.sizes, static.sizes.repeat, static.features.window
  window, _ = row_index(step, sizes)
  row = jax.lax.broadcasted_iota(jnp.int32, (size.rows, sizes.keys), 0)
  key = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.keys), 1)
  key = (key + (begin - step.shift)) * repeat - window
  seen = row >= key
  if reach is not None:
    seen &= row < key + reach * repeat
  return seen


def finish(r: Refs, step: Step, size: Class, static: Kernel) -> None:
  """The step's output, with the rows of the steps before that stand in its window's first."""
  sizes = static.sizes
  own = pl.ds(0, size.rows)
  window, before = row_index(step, sizes)
  end = aligned(step.end * sizes.repeat, sizes.align) - window
  end = pl.multiple_of(jnp.minimum(end, size.rows - sizes.align), sizes.align)

  def put(g, rows, buffer, kept):
    old = jax.lax.broadcasted_iota(jnp.int32, (sizes.align, rows.shape[1]), 0) < before
    buffer[g, own] = rows.astype(buffer.dtype)
    first = jnp.where(old, kept[g], rows[: sizes.align])
    buffer[g, pl.ds(0, sizes.align)] = first.astype(buffer.dtype)
    kept[g] = buffer[g, pl.ds(end, sizes.align)].astype(kept.dtype)

  for g in range(sizes.block):
    state = r.acc[g, own], r.m[g, own][:, :1], r.l[g, own][:, :1]
    out, lse = attention_tile.finish(*state)
    put(g, out * r.value_scales[pl.program_id(0) * sizes.block + g], r.out_buffer, r.out_end)
    if r.lse_buffer is not None:
      put(g, jnp.broadcast_to(lse, (size.rows, LANES)), r.lse_buffer, r.lse_end)


def store(r: Refs, step: Step, sizes: Layout, *, start: bool) -> None:
  """Starts to copy a step's output to its rows, or waits until it is there.

  The rows behind the step's own are its successors', who write them after it.
  """
  for size in sizes.classes:

    def copy(size=size):
      rows = pl.ds(aligned(step.row * sizes.repeat, sizes.align), size.rows)
      for source, target in ((r.out_buffer, r.out), (r.lse_buffer, r.lse)):
        if source is None:
          continue
        one = pltpu.make_async_copy(
          source.at[:, pl.ds(0, size.rows)], target.at[heads(sizes), rows], r.out_sem
        )
        one.start() if start else one.wait()

    pl.when(step.small if size is sizes.classes[0] else ~step.small)(copy)
