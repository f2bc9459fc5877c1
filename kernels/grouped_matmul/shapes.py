"""Named shapes: the experts of a mixture for the schedule, and small ones of every kind.

qwen3_30b: 8192 rows (1024 tokens of 8 experts each) for 16 of 128 experts of 2048 x 768.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.case import Case, Program
from kernels.grouped_matmul.product import grouped_matmul

SMALL = {"rows": 128, "columns": 128, "depth": 128}


def program(
  rows: int,
  depth: int,
  width: int,
  groups: int,
  *,
  backward: bool = False,
  transpose_rhs: bool = False,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  **options,
) -> Program:
  """The product, or the gradients of its sum."""

  def build(chip: str):
    apply = functools.partial(grouped_matmul, transpose_rhs=transpose_rhs, chip=chip, **options)
    total = lambda lhs, rhs, sizes: apply(lhs, rhs, sizes).astype(jnp.float32).sum()
    matrix = (width, depth) if transpose_rhs else (depth, width)
    arguments = (
      jax.ShapeDtypeStruct((rows, depth), dtype),
      jax.ShapeDtypeStruct((groups, *matrix), dtype),
      jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    return jax.grad(total, (0, 1)) if backward else apply, arguments

  return build


CASES = (
  Case("qwen3_30b", program(8192, 2048, 768, 16), flops=2.0 * 8192 * 2048 * 768),
  Case(
    "qwen3_30b_backward",
    program(8192, 2048, 768, 16, backward=True),
    flops=4.0 * 8192 * 2048 * 768,  # the product itself is not needed by its gradients
    slow=True,
  ),
  Case("qwen3_30b_transposed", program(8192, 768, 2048, 16, transpose_rhs=True), slow=True),
  Case("float32", program(200, 256, 300, 5, backward=True, dtype=jnp.float32, tiles=SMALL)),
  Case("transposed", program(200, 256, 300, 5, backward=True, transpose_rhs=True, tiles=SMALL)),
)
