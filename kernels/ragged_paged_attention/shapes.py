"""Named shapes of ragged paged attention, for tests and static schedules."""

import dataclasses


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

# Heads and widths of the families in the zoo, one launch of chunks and single tokens each.
MIXED = ((1, 900), (512, 512), (1, 33), (200, 1500), (1, 1), (0, 0), (1, 2048))
FAMILIES = (
  Shape("qwen3", 16, 8, 128, 128, MIXED),
  Shape("qwen2_5_0_5b", 14, 2, 64, 64, MIXED),
  Shape("qwen2_5_14b", 40, 8, 128, 128, MIXED),
  Shape("llama3_2_1b", 32, 8, 64, 64, MIXED),
  Shape("gemma2_9b", 16, 8, 256, 256, MIXED, window=512, soft_cap=50.0),
  Shape("gpt_oss", 64, 8, 64, 64, MIXED, window=128, sinks=True),
  Shape("mla_widths", 16, 16, 192, 128, MIXED),
  Shape("qwen3_int8", 16, 8, 128, 128, MIXED, kv_dtype="int8"),
  Shape("qwen3_fp8", 16, 8, 128, 128, MIXED, kv_dtype="float8_e4m3fn"),
)
