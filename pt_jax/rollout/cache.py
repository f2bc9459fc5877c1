"""The key-value cache of the slots, and the attention that writes and reads it.

Letters: N slots, P prompt positions, T cache positions, L layers, H query heads, G key/value heads,
K head width. The cache is a tuple of one array per layer, [N, G, T, K]: a loop updates each in
place, and the products of a decode step need no transposition of it.
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

  keys: tuple[jax.Array, ...]  # L of [N, G, T, K], in the compute dtype
  values: tuple[jax.Array, ...]  # L of [N, G, T, K]


def _spec() -> jax.P:
  return USE.spec("batch", "kv_heads", None, None)


def empty(config: ModelConfig, slots: int, length: int) -> Cache:
  """A cache of zeros for `slots` sequences of at most `length` tokens."""
  shape = (slots, config.kv_heads, length, config.head_dim)
  zeros = lambda: jnp.zeros(shape, config.compute_dtype, out_sharding=_spec())
  layers = range(config.layers)
  return Cache(tuple(zeros() for _ in layers), tuple(zeros() for _ in layers))


def insert(cached: jax.Array, prompts: jax.Array, source: jax.Array) -> jax.Array:
  """Writes the keys (or values) of prompts to the start of the slots that begin with them.

  Args:
    cached: [N, G, T, K].
    prompts: [R, P, G, K], rows of a prefill.
    source: [N] int32, the row that a slot begins with, -1 for a slot that goes on.
  """
  every = jax.reshard(prompts, USE.spec(None, None, "kv_heads", None))

  def local(cached: jax.Array, prompts: jax.Array, source: jax.Array) -> jax.Array:
    length = min(prompts.shape[1], cached.shape[2])
    new = prompts.transpose(0, 2, 1, 3)[jnp.maximum(source, 0), :, :length]
    old = cached[:, :, :length]
    return cached.at[:, :, :length].set(jnp.where((source >= 0)[:, None, None, None], new, old))

  specs = (_spec(), USE.spec(None, None, "kv_heads", None), USE.spec("batch"))
  return jax.shard_map(local, in_specs=specs, out_specs=_spec())(cached, every, source)


def attend_cached(
  config: ModelConfig, keys: jax.Array, values: jax.Array, position: jax.Array
) -> Attend:
  """Attention of one new token per slot over one layer's cache; keeps the cache with it written.

  Args:
    config: the model.
    keys, values: [N, G, T, K].
    position: [N] int32, where the new token stands.
  """

  def local(q, k, v, keys, values, position):
    rows = jnp.arange(q.shape[0])
    keys = keys.at[rows, :, position].set(k[:, 0], mode="drop", unique_indices=True)
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
