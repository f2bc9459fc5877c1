"""Kernels of other libraries as cases, for the table of `python -m kernels.schedule`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.case import Case, Program

# One sequence, causal: what the cases "causal_4096" of ours compute.
BATCH, HEADS, LENGTH, WIDTH = 1, 8, 4096, 128
FORWARD = 4 * BATCH * HEADS * LENGTH**2 * WIDTH / 2  # FLOPs, the causal half
BACKWARD = 3.5  # forward and backward, in forward passes: 2 and 5 products


def live(query_block: int, key_block: int) -> float:
  """The share of blocks that a causal mask leaves something of."""
  queries, keys = LENGTH // query_block, LENGTH // key_block
  ends = [(i + 1) * query_block for i in range(queries)]
  return sum(j * key_block < end for end in ends for j in range(keys)) / (queries * keys)


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
  """Gradients of the sum of what it returns."""
  total = lambda *arguments: function(*arguments).astype(jnp.float32).sum()
  return jax.grad(total, (0, 1, 2))


def _heads_first() -> tuple[jax.ShapeDtypeStruct, ...]:
  return (jax.ShapeDtypeStruct((BATCH, HEADS, LENGTH, WIDTH), jnp.bfloat16),) * 3


def jax_flash(block: int, gradient: bool = False) -> Program:
  """`jax.experimental.pallas.ops.tpu.flash_attention` in square blocks."""

  def program(_: str):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv")
    names += ("block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
    sizes = flash.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    attend = functools.partial(
      flash.flash_attention, causal=True, sm_scale=WIDTH**-0.5, block_sizes=sizes
    )
    return with_gradient(attend) if gradient else attend, _heads_first()

  return program


def jax_splash(block: int, gradient: bool = False) -> Program:
  """`jax.experimental.pallas.ops.tpu.splash_attention` in square blocks, its backward fused."""

  def program(_: str):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    sizes: dict[str, Any] = dict.fromkeys((*names, "block_kv_dkv_compute"), block)
    kernel: Callable[..., Any] = splash.make_splash_mha(
      masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS),
      head_shards=1,
      q_seq_shards=1,
      block_sizes=splash.BlockSizes(use_fused_bwd_kernel=True, **sizes),
    )
    attend = lambda q, k, v: jax.vmap(kernel)(q, k, v)
    return with_gradient(attend) if gradient else attend, _heads_first()

  return program


def jax_ragged(sequences: int, new: int, length: int, query_heads: int) -> Program:
  """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`: each of `sequences` has `length`
  tokens, of which the last `new` are queries; pages of 16, 8 key heads."""

  def program(_: str):
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

    page, key_heads = 16, 8
    pages = length // page
    states = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    counts = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    attend = functools.partial(
      ragged.ragged_paged_attention,
      sm_scale=WIDTH**-0.5,
      num_kv_pages_per_block=512 // page,
      num_queries_per_block=min(128, max(32, new)),
    )
    arguments = (
      states(sequences * new, query_heads, WIDTH),
      states(sequences * pages, page, 2 * key_heads, WIDTH),
      counts(sequences),
      counts(sequences, pages),
      counts(sequences + 1),
      counts(1),
    )
    return attend, arguments

  return program


def xla_product(size: int) -> Program:
  """A bfloat16 product of two square matrices by XLA: what a schedule at its best looks like."""
  matrix = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
  return lambda _: (lambda a, b: a @ b, (matrix, matrix))


CASES = (
  Case("xla_product_4096", xla_product(4096), flops=2.0 * 4096**3),
  Case("jax_flash_512", jax_flash(512), flops=FORWARD, active=live(512, 512)),
  Case("jax_flash_1024", jax_flash(1024), flops=FORWARD, active=live(1024, 1024)),
  Case("jax_splash_1024", jax_splash(1024), flops=FORWARD, active=live(1024, 1024)),
  Case(
    "jax_flash_512_backward",
    jax_flash(512, True),
    flops=BACKWARD * FORWARD,
    active=live(512, 512),
  ),
  Case(
    "jax_splash_512_backward",
    jax_splash(512, True),
    flops=BACKWARD * FORWARD,
    active=live(512, 512),
  ),
  Case("jax_ragged_prefill_4096", jax_ragged(1, 4096, 4096, 8), flops=FORWARD),
  Case("jax_ragged_decode_64", jax_ragged(64, 1, 4096, 32), flops=4.0 * 64 * 4096 * 32 * WIDTH),
)
