"""Named shapes: those of models for the schedule, and every feature once in small ones.

qwen3_8b: 4096 tokens of width 4096 and a vocabulary of 151,936, which no tile divides.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.case import Case, Program
from kernels.linear_logprob.statistics import linear_logprob

SMALL = {"rows": 128, "tokens": 256, "backward_rows": 128, "backward_tokens": 256}


def program(
  rows: int,
  width: int,
  vocabulary: int,
  *,
  backward: bool = False,
  label_sets: int = 1,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  **options,
) -> Program:
  """The statistics of rows, or gradients of the sum of log-probs, entropy and lse."""

  def build(chip: str):
    apply = functools.partial(linear_logprob, chip=chip, **options)

    def total(hidden, matrix, labels):
      stats = apply(hidden, matrix, labels)
      return stats.logprobs.sum() + stats.entropy.sum() + stats.lse.sum()

    arguments = (
      jax.ShapeDtypeStruct((rows, width), dtype),
      jax.ShapeDtypeStruct((vocabulary, width), dtype),
      jax.ShapeDtypeStruct((rows, label_sets), jnp.int32),
    )
    return jax.grad(total, (0, 1)) if backward else apply, arguments

  return build


def _model(name: str, width: int, vocabulary: int, *, budget: bool = False) -> tuple[Case, ...]:
  """Forward, and forward with backward, of 4096 tokens of a model. FLOPs: one product forward, two
  backward; what is computed again is no use."""
  flops = 2.0 * 4096 * width * vocabulary
  shape = (4096, width, vocabulary)
  return (
    Case(f"{name}_forward", program(*shape), flops=flops, budget=budget),
    Case(f"{name}_backward", program(*shape, backward=True), flops=3 * flops, budget=budget),
  )


CASES = (
  *_model("qwen3_06b", 1024, 151_936),
  *_model("qwen3_8b", 4096, 151_936, budget=True),
  Case("float32", program(128, 256, 700, backward=True, dtype=jnp.float32, tiles=SMALL)),
  Case(
    "features",
    program(
      200, 320, 700, backward=True, label_sets=3, temperature=0.7, soft_cap=30.0, tiles=SMALL
    ),
  ),
)
