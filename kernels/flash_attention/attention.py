"""The one public function: which implementation runs where."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import chip as chips
from kernels import tiles as table
from kernels.flash_attention import tpu, xla
from kernels.flash_attention.reference import Features, check
from kernels.flash_attention.tiles import Tiles


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
  q_prefixes: jax.Array | None = None,
  positions: tuple[jax.Array, jax.Array] | None = None,
  return_lse: bool = False,
  tiles: tuple[Tiles, Tiles] | None = None,
  chip: str | None = None,
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
    q_prefixes: [B, S] int32, a second segment whose keys a query sees: the prefix that it shares
      with others. Its own segment or one below 0 adds nothing.
    positions: [B, S] and [B, T] int32 of queries and keys, by which a window measures distances
      instead of by rows. Needed for a window with `q_prefixes`.
    return_lse: also return the log of the denominators.
    tiles: of the forward and the backward kernel; None: those of the checked-in table.
    chip: the TPU to compile for, a name of `kernels.chip.CHIPS`; None: not a TPU, in XLA.

  Returns:
    [B, S, H, V] in the dtype of v; with `return_lse` also [B, S, H] float32.

  Raises ValueError or AssertionError for shapes or features that do not fit, before compilation.
  """
  check(q, k, v, q_segments, k_segments, q_prefixes, positions, window, sinks)
  features = Features(scale, causal, window, soft_cap, positions is not None)
  q_ids, k_ids = _ids(q_segments, k_segments, q_prefixes, positions)
  q, k, v, q_ids, k_ids, sinks = _alike(q, k, v, q_ids, k_ids, sinks)
  places = {"q_ids": q_ids, "k_ids": k_ids, "q_offset": q_offset}
  options = {"features": features, "sinks": sinks}
  if chip is None:
    out, lse = xla.attention(q, k, v, **places, **options)
  else:
    out, lse = tpu.attention(q, k, v, **places, **options, tiles=tiles or default_tiles(chip))
  return (out, lse) if return_lse else out


def default_tiles(chip: str) -> tuple[Tiles, Tiles]:
  """Tiles of the forward and the backward kernel. Raises ValueError for an unknown chip."""
  find = functools.partial(table.find, "flash_attention", chips.get(chip).name)
  return Tiles(**find("forward")), Tiles(**find("backward"))


def _ids(q_segments, k_segments, q_prefixes, positions) -> tuple[jax.Array, jax.Array]:
  """What decides who sees whom, in rows: segment, prefix and position [B, 1 to 3, S] of queries,
  segment and position [B, 1 to 2, T] of keys. The last rows are there where they are read."""
  if positions is not None:
    q_prefixes = q_segments if q_prefixes is None else q_prefixes
    return (
      jnp.stack([q_segments, q_prefixes, positions[0]], 1),
      jnp.stack([k_segments, positions[1]], 1),
    )
  own = q_segments[:, None]
  return own if q_prefixes is None else jnp.stack([q_segments, q_prefixes], 1), k_segments[:, None]


def _alike(*arrays: jax.Array | None) -> list[Any]:
  """Inside of `jax.shard_map`, all arrays varying over the mesh axes that one of them varies over:
  the transpose of this adds up the gradients of those that devices share."""
  varying = [frozenset() if x is None else jax.typeof(x).mat.varying for x in arrays]
  every = frozenset().union(*varying)
  return [
    x if every == own or x is None else jax.lax.pcast(x, tuple(every - own), to="varying")
    for x, own in zip(arrays, varying)
  ]
