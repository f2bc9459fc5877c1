"""What the TPU kernels are said to cost, for XLA's scheduler and for `launch.plan`.

Everything is the worst case of the shapes: packed rows are taken to be one segment each, and
queries to stand at the end of the keys, as on the last device of a split row. Products count for
pairs of a query and a key that the mask allows; bytes are what the grid fetches and writes.
"""

import numpy as np
from jax.experimental import pallas as pl

from kernels.flash_attention.reference import Features
from kernels.flash_attention.tiles import Tiles


def pairs(queries: int, keys: int, features: Features) -> int:
  """Pairs of a query and a key that see each other: S T, half of it if causal and S = T."""
  if not features.causal:
    return queries * keys
  before = np.arange(keys - queries, keys).clip(0) + 1
  return int(np.minimum(before, features.window or keys).sum())


def forward(q, k, v, features: Features, tiles: Tiles) -> pl.CostEstimate:
  """Of two products of every pair, for q [B, H, K, S], k [B, G, T, K], v [B, G, V, T]."""
  (batch, heads, width, queries), (keys, value_width) = q.shape, (k.shape[2], v.shape[2])
  seen, both = pairs(queries, keys, features), width + value_width
  item = q.dtype.itemsize
  turns = max(seen // (tiles.q_block * tiles.k_block), queries // tiles.q_block)
  fetched = turns * tiles.k_block * both * item
  return pl.CostEstimate(
    flops=batch * heads * seen * 2 * both,
    transcendentals=batch * heads * seen,
    bytes_accessed=batch * heads * (fetched + queries * (both * item + 4)),
  )


def backward(x, features: Features, tiles: Tiles) -> pl.CostEstimate:
  """Of five products of every pair, for `tpu_backward.Inputs`; the gradients of queries are fetched
  and written once for every block of keys."""
  (batch, heads, width, queries), (groups, keys, value_width) = x.q.shape, x.v.shape[1:]
  seen, item = pairs(queries, keys, features), x.q.dtype.itemsize
  turns = max(seen // (tiles.q_block * tiles.k_block), keys // tiles.k_block)
  fetched = turns * tiles.q_block * ((width + value_width) * item + 8 + 8 * width)
  of_keys = keys * (3 * width + 2 * value_width) * item
  return pl.CostEstimate(
    flops=batch * heads * seen * 2 * (3 * width + 2 * value_width),
    transcendentals=batch * heads * seen,
    bytes_accessed=batch * (heads * fetched + groups * of_keys),
  )
