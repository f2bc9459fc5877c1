"""Attention over packed segments, in plain JAX: the contract that a kernel has to meet.

Letters: B batch, S query rows, T key rows, G key/value heads, R queries per key head, K head width,
V value width. H = G * R query heads.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that sees nothing has no NaN
REMEMBERED = "attention"  # the name under which a rematerialisation policy finds output and lse


@dataclasses.dataclass(frozen=True)
class Features:
  """What the scores go through. Raises ValueError for values that mean nothing."""

  scale: float  # multiplies q k
  causal: bool = True
  window: int | None = None  # query i sees keys i - window + 1 .. i; needs `causal`
  soft_cap: float | None = None  # scores -> c tanh(scores / c), before masking (arXiv 2408.00118)
  by_position: bool = False  # a window measures distances by positions that are given, not by rows

  def __post_init__(self):
    if self.window is not None and self.window < 1:
      raise ValueError(f"flash_attention: expected window >= 1, found {self.window}")
    if self.window is not None and not self.causal:
      raise ValueError("flash_attention: a window looks back only; expected causal=True with it")
    if self.window is None and self.by_position:
      raise ValueError("flash_attention: positions are read by a window only, found no window")
    if self.soft_cap is not None and self.soft_cap <= 0:
      raise ValueError(f"flash_attention: expected soft_cap > 0, found {self.soft_cap}")


def check(q, k, v, q_segments, k_segments, q_prefixes, positions, window, sinks) -> None:
  """Raises AssertionError or ValueError when `attention`'s arguments do not fit each other."""
  chex.assert_rank([q, k, v], 4)
  (batch, queries, heads, width), (_, keys, groups, _) = q.shape, k.shape
  chex.assert_shape(k, (batch, keys, groups, width))
  chex.assert_shape(v, (batch, keys, groups, None))
  chex.assert_shape([q_segments, k_segments], [(batch, queries), (batch, keys)])
  if q_prefixes is not None:
    chex.assert_shape(q_prefixes, (batch, queries))
    if window is not None and positions is None:
      raise ValueError(
        "flash_attention: behind a shared prefix, rows are no distances; expected positions with "
        f"window={window} and q_prefixes, found None"
      )
  if positions is not None:
    chex.assert_shape(list(positions), [(batch, queries), (batch, keys)])
  if heads % groups:
    raise ValueError(f"flash_attention: {heads} query heads do not divide by {groups} key heads")
  if sinks is not None:
    chex.assert_shape(sinks, (heads,))


def attention(
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
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Softmax attention within segments; scores and softmax in float32.

  Query row s stands at q_offset + s, key row t at t. A query attends to the keys of its own segment
  that stand, if `causal`, not behind it and, with a `window`, less than `window` before it. Segment
  ids below 0 attend to nothing and are attended to by nothing.

  With `q_prefixes` it attends to the keys of a second segment as well: continuations of one prefix
  that stand behind it in a row, one after the other, see it and themselves but not each other.

    out = sum_t exp(x_t - lse) v_t,  lse = log(sum_t exp(x_t) + exp(sink)),  x = cap(scale q k)

  A query that sees no key gets zeros, and as its lse the sink, or `MASKED` without one.

  Args:
    q: [B, S, H, K].
    k: [B, T, G, K]; query head h reads key head h // (H / G).
    v: [B, T, G, V].
    q_segments: [B, S] int32.
    k_segments: [B, T] int32.
    q_offset: where query row 0 stands among the key rows.
    scale, causal, window, soft_cap: see `Features`.
    sinks: [H] float32, a logit of each head that joins the denominator only.
    q_prefixes: [B, S] int32, the second segment of each query: its own or one below 0 adds nothing.
    positions: [B, S] and [B, T] int32 of queries and keys, which a window measures distances by
      instead of rows. Needed for a window with `q_prefixes`.
    return_lse: also return the lse.

  Returns:
    [B, S, H, V] in the dtype of v; with `return_lse` also [B, S, H] float32.
  """
  check(q, k, v, q_segments, k_segments, q_prefixes, positions, window, sinks)
  Features(scale, causal, window, soft_cap, positions is not None)
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, groups, heads // groups, width)
  scores = jnp.einsum("bsgrk,btgk->bgrst", q, k, preferred_element_type=jnp.float32)
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  seen = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments >= 0)[:, :, None]
  if q_prefixes is not None:
    seen |= (q_prefixes[:, :, None] == k_segments[:, None, :]) & (q_prefixes >= 0)[:, :, None]
  ago = q_offset + jnp.arange(length)[:, None] - jnp.arange(k.shape[1])
  if causal:
    seen &= ago >= 0
  if window is not None:
    if positions is not None:
      ago = positions[0][:, :, None] - positions[1][:, None, :]
    seen &= ago < window
  seen = seen[:, None, None]
  scores = jnp.where(seen, scores, MASKED)
  logits = jnp.zeros((groups, heads // groups)) if sinks is None else sinks.reshape(groups, -1)
  logits = logits.astype(jnp.float32)[:, :, None, None]
  top = scores.max(-1, keepdims=True)
  top = jax.lax.stop_gradient(top if sinks is None else jnp.maximum(top, logits))
  weights = jnp.where(seen, jnp.exp(scores - top), 0)
  total = weights.sum(-1, keepdims=True)
  if sinks is not None:
    total += jnp.exp(logits - top)
  some = total > 0
  total = jnp.where(some, total, 1)
  out = jnp.einsum("bgrst,btgv->bsgrv", (weights / total).astype(v.dtype), v)
  out = out.reshape(batch, length, heads, -1)
  if not return_lse:
    return out
  lse = jnp.where(some, top + jnp.log(total), MASKED)[..., 0]
  return out, lse.transpose(0, 3, 1, 2).reshape(batch, length, heads)
