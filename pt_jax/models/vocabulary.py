"""The mesh axis that the vocabulary is split over, and statistics at the token they speak of."""

from typing import Any

import jax
import jax.numpy as jnp

from pt_jax.sharding import USE

TENSOR = "tensor"


def shift(x: jax.Array, by: int) -> jax.Array:
  """x [B, S] rolled along S, which is whole meanwhile (JAX does not roll a split axis)."""
  whole = jax.reshard(x, USE.spec("batch", None))
  return jax.reshard(jnp.roll(whole, by, axis=1), USE.spec("batch", "seq"))


def at_next_token(tree: Any) -> Any:
  """Statistics [B, S] of what follows a position, moved to the token that follows; entry 0 is 0."""

  def move(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[1]) == 0, 0, shift(x, 1))

  return jax.tree.map(move, tree)
