"""Pallas kernels for TPU: tiles of logits live in VMEM, forward and backward.

Forward, a grid of (rows, tokens): a tile of rows stays while tiles of the matrix pass by. Maxima
and sums are kept for each of the 128 lanes, so that nothing crosses lanes before the last tile.
Backward, two passes: one by hidden states (the grid of the forward pass), one by the matrix (tokens
outside), each with its gradient in a float32 accumulator.

A product over the width is a loop over slices of it where it is wider than one: it compiles for
half a minute at a width of 4096, the two loops of 8192 no longer. Numbers of a row travel in the
lanes of one [N, 128] array. The last tile of the matrix may reach past its end; what lies there is
masked. Rows are padded.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import chip as chips
from kernels import tiles as table
from kernels import varying
from kernels.linear_logprob.options import Coefficients, Options, Tiles, cap, cap_slope
from kernels.linear_logprob.partial import Partial

LANES = 128
ROWS_MULTIPLE = 16  # of a bfloat16 tile
# Of the width, in a turn of the loops over it. Static, at a width of 4096: in slices of 1024 the
# matrix units of v5e are busy 88 % of the forward pass, in ones of 2048 90 %, in one piece 97 %.
SLICE = 4096
MASKED = -1e30  # finite: the difference of two is no NaN
# Lanes of what the forward pass writes, labels behind; and of what the backward pass reads.
TOP, TOTAL, WEIGHTED, BEST, LABELS = range(5)
LSE, THROUGH, SLOPE, WEIGHTS = range(4)
MOST_LABELS = LANES - LABELS


def tiles_of(h: jax.Array, w: jax.Array, options: Options) -> Tiles:
  """The caller's tiles or those of the table, no larger than the arrays."""
  chosen = options.tiles
  if chosen is None:
    width = max(1024, 1 << (h.shape[1] - 1).bit_length())
    chosen = Tiles(**table.find("linear_logprob", str(options.chip), f"width<={width}"))
  rows = lambda most: min(most, _round_up(h.shape[0], ROWS_MULTIPLE))
  tokens = lambda most: min(most, _round_up(w.shape[0], LANES))
  return Tiles(
    rows=rows(chosen.rows),
    tokens=tokens(chosen.tokens),
    backward_rows=rows(chosen.backward_rows),
    backward_tokens=tokens(chosen.backward_tokens),
  )


