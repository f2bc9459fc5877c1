"""Keys and values on the device: pages, and rows of a view that a launch decodes on.

Letters: R rows (samples of a launch), F some of them, D parts of the mesh's batch axes, L layers,
H query heads, G key/value heads, K head width, T positions of the view, W entries of a row of a
page.

On a TPU a launch decodes on the pages themselves, with a kernel that fetches them. XLA would copy
the pages of every sequence for every token; there a sample has a row of a view while it runs, keys
[R, G, K, T] and values [R, G, T, K]: a loop updates each in place, and the products of a step need
no transposition of it. A row is copied from its pages when a sample sits down, and back to them
when it leaves something that others may use.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.xla import cached_attention
from kernels.ragged_paged_attention import pages as layout
from kernels.ragged_paged_attention import ragged_paged_attention
from pt_jax import sharding
from pt_jax.models.config import ModelConfig
from pt_jax.models.decoder import Attend
from pt_jax.sharding import USE

Pages = tuple[jax.Array, ...]  # L of [pages, G, rows, W], in the compute dtype


class Rows(NamedTuple):
  """One layer of a view."""

  keys: jax.Array  # [R, G, K, T]
  values: jax.Array  # [R, G, T, K]


View = tuple[Rows, ...]  # L


def spec() -> jax.P:
  """Of pages and of views: the parts of the batch, then heads."""
  return USE.spec("batch", "kv_heads", None, None)


def parts() -> int:
  """D, of the mesh in context: how many pieces `spec` cuts the batch into."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return sizes["data"] * sizes["expert"]


def _first(x: jax.Array) -> jax.P:
  """Of an array whose first axis is that of the parts, or of rows."""
  return USE.spec("batch", *(None,) * (x.ndim - 1))


def split(x: jax.Array) -> jax.Array:
  """The parts, or rows, of a host's array onto their devices."""
  return jax.reshard(x, _first(x))


def empty(config: ModelConfig, pages: int, rows: int) -> Pages:
  """Pages of zeros, `pages` in all parts of the batch together, of `rows` tokens each."""
  width = layout.row_width(config.head_dim, config.head_dim)
  shape = (pages, config.kv_heads, rows, width)
  make = lambda: jnp.zeros(shape, config.compute_dtype, out_sharding=spec())
  return tuple(make() for _ in range(config.layers))


def resize(config: ModelConfig, view: View | None, source: jax.Array, length: int) -> View:
  """A view of other rows or of another length.

  Args:
    config: the model.
    view: before; None for none.
    source: [D, R / D] int32, the row of its part that each row was; any for none.
    length: T.
  """
  shape = (source.shape[0] * source.shape[1], config.kv_heads, config.head_dim, length)
  make = lambda *shape: jnp.zeros(shape, config.compute_dtype, out_sharding=spec())
  if view is None:
    rows = lambda: Rows(make(*shape), make(*shape[:2], shape[3], shape[2]))
    return tuple(rows() for _ in range(config.layers))

  def fit(x: jax.Array, axis: int) -> jax.Array:
    kept = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
    return jnp.pad(kept, [(0, (length - kept.shape[axis]) * (i == axis)) for i in range(4)])

  def local(keys, values, source):
    return Rows(fit(keys[source[0]], 3), fit(values[source[0]], 2))

  specs = (spec(), spec(), _first(source))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=spec())
  source = split(source)
  return tuple(mapped(own.keys, own.values, source) for own in view)


def seat(config: ModelConfig, view: View, pages: Pages, rows: jax.Array, table: jax.Array) -> View:
  """The view with some rows copied from pages.

  Args:
    config: the model.
    view: before.
    pages: of all sequences.
    rows: [D, F] int32, rows of the part; past the end for none.
    table: [D, F, P] int32, their first pages; what is behind them stays as it is.
  """
  width = config.head_dim
  start = layout.value_offset(width, width)
  merge = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def local(keys, values, pages, rows, table):
    own = pages[table[0]]  # [F, P, G, rows, W]
    new_keys = merge(own[..., :width].transpose(0, 2, 4, 1, 3), 3)
    new_values = merge(own[..., start:].transpose(0, 2, 1, 3, 4), 2)
    end = new_values.shape[2]
    return Rows(
      keys.at[rows[0], :, :, :end].set(new_keys, mode="drop"),
      values.at[rows[0], :, :end].set(new_values, mode="drop"),
    )

  specs = (spec(), spec(), spec(), _first(rows), _first(table))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=spec())
  rows, table = split(rows), split(table)
  return tuple(mapped(*own, some, rows, table) for own, some in zip(view, pages))


