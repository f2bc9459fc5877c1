"""Keys and values on the device: pages between launches, rows of one view within a launch.

Letters: R rows (samples of a launch), L layers, H query heads, G key/value heads, K head width,
T positions of the view, C tokens that a launch may draw, W entries of a row of a page.

A step that gathered pages in every layer would copy the whole cache for every token. A launch
gathers the pages of its rows once, decodes on the view and writes the pages back that it filled.
The view is keys [R, G, K, T] and values [R, G, T, K]: a loop updates each in place, and the
products of a step need no transposition of it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kernels.flash_attention.xla import cached_attention
from kernels.ragged_paged_attention import pages as layout
from pt_jax.models.config import ModelConfig
from pt_jax.models.decoder import Attend
from pt_jax.sharding import USE

Pages = tuple[jax.Array, ...]  # L of [pages, G, rows, W], in the compute dtype


@flax.struct.dataclass
class View:
  """Keys and values of the rows of a launch."""

  keys: tuple[jax.Array, ...]  # L of [R, G, K, T]
  values: tuple[jax.Array, ...]  # L of [R, G, T, K]


def spec() -> jax.P:
  """Of pages and of views: the parts of the batch, then heads."""
  return USE.spec("batch", "kv_heads", None, None)


def empty(config: ModelConfig, pages: int, rows: int) -> Pages:
  """Pages of zeros, `pages` in all parts of the batch together, of `rows` tokens each."""
  width = layout.row_width(config.head_dim, config.head_dim)
  shape = (pages, config.kv_heads, rows, width)
  make = lambda: jnp.zeros(shape, config.compute_dtype, out_sharding=spec())
  return tuple(make() for _ in range(config.layers))


def gather(config: ModelConfig, pages: Pages, table: jax.Array) -> View:
  """The view of rows whose pages [R, T / rows] `table` names (within their part)."""
  width = config.head_dim
  start = layout.value_offset(width, width)

  def local(pages, table):
    own = pages[table]  # [R, P, G, rows, W]
    merge = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    keys = merge(own[..., :width].transpose(0, 2, 4, 1, 3), 3)
    return keys, merge(own[..., start:].transpose(0, 2, 1, 3, 4), 2)

  mapped = jax.shard_map(
    local, in_specs=(spec(), USE.spec("batch", None)), out_specs=(spec(), spec())
  )
  return View(*zip(*(mapped(own, table) for own in pages)))


def write_back(
  config: ModelConfig, pages: Pages, view: View, first: jax.Array, table: jax.Array
) -> Pages:
  """Pages with those of a launch written from its view.

  Args:
    config: the model.
    pages: before the launch.
    view: after it.
    first: [R] int32, which of its pages each row wrote to first.
    table: [R, w] int32, pages for `first` and those behind it; past the end for none.
  """

  def local(pages, keys, values, first, table):
    size = pages.shape[2]
    count = keys.shape[3] // size
    rows = jnp.arange(keys.shape[0])[:, None]
    index = first[:, None] + jnp.arange(table.shape[1])
    table = jnp.where(index < count, table, pages.shape[0])
    index = jnp.minimum(index, count - 1)
    cut = lambda x, axis: x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    # Advanced indices that are apart go to the front: [R, w, G, ...].
    new_keys = cut(keys, 3)[rows, :, :, index].swapaxes(-1, -2)
    new_values = cut(values, 2)[rows, :, index]
    gap = layout.value_offset(config.head_dim, config.head_dim) - config.head_dim
    new_keys = jnp.pad(new_keys, (*((0, 0),) * 4, (0, gap)))
    return pages.at[table].set(jnp.concatenate([new_keys, new_values], -1), mode="drop")

  row = USE.spec("batch")
  specs = (spec(), spec(), spec(), row, USE.spec("batch", None))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=spec())
  layers = zip(pages, view.keys, view.values)
  return tuple(mapped(own, keys, values, first, table) for own, keys, values in layers)


def attend_cached(
  config: ModelConfig, keys: jax.Array, values: jax.Array, position: jax.Array
) -> Attend:
  """Attention of one new token per row over one layer's view; keeps the view with it written.

  Args:
    config: the model.
    keys: [R, G, K, T].
    values: [R, G, T, K].
    position: [R] int32, where the new token stands.
  """

  def local(q, k, v, keys, values, position):
    rows = jnp.arange(q.shape[0])
    keys = keys.at[rows, :, :, position].set(k[:, 0], mode="drop", unique_indices=True)
    values = values.at[rows, :, position].set(v[:, 0], mode="drop", unique_indices=True)
    out = cached_attention(q[:, 0], keys, values, position, scale=config.head_dim**-0.5)
    return out[:, None], keys, values

  def attend(q: jax.Array, k: jax.Array, v: jax.Array):
    heads = USE.spec("batch", None, "heads", None)
    kv_heads = USE.spec("batch", None, "kv_heads", None)
    specs = (heads, kv_heads, kv_heads, spec(), spec(), USE.spec("batch"))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(heads, spec(), spec()))
    out, new_keys, new_values = mapped(q, k, v, keys, values, position)
    return out, (new_keys, new_values)

  return attend
