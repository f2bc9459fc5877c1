"""The one public function: which implementation runs where."""

from typing import Any

import jax

from kernels.flash_attention import xla
from kernels.flash_attention.reference import Features, check


def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_segments: jax.Array,
  k_segments: jax.Array,
  q_offset: int | jax.Array = 0,
  scale: float,
  causal: bool = True,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
) -> Any:
  """`reference.attention`: softmax attention within the segments of packed rows.

  Differentiable in q, k, v and sinks, through the output and the lse.

  Args:
    q: [B, S, H, K].
    k: [B, T, G, K]; query head h reads key head h // (H / G).
    v: [B, T, G, V].
    q_segments, k_segments: [B, S] and [B, T] int32; below 0 attends to nothing.
    q_offset: where query row 0 stands among the key rows. What lies behind a block of queries is
      skipped in XLA only where this is a Python int.
    scale: multiplies the scores.
    causal: a query sees the keys up to its own row.
    window: a query sees that many keys, its own included.
    soft_cap: scores -> c tanh(scores / c).
    sinks: [H], a logit of each head that joins the softmax's denominator only.
    return_lse: also return the log of the denominators.

  Returns:
    [B, S, H, V] in the dtype of v; with `return_lse` also [B, S, H] float32.

  Raises ValueError or AssertionError for shapes or features that do not fit, before compilation.
  """
  check(q, k, v, q_segments, k_segments, sinks)
  features = Features(scale, causal, window, soft_cap)
  places = {"q_segments": q_segments, "k_segments": k_segments, "q_offset": q_offset}
  out, lse = xla.attention(q, k, v, **places, features=features, sinks=sinks)
  return (out, lse) if return_lse else out
