"""A linear head on the decoder: what reward models and critics are.

Shape letters: B batch, S positions, D width, E members of an ensemble of heads on one trunk.
"""

import jax
import jax.numpy as jnp

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import USE
from pt_jax.weights import Param, Params, Table

HEAD = "value_head"  # its name in the table


def head_row(c: ModelConfig, members: int = 1) -> Param:
  """[E, D], drawn with std 1 / sqrt(D + 1) (arXiv 2009.01325, appendix B.1)."""
  return Param((members, c.width), (None, "embed"), std=(c.width + 1) ** -0.5)


def table(c: ModelConfig, members: int = 1) -> Table:
  """Parameters of the decoder without its output matrix, and of the head."""
  rows = {name: row for name, row in decoder.table(c).items() if name != "unembed"}
  return {**rows, HEAD: head_row(c, members)}


def apply_head(params: Params, c: ModelConfig, hidden: jax.Array) -> jax.Array:
  """hidden [B, S, D] -> [B, S, E] float32, one value a member after having read each token."""
  members = params[HEAD].shape[0]
  head = weights.reshard(params[HEAD], head_row(c, members), USE)
  return jnp.einsum("bsd,ed->bse", hidden.astype(jnp.float32), head.astype(jnp.float32))


def values(
  params: Params,
  c: ModelConfig,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  prefix_ids: jax.Array | None = None,
) -> jax.Array:
  """[B, S, E] float32 of packed rows [B, S]; `params` is a tree of `table(c)`."""
  hidden = decoder.forward(params, c, tokens, positions, segment_ids, prefix_ids)
  return apply_head(params, c, hidden)


def from_decoder(params: Params, head: jax.Array) -> Params:
  """A tree of `table`: the trunk of a trained decoder (or value model) under a head [E, D]."""
  return {name: w for name, w in params.items() if name != "unembed"} | {HEAD: head}
