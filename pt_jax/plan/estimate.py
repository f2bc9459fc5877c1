"""Closed-form figures of a model and a run: FLOPs, bytes, seconds. Nothing is compiled.

Letters as in `models.decoder`: D width, H heads, G key/value heads, K head width, F MLP hidden
units, V vocabulary, L layers, S tokens of a sequence.
"""

import math

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
ADAM = 2 * BYTES["float32"]  # two moments of a parameter


def parameters(c: ModelConfig) -> int:
  """Number of parameters."""
  return weights.count(decoder.table(c))


def multiplied(c: ModelConfig) -> int:
  """Parameters that a token is multiplied by: all matrices but the embedding that is looked up."""
  rows = weights.named_rows(decoder.table(c))
  total = sum(math.prod(row.shape) for name, row in rows if row.decay)
  return total + c.vocab_size * c.width  # the output matrix, tied or not


def forward_flops(c: ModelConfig, length: int) -> float:
  """FLOPs of a token in a forward pass over sequences of `length` tokens, causal attention.

  2 (matrices) + 2 L S H K: a token attends to (S + 1) / 2 others on average, S / 2 here, and both
  products of attention have 2 H K FLOPs for each.
  """
  return 2.0 * multiplied(c) + 2.0 * c.layers * length * c.heads * c.head_dim


def cache_bytes(c: ModelConfig, tokens: int) -> int:
  """Keys and values of so many tokens, in the compute dtype: 2 L G K each."""
  return 2 * c.layers * c.kv_heads * c.head_dim * tokens * BYTES[c.compute_dtype]
