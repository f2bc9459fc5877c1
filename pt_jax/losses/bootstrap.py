"""Bootstrap weights without a draw: each member of an ensemble weighs each group by its hash.

Online bagging (Oza and Russell, 2001) gives example i the weight Poisson(1) in member e. Here the
number is a function of the group's tokens and of e alone, so it is the same in every epoch and does
not depend on microbatches, packing, devices or the seed of the run.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.losses import segments

# P(Poisson(1) <= k) for k = 0..8; one of a million weights would be larger than 9.
_CUMULATIVE = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(9)])


def mix(x: jax.Array) -> jax.Array:
  """The 32-bit finaliser of MurmurHash3: every bit of uint32 `x` changes half of the result's."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def group_hashes(tokens: jax.Array, positions: jax.Array, group_ids: jax.Array) -> jax.Array:
  """[B, S] uint32: of each position its group's tokens and their positions, hashed; 0 on padding.

  A sum modulo 2^32 over the group of mix(mix(token) + position), so it does not matter where in a
  row the group stands.

  Args:
    tokens: [B, S] int32.
    positions: [B, S] int32, counted from 0 in each completion.
    group_ids: [B, S] int32, -1 on padding.
  """
  chex.assert_rank([tokens, positions, group_ids], 2)
  chex.assert_equal_shape([tokens, positions, group_ids])
  each = mix(mix(tokens.astype(jnp.uint32) + jnp.uint32(1)) + positions.astype(jnp.uint32))
  return segments.segment_sum(each, group_ids)


def poisson_weights(hashes: jax.Array, member: int) -> jax.Array:
  """[B, S] float32: Poisson(1) numbers, a function of uint32 `hashes` [B, S] and of the member."""
  drawn = mix(hashes ^ jnp.uint32(0x9E3779B9 * (member + 1) % 2**32))
  share = (drawn >> 8).astype(jnp.float32) * 2.0**-24  # uniform in [0, 1), exact
  over = [(share >= bound).astype(jnp.float32) for bound in _CUMULATIVE]
  return sum(over[1:], over[0])
