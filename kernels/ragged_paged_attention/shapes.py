"""Named shapes of ragged paged attention, for tests and static schedules."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.case import Case
from kernels.ragged_paged_attention.pages import row_width


@dataclasses.dataclass(frozen=True)
class Shape:
  """One launch: heads, widths, pages, and what each sequence brings."""

  name: str
  heads: int  # query heads, H
  groups: int  # key/value heads, G
  width: int  # of keys, K
  value_width: int
  sequences: tuple[tuple[int, int], ...]  # (new tokens, tokens with the new ones) of each
  page_rows: int = 64
  dtype: str = "bfloat16"  # of q and the new keys
  kv_dtype: str = "bfloat16"  # of the pages
  window: int | None = None
  soft_cap: float | None = None
  sinks: bool = False

  @property
  def tokens(self) -> int:
    """T, without unused rows at the end."""
    return sum(new for new, _ in self.sequences)

  @property
  def pages_per_sequence(self) -> int:
    return max(-(-length // self.page_rows) for _, length in self.sequences)


# The two that jax's own kernel is compared with: H = 8 without grouping, and 64 long sequences.
PREFILL_4096 = Shape("prefill_4096", 8, 8, 128, 128, ((4096, 4096),))
DECODE_64X4096 = Shape("decode_64x4096", 32, 8, 128, 128, ((1, 4096),) * 64)

# Features of the families in the zoo, one launch of chunks and single tokens each.
MIXED = ((1, 900), (512, 512), (1, 33), (200, 1500), (1, 1), (0, 0), (1, 2048))
FAMILIES = (
  Shape("qwen2_5_0_5b_int8", 14, 2, 64, 64, MIXED, kv_dtype="int8"),
  Shape("gemma2_9b", 16, 8, 256, 256, MIXED, window=512, soft_cap=50.0),
  Shape("gpt_oss", 64, 8, 64, 64, MIXED, window=128, sinks=True),
  Shape("mla_widths", 16, 16, 192, 128, MIXED),
  Shape("qwen3_fp8", 16, 8, 128, 128, MIXED, kv_dtype="float8_e4m3fn"),
)


def arguments(shape: Shape) -> tuple[tuple, dict]:
  """(positional, keyword) arguments of `ragged_paged_attention` as `jax.ShapeDtypeStruct`s."""
  spec = lambda dtype, *size: jax.ShapeDtypeStruct(size, jnp.dtype(dtype))
  count = len(shape.sequences)
  used = sum(-(-length // shape.page_rows) for _, length in shape.sequences)
  width = row_width(shape.width, shape.value_width)
  positional = (
    spec(shape.dtype, shape.tokens, shape.heads, shape.width),
    spec(shape.dtype, shape.tokens, shape.groups, shape.width),
    spec(shape.dtype, shape.tokens, shape.groups, shape.value_width),
    spec(shape.kv_dtype, used, shape.groups, shape.page_rows, width),
  )
  options = {
    "kv_lengths": spec("int32", count),
    "page_table": spec("int32", count, shape.pages_per_sequence),
    "q_starts": spec("int32", count + 1),
  }
  if shape.sinks:
    options["sinks"] = spec("float32", shape.heads)
  if jnp.dtype(shape.kv_dtype).itemsize == 1:
    options["kv_scales"] = spec("float32", 2, shape.groups)
  return positional, options


def _case(shape: Shape, budget: bool = False, **more) -> Case:
  def program(chip: str):
    from kernels.ragged_paged_attention import ragged_paged_attention

    static = {"scale": shape.width**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}
    function = lambda positional, options: ragged_paged_attention(
      *positional, **options, **static, chip=chip, return_lse=shape.sinks
    )
    return function, arguments(shape)

  # The scores below the diagonal of the new tokens, and those of all old tokens.
  scores = sum(new * (length - new) + new * (new + 1) / 2 for new, length in shape.sequences)
  flops = 2 * scores * shape.heads * (shape.width + shape.value_width)
  return Case(shape.name, program, flops=flops, budget=budget, **more)


CASES = (
  _case(PREFILL_4096, budget=True, slow=True),
  _case(DECODE_64X4096, budget=True),
  *(_case(shape) for shape in FAMILIES),
)
