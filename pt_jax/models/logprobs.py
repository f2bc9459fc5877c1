"""Log-prob, entropy and most likely token from hidden states, without ever holding [B, S, V].

The vocabulary is visited in chunks, forward and backward; where it is split over `tensor`, each
shard visits its own part. Letters as in `vocabulary.py`.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.models import vocabulary
from pt_jax.models.vocabulary import TENSOR
from pt_jax.sharding import USE


@flax.struct.dataclass
class TokenStatistics:
  """Of the next-token distribution at each position. Gradients flow through all but `top1`."""

  logprobs: jax.Array  # [B, S] float32, log-prob of the label, nats
  entropy: jax.Array  # [B, S] float32, nats
  top1: jax.Array  # [B, S] int32, the most likely token
  logsumexp: jax.Array  # [B, S] float32, log of the sum of exp(logits / temperature)


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
    out = _statistics(flat, w, ids.reshape(-1), temperature, vocabulary.divisor(w.shape[0], chunk))
    return tuple(x.reshape(shape) for x in out)

  row = USE.spec("batch", "seq")
  specs = (USE.spec("batch", "seq", "embed"), USE.spec("vocab", "embed"), row)
  out = jax.shard_map(local, in_specs=specs, out_specs=(row,) * 4)(hidden, unembedding, labels)
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
    hidden, unembedding, vocabulary.shift(tokens, -1), temperature=temperature, chunk=chunk
  )
  return vocabulary.at_next_token(stats)


def next_token_mean_logit(
  hidden: jax.Array, unembedding: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
  """Mean over the vocabulary of the logits / temperature that predict each token, [B, S] float32.

  Minus `next_token_statistics`' logsumexp it is the mean over the vocabulary of log p, which label
  smoothing needs: hidden times the mean row of the output matrix, one row for all V of them.
  """
  row = unembedding.astype(jnp.float32).mean(0)
  mean = jnp.einsum("bsd,d->bs", hidden.astype(jnp.float32), row) / temperature
  return vocabulary.at_next_token(mean)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _statistics(h, w, labels, temperature, chunk):
  """h [N, D], w [V/t, D], labels [N] -> logprob, entropy, top1, lse, each [N]."""
  return _forward(h, w, labels, temperature, chunk)[0]


class _Partial(NamedTuple):
  """What is known of the softmax after some chunks; every field is [N]."""

  top: jax.Array  # the highest logit
  total: jax.Array  # sum of exp(logit - top)
  weighted: jax.Array  # sum of exp(logit - top) * logit
  label: jax.Array  # the label's logit, 0 if it is elsewhere
  best: jax.Array  # the token of the highest logit


def _measure(h, labels, temperature, part):
  (rows,), first = part
  z = vocabulary.logits(h, rows, temperature)
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
  measure = lambda part: _measure(h, labels, temperature, part)
  seen = vocabulary.fold(measure, _merge, (w,), chunk)
  top = jax.lax.pmax(seen.top, TENSOR)
  scale = jnp.exp(seen.top - top)
  total, weighted, label = jax.lax.psum(
    (seen.total * scale, seen.weighted * scale, seen.label), TENSOR
  )
  lse = top + jnp.log(total)
  entropy = lse - weighted / total
  nowhere = jnp.iinfo(jnp.int32).max
  best = jax.lax.pmin(jnp.where(seen.top == top, seen.best, nowhere), TENSOR)
  return (label - lse, entropy, best, lse), (h, w, labels, lse, entropy)


def _backward(temperature, chunk, saved, cotangents):
  """dz = g_logprob (onehot - p) - g_entropy p (log p + entropy) + g_lse p, chunk by chunk."""
  h, w, labels, lse, entropy = saved
  g_logprob, g_entropy, _, g_lse = cotangents
  through_lse = g_logprob - g_lse

  def by_logits(z, part):
    _, first = part
    p = jnp.exp(z - lse[:, None])
    hit = first + jnp.arange(z.shape[1]) == labels[:, None]
    return jnp.where(hit, g_logprob[:, None], 0) - p * (
      through_lse[:, None] + g_entropy[:, None] * (z - lse[:, None] + entropy[:, None])
    )

  return *vocabulary.gradients(by_logits, h, (w,), temperature, chunk), None


_statistics.defvjp(_forward, _backward)
