"""Named shapes of attention: what is compiled for every chip, and whose schedule is measured."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.case import Case
from kernels.flash_attention.attention import flash_attention

ROW = 4096


def program(
  gradient: bool = False,
  *,
  batch: int = 1,
  rows: int = ROW,
  heads: int = 8,
  groups: int = 8,
  width: int = 128,
  value_width: int | None = None,
  dtype: str = "bfloat16",
  sinks: bool = False,
  offset: bool = False,
  shared: bool = False,
  **features: Any,
):
  """Attention of packed rows to themselves, or the gradients of its inputs through out and lse."""

  def build(chip: str):
    def call(q, k, v, segments, logits, start, prefixes):
      return flash_attention(
        q,
        k,
        v,
        q_segments=segments,
        k_segments=segments,
        q_offset=start if offset else 0,
        scale=width**-0.5,
        sinks=logits if sinks else None,
        q_prefixes=prefixes if shared else None,
        return_lse=True,
        chip=chip,
        **features,
      )

    def total(*arrays):
      out, lse = call(*arrays)
      return out.astype(jnp.float32).sum() + lse.sum()

    wanted = (0, 1, 2, 4) if sinks else (0, 1, 2)
    shape = lambda *sizes: jax.ShapeDtypeStruct((batch, rows, *sizes), jnp.dtype(dtype))
    arrays = (
      shape(heads, width),
      shape(groups, width),
      shape(groups, value_width or width),
      jax.ShapeDtypeStruct((batch, rows), jnp.int32),
      jax.ShapeDtypeStruct((heads,), jnp.float32),
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.ShapeDtypeStruct((batch, rows), jnp.int32),
    )
    return (jax.grad(total, wanted) if gradient else call), arrays

  return build


FORWARD = 4 * 8 * ROW * ROW * 128 / 2  # FLOPs under a causal mask
# 8 heads of 4 x 4 blocks of 1024, and the pipeline fills and drains. A turn has 4 blocks of keys
# forward, and 4 or 2 of queries backward (`kernels.tiles`).
_FOURS, _TWOS = ("forward", "v5e", "v5p"), "backward"
TURNS = dict.fromkeys(_FOURS, (8 * 4 + 2.0,)) | {_TWOS: (8 * 6 + 2.0,)}
DENSE_TURNS = dict.fromkeys(_FOURS, (8 * 4 + 2.0,)) | {_TWOS: (8 * 8 + 2.0,)}
# Whole, masked and diagonal blocks, for each block of these turns.
KINDS = dict.fromkeys(_FOURS, (6 / 16, 0.0, 4 / 16)) | {_TWOS: (6 / 12, 0.0, 4 / 12)}
DENSE_KINDS = {"": (1.0, 0.0)}
# 8 completions of 380 tokens behind a prompt of 1024 that stands once, its last token with each of
# them: 9 of 16 blocks of 1024 are live. With a prompt each they take 4 rows of 4096 and 24 blocks.
SHARED = 4 * 8 * 128 * (1023 * 1024 / 2 + 8 * (381 * 1023 + 381 * 382 / 2))
SHARED_KINDS = dict.fromkeys(_FOURS, (0.0, 5 / 16, 4 / 16)) | {_TWOS: (0.0, 5 / 12, 4 / 12)}


def _pair(name: str, slow: bool = False, **shape: Any) -> tuple[Case, Case]:
  """Forward and backward of one shape; `slow` of the latter."""
  both = functools.partial(program, **shape)
  return Case(name, both()), Case(f"{name}_backward", both(True), slow=slow)


CASES: tuple[Case, ...] = (
  Case("causal_4096", program(), flops=FORWARD, turns=TURNS, kinds=KINDS, budget=True),
  Case(
    "causal_4096_backward",
    program(True),
    flops=3.5 * FORWARD,
    turns=TURNS,
    kinds=KINDS,
    budget=True,
    slow=True,
  ),
  # Whole blocks alone: cycles of a turn are those of all its blocks.
  Case(
    "dense_4096_backward",
    program(True, causal=False),
    flops=7 * FORWARD,
    turns=DENSE_TURNS,
    kinds=DENSE_KINDS,
    slow=True,
  ),
  Case("shared_prefix", program(shared=True), flops=SHARED, turns=TURNS, kinds=SHARED_KINDS),
  Case(
    "shared_prefix_backward",
    program(True, shared=True),
    3.5 * SHARED,
    turns=TURNS,
    kinds=SHARED_KINDS,
    slow=True,
  ),
  # The families of the zoo, in packed rows.
  *_pair("qwen3_8b", heads=32, groups=8),
  *_pair("llama3_1b", heads=32, groups=8, width=64),
  *_pair("qwen2_5_0_5b", heads=14, groups=2, width=64, offset=True),
  *_pair("gemma2_9b", heads=16, groups=8, width=256, window=4096, soft_cap=50.0),
  *_pair("gpt_oss", heads=64, groups=8, width=64, window=128, sinks=True),
  *_pair("mla_widths", slow=True, heads=16, groups=16, width=192, value_width=128),
  *_pair("float32", batch=2, rows=250, heads=4, groups=2, dtype="float32", causal=False),
)