def store(
  config: ModelConfig, pages: Pages, view: View, rows: jax.Array, table: jax.Array
) -> Pages:
  """Pages with some rows of the view written into them.

  Args:
    config: the model.
    pages: before.
    view: of all samples.
    rows: [D, F] int32, rows of the part; any for none.
    table: [D, F, T / rows of a page] int32, the page for each part of a row; the last page, which
      no sequence has, for what is not written.
  """
  gap = layout.value_offset(config.head_dim, config.head_dim) - config.head_dim

  def local(pages, keys, values, rows, table):
    size = pages.shape[2]
    own_keys, own_values = keys[rows[0]], values[rows[0]]  # [F, G, K, T], [F, G, T, K]
    cut = lambda x, axis: x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    own_keys = cut(own_keys, 3).transpose(0, 3, 1, 4, 2)  # [F, P, G, rows, K]
    own_values = cut(own_values, 2).swapaxes(1, 2)
    own_keys = jnp.pad(own_keys, (*((0, 0),) * 4, (0, gap)))
    return pages.at[table[0]].set(jnp.concatenate([own_keys, own_values], -1))

  specs = (spec(), spec(), spec(), _first(rows), _first(table))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=spec())
  rows, table = split(rows), split(table)
  return tuple(mapped(some, *own, rows, table) for some, own in zip(pages, view))


def copy(pages: Pages, source: jax.Array, target: jax.Array) -> Pages:
  """Pages with those of `source` [D, F] int32 copied to `target` [D, F] (copy on write)."""

  def local(pages, source, target):
    return pages.at[target[0]].set(pages[source[0]])

  specs = (spec(), _first(source), _first(target))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=spec())
  source, target = split(source), split(target)
  return tuple(mapped(own, source, target) for own in pages)


def attend_row(config: ModelConfig, own: Rows, position: jax.Array) -> Attend:
  """Attention of one new token per row over one layer's view; keeps the view with it written.

  Args:
    config: the model.
    own: the layer.
    position: [R] int32, where the new token stands.
  """

  def local(q, k, v, keys, values, position):
    rows = jnp.arange(q.shape[0])
    keys = keys.at[rows, :, :, position].set(k[:, 0], mode="drop", unique_indices=True)
    values = values.at[rows, :, position].set(v[:, 0], mode="drop", unique_indices=True)
    out = cached_attention(q[:, 0], keys, values, position, scale=config.head_dim**-0.5)
    return out[:, None], Rows(keys, values)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array):
    heads = USE.spec("batch", None, "heads", None)
    kv_heads = USE.spec("batch", None, "kv_heads", None)
    specs = (heads, kv_heads, kv_heads, spec(), spec(), USE.spec("batch"))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(heads, spec()))
    return mapped(q, k, v, own.keys, own.values, position)

  return attend


def attend_pages(
  config: ModelConfig,
  own: jax.Array,
  lengths: jax.Array,
  table: jax.Array,
  starts: jax.Array | None = None,
) -> Attend:
  """Attention of new tokens over one layer's pages; keeps the pages with them written.

  Args:
    config: the model.
    own: the layer's pages.
    lengths: [R] or [D, N] int32, tokens of each sequence, the new ones included.
    table: [R, P] or [D, N, P] int32, pages within the part.
    starts: [D, N + 1] int32, where each sequence begins among the new tokens of its part. None
      where queries are [R, C, H, K], with C new tokens of each sequence; else they are
      [D, S, H, K].
  """
  heads, kv_heads = (USE.spec("batch", None, name, None) for name in ("heads", "kv_heads"))
  chip = sharding.chip()

  def local(q, k, v, own, lengths, table, *starts):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    begin = starts[0][0] if starts else jnp.arange(len(lengths) + 1, dtype=jnp.int32) * q.shape[1]
    out, own = ragged_paged_attention(
      flat(q),
      flat(k),
      flat(v),
      own,
      kv_lengths=lengths.reshape(-1),
      page_table=table.reshape(-1, table.shape[-1]),
      q_starts=begin,
      scale=config.head_dim**-0.5,
      chip=chip,
    )
    return out.reshape(q.shape), own

  places = (lengths, table) if starts is None else (lengths, table, starts)
  specs = (heads, kv_heads, kv_heads, spec(), *map(_first, places))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=(heads, spec()), check_vma=False)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array):
    q, k, v = jax.reshard(q, heads), jax.reshard(k, kv_heads), jax.reshard(v, kv_heads)
    return mapped(q, k, v, own, *places)

  return attend
