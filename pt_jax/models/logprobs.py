"""Log-prob, entropy and most likely token from hidden states, without ever holding [B, S, V].

The vocabulary is visited in chunks, forward and backward; where it is split over `tensor`, each
shard visits its own part. N is B * S on one device, D the width, C a chunk of the vocabulary.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.sharding import USE

TENSOR = "tensor"
BATCH_AXES = ("data", "expert", "context")  # the mesh axes that positions are split over


@flax.struct.dataclass
class TokenStatistics:
  """Of the next-token distribution at each position. Gradients flow through the first two."""

  logprobs: jax.Array  # [B, S] float32, log-prob of the label, nats
  entropy: jax.Array  # [B, S] float32, nats
  top1: jax.Array  # [B, S] int32, the most likely token


def token_statistics(
  hidden: jax.Array,
  unembedding: jax.Array,
  labels: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 8192,
) -> TokenStatistics:
  """Statistics of softmax(hidden @ unembedding.T / temperature) at every position, in float32.

  Args:
    hidden: [B, S, D].
    unembedding: [V, D], split over `tensor` along V.
    labels: [B, S] int32, the tokens whose log-prob is wanted.
    temperature: divides the logits.
    chunk: logits held at once per position and device; rounded down to a divisor of the shard.
  """

  def local(h: jax.Array, w: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
    shape = ids.shape
    flat = h.reshape(-1, h.shape[-1])
    out = _statistics(flat, w, ids.reshape(-1), temperature, _divisor(w.shape[0], chunk))
    return tuple(x.reshape(shape) for x in out)

  row = USE.spec("batch", "seq")
  specs = (USE.spec("batch", "seq", "embed"), USE.spec("vocab", "embed"), row)
  out = jax.shard_map(local, in_specs=specs, out_specs=(row,) * 3)(hidden, unembedding, labels)
  return TokenStatistics(*out)


def next_token_statistics(
  hidden: jax.Array,
  unembedding: jax.Array,
  tokens: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 8192,
) -> TokenStatistics:
  """`token_statistics` aligned with the token that is predicted: entry t speaks of tokens[:, t]
  given what stands before it. Entry 0 is 0, and so is meaningless at the first token of any
  segment."""
  stats = token_statistics(
    hidden, unembedding, shift(tokens, -1), temperature=temperature, chunk=chunk
  )
  first = jnp.arange(tokens.shape[1]) == 0
  return jax.tree.map(lambda x: jnp.where(first, 0, shift(x, 1)), stats)


def shift(x: jax.Array, by: int) -> jax.Array:
  """x [B, S] rolled along S, which is whole meanwhile (JAX does not roll a split axis)."""
  whole = jax.reshard(x, USE.spec("batch", None))
  return jax.reshard(jnp.roll(whole, by, axis=1), USE.spec("batch", "seq"))


def _divisor(size: int, most: int) -> int:
  """The largest divisor of size that is at most `most`."""
  return next(d for d in range(min(size, most), 0, -1) if size % d == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _statistics(h, w, labels, temperature, chunk):
  """h [N, D], w [V/t, D], labels [N] -> logprob, entropy, top1, each [N]; inside shard_map."""
  return _forward(h, w, labels, temperature, chunk)[0]


def _chunks(w, chunk):
  """The shard cut into (rows [C, D], vocabulary id of the first of them): the first chunk, and the
  others stacked. A scan that starts from a real chunk needs no neutral element."""
  start = jax.lax.axis_index(TENSOR) * w.shape[0]
  parts = w.reshape(-1, chunk, w.shape[1]), start + jnp.arange(w.shape[0] // chunk) * chunk
  return jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)


def _logits(h, rows, temperature):
  z = jnp.einsum("nd,cd->nc", h, rows.astype(h.dtype), preferred_element_type=jnp.float32)
  return z / temperature


class _Partial(NamedTuple):
  """What is known of the softmax after some chunks; every field is [N]."""

  top: jax.Array  # the highest logit
  total: jax.Array  # sum of exp(logit - top)
  weighted: jax.Array  # sum of exp(logit - top) * logit
  label: jax.Array  # the label's logit, 0 if it is elsewhere
  best: jax.Array  # the token of the highest logit


def _measure(h, labels, temperature, part):
  rows, first = part
  z = _logits(h, rows, temperature)
  top = z.max(-1)
  p = jnp.exp(z - top[:, None])
  hit = first + jnp.arange(z.shape[1]) == labels[:, None]
  label = jnp.where(hit, z, 0).sum(-1)
  return _Partial(
    top, p.sum(-1), (p * z).sum(-1), label, first + jnp.argmax(z, -1).astype(jnp.int32)
  )


def _merge(a: _Partial, b: _Partial) -> _Partial:
  top = jnp.maximum(a.top, b.top)
  keep_a, keep_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
  return _Partial(
    top,
    a.total * keep_a + b.total * keep_b,
    a.weighted * keep_a + b.weighted * keep_b,
    a.label + b.label,
    jnp.where(b.top > a.top, b.best, a.best),
  )


def _forward(h, w, labels, temperature, chunk):
  first, rest = _chunks(w, chunk)
  seen = _measure(h, labels, temperature, first)
  if w.shape[0] > chunk:
    step = lambda seen, part: (_merge(seen, _measure(h, labels, temperature, part)), None)
    seen, _ = jax.lax.scan(step, seen, rest)
  top = jax.lax.pmax(seen.top, TENSOR)
  scale = jnp.exp(seen.top - top)
  total, weighted, label = jax.lax.psum(
    (seen.total * scale, seen.weighted * scale, seen.label), TENSOR
  )
  lse = top + jnp.log(total)
  entropy = lse - weighted / total
  nowhere = jnp.iinfo(jnp.int32).max
  best = jax.lax.pmin(jnp.where(seen.top == top, seen.best, nowhere), TENSOR)
  return (label - lse, entropy, best), (h, w, labels, lse, entropy)


def _backward(temperature, chunk, saved, cotangents):
  """dz = g_logprob (onehot - p) - g_entropy p (log p + entropy), chunk by chunk."""
  h, w, labels, lse, entropy = saved
  g_logprob, g_entropy, _ = cotangents

  def visit(part):
    rows, first = part
    z = _logits(h, rows, temperature)
    p = jnp.exp(z - lse[:, None])
    hit = first + jnp.arange(z.shape[1]) == labels[:, None]
    dz = jnp.where(hit, g_logprob[:, None], 0) - p * (
      g_logprob[:, None] + g_entropy[:, None] * (z - lse[:, None] + entropy[:, None])
    )
    dz = (dz / temperature).astype(h.dtype)
    dh = jnp.einsum("nc,cd->nd", dz, rows.astype(h.dtype), preferred_element_type=jnp.float32)
    return dh, jnp.einsum("nc,nd->cd", dz, h, preferred_element_type=jnp.float32)

  def step(dh, part):
    more, dw = visit(part)
    return dh + more, dw

  first, rest = _chunks(w, chunk)
  dh, dw = visit(first)
  if w.shape[0] > chunk:
    dh, more = jax.lax.scan(step, dh, rest)
    dw = jnp.concatenate([dw[None], more])
  dh = jax.lax.psum(dh, TENSOR).astype(h.dtype)
  whole = BATCH_AXES if jax.lax.axis_size(TENSOR) > 1 else (*BATCH_AXES, TENSOR)
  for axis in whole:  # one at a time: JAX refuses a mix of axes that dw varies over and does not
    dw = jax.lax.psum(dw, axis)
  return dh, dw.reshape(w.shape).astype(w.dtype), None


_statistics.defvjp(_forward, _backward)
