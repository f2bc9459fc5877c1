"""Closed-form figures of a model: parameters, FLOPs, bytes. Nothing is compiled.

Letters as in `models.decoder`: D width, H heads, G key/value heads, K head width, F MLP hidden
units, V vocabulary, L layers, S tokens of a sequence.
"""

import math

import jax

from kernels.ragged_paged_attention.pages import row_width
from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.plan.cost import Cost
from pt_jax.sharding import Rules
from pt_jax.weights import Table

BYTES = {"float32": 4, "bfloat16": 2}
ADAM = 2 * BYTES["float32"]  # two moments of a parameter
GRADIENT = BYTES["float32"]  # of the accumulator


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


def prefill_flops(c: ModelConfig, length: int) -> float:
  """`forward_flops` without the output matrix, and of the last block without what comes behind its
  attention: prefill draws nothing."""
  unread = c.vocab_size * c.width + c.width * (c.heads * c.head_dim + 3 * c.hidden)
  return forward_flops(c, length) - 2.0 * unread


def decode_flops(c: ModelConfig, cached: int) -> float:
  """FLOPs of a token that is drawn and attends to `cached` others: 2 (matrices) + 4 L T H K."""
  return 2.0 * multiplied(c) + 4.0 * c.layers * cached * c.heads * c.head_dim


def cache_bytes(c: ModelConfig, tokens: int) -> int:
  """Keys and values of so many tokens, in the compute dtype: 2 L G K each."""
  return 2 * c.layers * c.kv_heads * c.head_dim * tokens * BYTES[c.compute_dtype]


def pages_bytes(c: ModelConfig, tokens: int, tensor: int) -> int:
  """Pages of so many tokens on a device: L G W entries each, W at least 2 K (see
  `kernels.ragged_paged_attention.pages`), over the parts of `tensor`."""
  entries = c.layers * c.kv_heads * row_width(c.head_dim, c.head_dim)
  return tokens * entries * BYTES[c.compute_dtype] // tensor


def decode_attention(c: ModelConfig, rows: int, cached: int, tensor: int) -> Cost:
  """Attention of one new token of each of `rows` samples to `cached` tokens in one layer on one
  device: 4 T H K FLOPs and T G W entries of pages, over the parts of `tensor`."""
  entries = cached * c.kv_heads * row_width(c.head_dim, c.head_dim)
  flops = 4.0 * cached * c.heads * c.head_dim
  return Cost(rows * flops / tensor, rows * entries * BYTES[c.compute_dtype] / tensor)


def prefill_attention(c: ModelConfig, tokens: int, prompt: int, tensor: int) -> Cost:
  """Attention of `tokens` tokens of prompts of length S in one layer on one device: 2 S H K FLOPs
  each; queries, their result, new keys and values and their pages once."""
  entries = 2 * c.heads * c.head_dim + 2 * c.kv_heads * row_width(c.head_dim, c.head_dim)
  flops = 2.0 * prompt * c.heads * c.head_dim
  return Cost(tokens * flops / tensor, tokens * entries * BYTES[c.compute_dtype] / tensor)


def held_bytes(table: Table, rules: Rules, mesh: jax.sharding.Mesh, item: int) -> int:
  """Bytes on one device of arrays like the parameters.

  Args:
    table: of the parameters.
    rules: where they live.
    mesh: its sizes are read.
    item: bytes of an element.
  """
  total = 0
  for _, row in weights.named_rows(table):
    split = [part for part in rules.spec(*row.axes, mesh=mesh) if part]
    names = [n for part in split for n in ((part,) if isinstance(part, str) else part)]
    total += math.prod(row.shape) // math.prod(mesh.shape[name] for name in names)
  return total * item
