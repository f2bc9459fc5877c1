"""What the TPU kernel computes: the softmax of a step's queries over tiles of keys.

Steps of many rows work on tiles [keys, rows], as the trainer's kernel does: maxima and sums over
keys are element-wise over registers. Steps of single tokens have too few rows to fill the lanes,
and work on tiles [rows, keys].
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import attention_tile
from kernels.ragged_paged_attention.layout import Class, Layout
from kernels.ragged_paged_attention.pages import LANES
from kernels.ragged_paged_attention.state import Kernel, Refs, Step, aligned, rem, row_index

HEADS_OF_A_TURN = 4  # of the loop over heads of a large step


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Of two matrices over an axis of each, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def begin(r: Refs, step: Step, size: Class, static: Kernel) -> None:
  """The state of no key, for all heads."""
  sizes = static.sizes
  columns = r.top_columns, r.total_columns, r.acc_columns
  top, total, acc = (r.top, r.total, r.acc) if size.small else columns
  total[...] = jnp.full(total.shape, 1.0 if static.sinks else 0.0)
  acc[...] = jnp.zeros(acc.shape)
  if not static.sinks:
    top[...] = jnp.full(top.shape, attention_tile.MASKED)
    return
  window, _ = row_index(step, sizes)
  row = window + jax.lax.broadcasted_iota(jnp.int32, top.shape[1:], 0 if size.small else 1)
  member = rem(row, sizes.repeat)
  for g in range(sizes.block):
    head = (pl.program_id(0) * sizes.block + g) * sizes.repeat
    sinks = jnp.full(member.shape, r.sinks[head])
    for i in range(1, sizes.repeat):
      sinks = jnp.where(member == i, r.sinks[head + i], sinks)
    top[g] = sinks


def use_tile(r: Refs, parity, step: Step, j, slot, size: Class, static: Kernel) -> None:
  """Takes tile j into the state of all heads."""
  sizes, window = static.sizes, static.features.window
  first = j * sizes.keys
  whole = first + sizes.keys - 1 <= step.start
  if window is not None:
    whole &= first > step.stop - 1 - window

  def masked_or_not(update):
    pl.when(whole)(lambda: update(None))
    pl.when(~whole)(lambda: update(seen_keys(step, first, size, static)))

  if size.small:
    masked_or_not(functools.partial(update_rows, r, parity, slot, size, static))
  else:
    some = functools.partial(update_columns, r, parity, slot, size, static)
    turn = max(n for n in (1, 2, HEADS_OF_A_TURN) if sizes.block % n == 0)

    @pl.loop(0, sizes.block // turn)
    def _(i):
      masked_or_not(functools.partial(some, [i * turn + g for g in range(turn)]))


def seen_keys(step: Step, first, size: Class, static: Kernel) -> jax.Array:
  """Which keys of the tile that starts at position `first` a row of the window sees.

  Row i is of the token (i + window) // R, at that plus `shift`. So that nothing is divided,
  positions are multiplied by R: they stay below 2^31 up to 2^31 / R.

  Returns:
    bool [rows, keys] for small steps, [keys, rows] for others.
  """
  sizes, reach = static.sizes, static.features.window
  window, _ = row_index(step, sizes)
  iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  offset = (first - step.shift) * sizes.repeat - window
  if size.small:
    row = iota((size.rows, sizes.keys), 0)
    key = iota((1, sizes.keys), 1) * sizes.repeat + offset
  else:
    row = iota((1, size.rows), 1)
    key = iota((sizes.keys, LANES), 0) * sizes.repeat + offset
    key = jnp.concatenate([key] * (size.rows // LANES), axis=1)
  seen = row >= key
  if reach is not None:
    seen &= row < key + reach * sizes.repeat
  return seen


def keys_of(r: Refs, slot, g, first: int, sizes: Layout) -> jax.Array:
  """[keys, lanes] of a head from lane `first`, 0 for keys, in the dtype of the queries."""
  end = sizes.key_lanes if first == 0 else sizes.width
  blocks = range(first // sizes.lanes, end // sizes.lanes)
  parts = [r.keys[slot, c, g].astype(r.q_buffer.dtype) for c in blocks]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _masked(x: jax.Array, seen: jax.Array | None, static: Kernel) -> jax.Array:
  x = attention_tile.logits(x, static.features.soft_cap)
  return x if seen is None else jnp.where(seen, x, attention_tile.MASKED)


def update_columns(r: Refs, parity, slot, size: Class, static: Kernel, chosen, seen) -> None:
  """Takes a tile of keys into the state of some heads, on tiles [keys, rows].

  A head's product is computed one turn ahead: the matrix units have work during a softmax.
  """
  sizes = static.sizes

  def product(g):
    q = r.q_buffer[parity, g, pl.ds(0, size.rows)]
    return _product(keys_of(r, slot, g, 0, sizes), q, (1, 1))

  ahead = product(chosen[0])
  for n, g in enumerate(chosen):
    x = _masked(ahead, seen, static)
    if n + 1 < len(chosen):
      ahead = product(chosen[n + 1])
    v = keys_of(r, slot, g, sizes.value_lane, sizes)
    state = r.top_columns[g], r.total_columns[g]
    weights, r.top_columns[g], r.total_columns[g], fade = attention_tile.update(x, *state, axis=0)
    some = _product(v, weights.astype(v.dtype), (0, 0))
    r.acc_columns[g] = r.acc_columns[g] * fade + some


def update_rows(r: Refs, parity, slot, size: Class, static: Kernel, seen) -> None:
  """Takes a tile of keys into the state of all heads, on tiles [rows, keys].

  The products of all heads come first, then the softmax of all their rows, then the products with
  the values: with few rows, one head after the other would wait for each result.
  """
  sizes = static.sizes
  chosen, logits = range(sizes.block), []
  for g in chosen:
    q = r.q_buffer[parity, g, pl.ds(0, size.rows)]
    logits.append(_masked(_product(q, keys_of(r, slot, g, 0, sizes), (1, 1)), seen, static))
  rows = lambda parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0]
  state = (rows([x[g] for g in chosen]) for x in (r.top, r.total))
  weights, top, total, fade = attention_tile.update(rows(logits), *state, axis=1)
  for g in chosen:
    part = slice(g * size.rows, (g + 1) * size.rows)
    v = keys_of(r, slot, g, sizes.value_lane, sizes)
    some = _product(weights[part].astype(v.dtype), v, (1, 0))
    r.top[g], r.total[g] = top[part], total[part]
    r.acc[g] = r.acc[g] * fade[part, :1] + some


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

  @pl.loop(0, sizes.block)
  def _(g):
    if size.small:
      out, lse = attention_tile.finish(r.acc[g], r.top[g][:, :1], r.total[g][:, :1])
    else:
      out, lse = attention_tile.finish(r.acc_columns[g], r.top_columns[g], r.total_columns[g])
      out = out.T
    put(g, out * r.value_scales[pl.program_id(0) * sizes.block + g], r.out_buffer, r.out_end)
    if r.lse_buffer is not None:
      shape = (size.rows, LANES)
      lse = jnp.broadcast_to(lse, shape if size.small else shape[::-1])
      put(g, lse if size.small else lse.T, r.lse_buffer, r.lse_end)
