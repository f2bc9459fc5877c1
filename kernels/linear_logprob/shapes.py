"""Named shapes: those of models for the schedule, and every feature once in small ones.

Of models: 4096 tokens; Qwen3's vocabulary of 151,936 is one that no tile divides. A case named
"backward" computes the statistics and their gradients.
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


def _flops(width: int, vocabulary: int) -> float:
  """Of one product of 4096 tokens. Backward it is two; what is computed again is no use."""
  return 2.0 * 4096 * width * vocabulary


CASES = (
  Case(
    "qwen3_06b_backward",
    program(4096, 1024, 151_936, backward=True),
    flops=3 * _flops(1024, 151_936),
    budget=True,
  ),
  Case("qwen3_8b_forward", program(4096, 4096, 151_936), flops=_flops(4096, 151_936), slow=True),
  Case(
    "qwen3_8b_backward",
    program(4096, 4096, 151_936, backward=True),
    flops=3 * _flops(4096, 151_936),
    slow=True,
  ),
  Case(
    "llama3_70b_backward",
    program(4096, 8192, 128_256, backward=True),
    flops=3 * _flops(8192, 128_256),
    slow=True,
  ),
  Case("float32", program(128, 256, 700, backward=True, dtype=jnp.float32, tiles=SMALL)),
  Case(
    "features",
    program(
      200, 320, 700, backward=True, label_sets=3, temperature=0.7, soft_cap=30.0, tiles=SMALL
    ),
  ),
)