def partials(h: jax.Array, w: jax.Array, labels: jax.Array, options: Options) -> Partial:
  """h [N, E], w [V, E], labels [N, K] (outside 0..V-1: elsewhere) -> what w says of each row."""
  _check(labels)
  tile = tiles_of(h, w, options)
  count, k = labels.shape
  h, w = _pad_rows(h, tile.rows), w.astype(h.dtype)
  grid = (h.shape[0] // tile.rows, pl.cdiv(w.shape[0], tile.tokens))
  lane_sums = [pltpu.VMEM((tile.rows, LANES), jnp.float32) for _ in range(3 + k)]
  out = pl.pallas_call(
    functools.partial(_forward_kernel, options=options, vocabulary=w.shape[0], k=k),
    grid=grid,
    in_specs=[
      pl.BlockSpec((tile.rows, h.shape[1]), lambda i, j: (i, 0)),
      pl.BlockSpec((tile.tokens, w.shape[1]), lambda i, j: (j, 0)),
      pl.BlockSpec((tile.rows, LANES), lambda i, j: (i, 0)),
    ],
    out_specs=pl.BlockSpec((tile.rows, LANES), lambda i, j: (i, 0)),
    out_shape=varying.out((h.shape[0], LANES), jnp.float32, h, w, labels),
    scratch_shapes=[
      pltpu.VMEM((tile.rows, tile.tokens), jnp.float32),
      *lane_sums,
      pltpu.VMEM((tile.rows, LANES), jnp.int32),
    ],
    compiler_params=_parameters(options),
    cost_estimate=_cost(h, w, 1, h.size + grid[0] * w.size + 2 * h.shape[0] * LANES),
    name="linear_logprob_forward",
  )(h, w, _in_lanes([labels], tile.rows, -1))
  out = out[:count]
  columns = lambda lane: out[:, lane]
  label, best = out[:, LABELS : LABELS + k], columns(BEST).astype(jnp.int32)
  return Partial(columns(TOP), columns(TOTAL), columns(WEIGHTED), label, best)


def gradients(
  h: jax.Array, w: jax.Array, labels: jax.Array, by: Coefficients, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Gradients by h and by w, of this device's rows and part of the vocabulary."""
  _check(labels)
  tile = tiles_of(h, w, options)
  rows, tokens = tile.backward_rows, tile.backward_tokens
  count, width = h.shape
  h, w = _pad_rows(h, rows), w.astype(h.dtype)
  columns = [x[:, None] for x in (by.lse, by.through, by.slope)]
  coefficients = _in_lanes([*columns, by.label], rows, 0.0)
  labels = _in_lanes([labels], rows, -1)
  shape = (h.shape[0] // rows, pl.cdiv(w.shape[0], tokens))
  settings = {"options": options, "vocabulary": w.shape[0], "k": by.label.shape[1]}

  def call(kernel, name, order, out_block, out_index, out_shape):
    """A pass over the grid; order: which of its two indices is of rows, which of tokens."""
    i, j = order
    stays, passes = ((h, w)[axis] for axis in order)
    moved = stays.size + shape[order[0]] * passes.size + out_shape.size + 2 * h.shape[0] * LANES
    return pl.pallas_call(
      functools.partial(kernel, **settings),
      grid=tuple(shape[axis] for axis in order),
      in_specs=[
        pl.BlockSpec((rows, width), lambda *at: (at[i], 0)),
        pl.BlockSpec((tokens, width), lambda *at: (at[j], 0)),
        pl.BlockSpec((rows, LANES), lambda *at: (at[i], 0)),
        pl.BlockSpec((rows, LANES), lambda *at: (at[i], 0)),
      ],
      out_specs=pl.BlockSpec(out_block, lambda *at: (at[out_index], 0)),
      out_shape=out_shape,
      scratch_shapes=[
        pltpu.VMEM((rows, tokens), jnp.float32),
        pltpu.VMEM(out_block, jnp.float32),
      ],
      compiler_params=_parameters(options),
      cost_estimate=_cost(h, w, 2, moved),
      name=name,
    )(h, w, labels, coefficients)

  def result(x):
    """Rounded to the dtype of x by the kernel, unless devices still have to be summed over."""
    every = (h, w, labels, coefficients)
    dtype = x.dtype if varying.axes(*every) == varying.axes(x) else jnp.float32
    return varying.out(x.shape, dtype, *every)

  dh = call(_hidden_kernel, "linear_logprob_by_hidden", (0, 1), (rows, width), 0, result(h))
  dw = call(_matrix_kernel, "linear_logprob_by_matrix", (1, 0), (tokens, width), 0, result(w))
  return dh[:count], dw


def _check(labels: jax.Array) -> None:
  if labels.shape[1] > MOST_LABELS:
    raise ValueError(
      f"linear_logprob: expected at most {MOST_LABELS} label sets, found {labels.shape[1]}"
    )


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _pad_rows(x: jax.Array, multiple: int, value: float = 0) -> jax.Array:
  more = -x.shape[0] % multiple
  return jnp.pad(x, ((0, more), (0, 0)), constant_values=value) if more else x


def _in_lanes(columns: list[jax.Array], rows: int, value: float) -> jax.Array:
  """Columns [N, k] beside each other in 128 lanes, rows padded; `value` where there is nothing."""
  x = jnp.concatenate(columns, axis=1)
  x = jnp.pad(x, ((0, 0), (0, LANES - x.shape[1])), constant_values=value)
  return _pad_rows(x, rows, value)


def _cost(h: jax.Array, w: jax.Array, products: int, moved: int) -> pl.CostEstimate:
  """So many products of h and w, and elements that the grid fetches and writes."""
  logits = h.shape[0] * w.shape[0]
  return pl.CostEstimate(
    flops=2 * products * logits * h.shape[1],
    transcendentals=logits,
    bytes_accessed=moved * h.dtype.itemsize,
  )


def _parameters(options: Options) -> pltpu.CompilerParams:
  limit = chips.get(str(options.chip)).vmem_bytes * 15 // 16
  return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """A product in float32; of float32 factors without rounding them to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _slices(width: int) -> tuple[int, int]:
  """How many slices of the width there are, and how wide."""
  return (width // SLICE, SLICE) if width % SLICE == 0 else (1, width)


def _each_slice(width: int, visit) -> None:
  """visit(slice) for every slice of the width."""
  count, size = _slices(width)
  if count == 1:
    visit(slice(None))
    return

  @pl.loop(0, count)
  def _(e):
    visit(pl.ds(pl.multiple_of(e * size, size), size))


def _products(h_ref, w_ref, z_ref):
  """z = h w^T."""
  z_ref[...] = jnp.zeros_like(z_ref)

  def visit(at):
    z_ref[...] += _dot(h_ref[:, at], w_ref[:, at], (1, 1))

  _each_slice(h_ref.shape[1], visit)


def _ids(block: jax.Array | int, shape: tuple[int, ...], tokens: int) -> jax.Array:
  """The tokens of the columns of a tile of logits."""
  return block * tokens + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _forward_kernel(h_ref, w_ref, labels_ref, out_ref, *scratch, options, vocabulary, k):
  z_ref, top_ref, total_ref, weighted_ref, *label_refs, best_ref = scratch
  j, tokens = pl.program_id(1), w_ref.shape[0]

  @pl.when(j == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    for ref in (total_ref, weighted_ref, best_ref, *label_refs):
      ref[...] = jnp.zeros_like(ref)

  _products(h_ref, w_ref, z_ref)
  z = cap(z_ref[...], options)
  ids = _ids(j, z.shape, tokens)
  if vocabulary % tokens:
    z = jnp.where(ids < vocabulary, z, MASKED)
  slabs = [slice(c, c + LANES) for c in range(0, tokens, LANES)]
  before = top_ref[...]
  top, best = before, best_ref[...]
  for slab in slabs:
    best = jnp.where(z[:, slab] > top, j * tokens + slab.start, best)
    top = jnp.maximum(top, z[:, slab])
  gap = before - top
  scale = jnp.exp(gap)
  weighted = (weighted_ref[...] + total_ref[...] * gap) * scale
  total = total_ref[...] * scale
  for slab in slabs:
    d = z[:, slab] - top
    p = jnp.exp(d)
    total += p
    weighted += p * d
  for i, ref in enumerate(label_refs):
    label = labels_ref[:, i : i + 1]
    ref[...] += sum(jnp.where(ids[:, slab] == label, z[:, slab], 0) for slab in slabs)
  top_ref[...], total_ref[...], weighted_ref[...], best_ref[...] = top, total, weighted, best

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    out_ref[...] = _across_lanes(top, total, weighted, best, [ref[...] for ref in label_refs])


def _across_lanes(top, total, weighted, best, labels):
  """[rows, 128] of lanes that each saw their own tokens -> the numbers of the rows, in lanes."""
  lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
  row_top = top.max(1, keepdims=True)
  gap = top - row_top
  scale = jnp.exp(gap)
  first = jnp.where(top == row_top, best + lane, jnp.iinfo(jnp.int32).max)
  rows = {
    TOP: row_top,
    TOTAL: (total * scale).sum(1, keepdims=True),
    WEIGHTED: ((weighted + total * gap) * scale).sum(1, keepdims=True),
    BEST: first.min(1, keepdims=True).astype(jnp.float32),  # exact below 2^24
  }
  rows |= {LABELS + i: label.sum(1, keepdims=True) for i, label in enumerate(labels)}
  out = jnp.zeros_like(top)
  for i, row in rows.items():
    out = jnp.where(lane == i, row, out)
  return out


def _by_products(h_ref, w_ref, labels_ref, by_ref, z_ref, block, *, options, vocabulary, k):
  """The gradient by the products of a tile, [rows, tokens] in the dtype of h."""
  _products(h_ref, w_ref, z_ref)
  z, tokens = cap(z_ref[...], options), w_ref.shape[0]
  ids = _ids(block, z.shape, tokens)
  column = lambda ref, lane: ref[:, lane : lane + 1]
  d = z - column(by_ref, LSE)
  dz = -jnp.exp(d) * (column(by_ref, THROUGH) + column(by_ref, SLOPE) * d)
  for i in range(k):
    dz += jnp.where(ids == column(labels_ref, i), column(by_ref, WEIGHTS + i), 0)
  dz *= cap_slope(z, options)
  if vocabulary % tokens:
    dz = jnp.where(ids < vocabulary, dz, 0)
  return dz.astype(h_ref.dtype)


def _hidden_kernel(h_ref, w_ref, labels_ref, by_ref, out_ref, z_ref, sum_ref, **settings):
  j, vocabulary = pl.program_id(1), settings["vocabulary"]
  dz = _by_products(h_ref, w_ref, labels_ref, by_ref, z_ref, j, **settings)

  def more(at):
    w = w_ref[:, at]
    if vocabulary % w.shape[0]:  # past the end of the matrix lies anything, and 0 NaN is NaN
      row = j * w.shape[0] + jax.lax.broadcasted_iota(jnp.int32, w.shape, 0)
      w = jnp.where(row < vocabulary, w, 0)
    return _dot(dz, w, (1, 0))

  _accumulate(sum_ref, out_ref, more)


def _matrix_kernel(h_ref, w_ref, labels_ref, by_ref, out_ref, z_ref, sum_ref, **settings):
  dz = _by_products(h_ref, w_ref, labels_ref, by_ref, z_ref, pl.program_id(0), **settings)
  _accumulate(sum_ref, out_ref, lambda at: _dot(dz, h_ref[:, at], (0, 0)))


def _accumulate(sum_ref, out_ref, more):
  """Over the inner axis of the grid, slice by slice of the width."""
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def visit(at):
    sum_ref[:, at] += more(at)

  _each_slice(sum_ref.shape[1], visit)

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)
