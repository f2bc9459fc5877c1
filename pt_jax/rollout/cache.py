"""The key-value cache of the slots, and the attention that writes and reads it.

Letters: N slots, P prompt positions, T cache positions, L layers, H query heads, G key/value heads,
K head width. The cache is a tuple of one array per layer, keys [N, G, K, T] and values
[N, G, T, K]: a loop updates each in place, and the products of a decode step need no transposition
of it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kernels.flash_attention.xla import cached_attention
from pt_jax.models.config import ModelConfig
from pt_jax.models.decoder import Attend
from pt_jax.sharding import USE


@flax.struct.dataclass
class Cache:
  """Keys and values of what every slot has read so far."""

  keys: tuple[jax.Array, ...]  # L of [N, G, K, T], in the compute dtype
  values: tuple[jax.Array, ...]  # L of [N, G, T, K]


def _spec() -> jax.P:
  return USE.spec("batch", "kv_heads", None, None)


def empty(config: ModelConfig, slots: int, length: int) -> Cache:
  """A cache of zeros for `slots` sequences of at most `length` tokens."""

  def zeros(*shape: int) -> tuple[jax.Array, ...]:
    shape = (slots, config.kv_heads, *shape)
    make = lambda: jnp.zeros(shape, config.compute_dtype, out_sharding=_spec())
    return tuple(make() for _ in range(config.layers))

  return Cache(zeros(config.head_dim, length), zeros(length, config.head_dim))


def insert(
  cache: Cache, layer: int, prompts: tuple[jax.Array, jax.Array], source: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One layer's keys and values with those of prompts at the start of the slots that begin so.

  Args:
    cache: of all layers.
    layer: which one.
    prompts: keys and values [R, P, G, K] of the rows of a prefill.
    source: [N] int32, the row that a slot begins with, -1 for a slot that goes on.

  Returns (keys, values) of the layer.
  """
  rows = USE.spec(None, None, "kv_heads", None)

  def local(keys, values, new_keys, new_values, source):
    length = min(new_keys.shape[1], values.shape[2])
    begins = (source >= 0)[:, None, None, None]
    pick = lambda new, *axes: new[:, :length].transpose(0, *axes)[jnp.maximum(source, 0)]
    write = lambda old, new: jnp.where(begins, new, old)
    keys = keys.at[..., :length].set(write(keys[..., :length], pick(new_keys, 2, 3, 1)))
    values = values.at[:, :, :length].set(write(values[:, :, :length], pick(new_values, 2, 1, 3)))
    return keys, values

  specs = (_spec(), _spec(), rows, rows, USE.spec("batch"))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=(_spec(), _spec()))
  keys, values = jax.reshard(prompts[0], rows), jax.reshard(prompts[1], rows)
  return mapped(cache.keys[layer], cache.values[layer], keys, values, source)


def attend_cached(
  config: ModelConfig, keys: jax.Array, values: jax.Array, position: jax.Array
) -> Attend:
  """Attention of one new token per slot over one layer's cache; keeps the cache with it written.

  Args:
    config: the model.
    keys: [N, G, K, T].
    values: [N, G, T, K].
    position: [N] int32, where the new token stands.
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
    specs = (heads, kv_heads, kv_heads, _spec(), _spec(), USE.spec("batch"))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(heads, _spec(), _spec()))
    out, new_keys, new_values = mapped(q, k, v, keys, values, position)
    return out, (new_keys, new_values)

  return attend
