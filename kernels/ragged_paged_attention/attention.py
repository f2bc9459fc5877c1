"""The one function of this folder: which form runs where."""

import jax

from kernels.ragged_paged_attention import xla


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
  chip: str | None = None,
) -> tuple[jax.Array, ...]:
  """`reference.attention`: see there for the arguments and what is computed.

  Args:
    chip: what the program is compiled for: None runs plain JAX on any device.
  """
  if chip is not None:
    raise ValueError(f"ragged_paged_attention: expected chip None, found {chip!r}")
  return xla.attention(
    q,
    k_new,
    v_new,
    kv_pages,
    kv_lengths=kv_lengths,
    page_table=page_table,
    q_starts=q_starts,
    scale=scale,
    window=window,
    soft_cap=soft_cap,
    sinks=sinks,
    kv_scales=kv_scales,
    return_lse=return_lse,
  )
