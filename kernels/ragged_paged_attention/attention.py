"""The one function of this folder: which form runs where."""

import jax

from kernels.ragged_paged_attention import tpu, xla
from kernels.ragged_paged_attention.layout import Tiles


def ragged_paged_attention(
  q: jax.Array,
  k_new: jax.Array,
  v_new: jax.Array,
  kv_pages: jax.Array,
  *,
  kv_lengths: jax.Array,
  page_table: jax.Array,
  q_starts: jax.Array,
  scale: float,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  kv_scales: jax.Array | None = None,
  return_lse: bool = False,
  tiles: Tiles | None = None,
  chip: str | None = None,
) -> tuple[jax.Array, ...]:
  """`reference.attention`: see there for the arguments and what is computed.

  Args:
    tiles: how the TPU kernel cuts its work; None takes what `kernels.tiles` has for the chip.
    chip: what the program is compiled for, a name of `kernels.chip.CHIPS`; None runs plain JAX on
      any device. On a TPU the pages are written in place if the caller donates them.

  Raises:
    ValueError, AssertionError: shapes, dtypes, options, a chip or tiles that do not fit; on a TPU
      also pages of rows that are not a multiple of 8 (float32), 16 (bfloat16) or 32 (8 bits).
  """
  options = {
    "kv_lengths": kv_lengths,
    "page_table": page_table,
    "q_starts": q_starts,
    "scale": scale,
    "window": window,
    "soft_cap": soft_cap,
    "sinks": sinks,
    "kv_scales": kv_scales,
    "return_lse": return_lse,
  }
  if chip is None:
    return xla.attention(q, k_new, v_new, kv_pages, **options)
  return tpu.attention(q, k_new, v_new, kv_pages, tiles=tiles, chip=chip, **options)
