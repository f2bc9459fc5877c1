"""Log-prob, entropy and most likely token from hidden states, without ever holding [B, S, V].

The vocabulary is visited in chunks, forward and backward; where it is split over `tensor`, each shard
visits its own part. N is B * S on one device, D the width, C a chunk of the vocabulary.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.sharding import USE

TENSOR = "tensor"


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
  """`token_statistics` aligned with the token that is predicted: entry t speaks of tokens[:, t] given
  what stands before it. Entry 0 is 0, and so is meaningless at the first token of any segment."""
  labels = jnp.roll(tokens, -1, axis=1)
  stats = token_statistics(hidden, unembedding, labels, temperature=temperature, chunk=chunk)
  first = jnp.arange(tokens.shape[1]) == 0
  return jax.tree.map(lambda x: jnp.where(first, 0, jnp.roll(x, 1, axis=1)), stats)


def _divisor(size: int, most: int) -> int:
  """The largest divisor of size that is at most `most`."""
  return next(d for d in range(min(size, most), 0, -1) if size % d == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _statistics(h, w, labels, temperature, chunk):
  """h [N, D], w [V/t, D], labels [N] -> logprob, entropy, top1, each [N]; inside shard_map."""
  return _forward(h, w, labels, temperature, chunk)[0]


def _chunks(w, chunk):
  """The shard cut into chunks [n, C, D], and the vocabulary id of each chunk's first row [n]."""
  start = jax.lax.axis_index(TENSOR) * w.shape[0]
  return w.reshape(-1, chunk, w.shape[1]), start + jnp.arange(w.shape[0] // chunk) * chunk


def _logits(h, w, temperature):
  return jnp.einsum("nd,cd->nc", h, w.astype(h.dtype), preferred_element_type=jnp.float32) / temperature


def _forward(h, w, labels, temperature, chunk):
  """Running max, sum of exp, sum of exp * logit and label logit over the chunks, then over shards."""

  def visit(carry, part):
    top, total, weighted, label, best = carry
    rows, first = part
    z = _logits(h, rows, temperature)
    ids = first + jnp.arange(z.shape[1])
    highest = z.max(-1)
    new = jnp.maximum(top, highest)
    p, keep = jnp.exp(z - new[:, None]), jnp.exp(top - new)
    return (
      new,
      total * keep + p.sum(-1),
      weighted * keep + (p * z).sum(-1),
      label + jnp.where(ids == labels[:, None], z, 0).sum(-1),
      jnp.where(highest > top, first + jnp.argmax(z, -1), best).astype(jnp.int32),
    ), None

  varying = jax.typeof(labels).vma | {TENSOR}
  zeros = jax.lax.pvary(jnp.zeros(h.shape[:1], jnp.float32), tuple(varying))
  start = (zeros - jnp.inf, zeros, zeros, zeros, zeros.astype(jnp.int32))
  parts = _chunks(w, chunk)
  if parts[0].shape[0] == 1:
    (top, total, weighted, label, best), _ = visit(start, jax.tree.map(lambda x: x[0], parts))
  else:
    (top, total, weighted, label, best), _ = jax.lax.scan(visit, start, parts)
  highest = jax.lax.pmax(top, TENSOR)
  scale = jnp.exp(top - highest)
  total, weighted, label = jax.lax.psum((total * scale, weighted * scale, label), TENSOR)
  lse = highest + jnp.log(total)
  vocab = jnp.iinfo(jnp.int32).max
  best = jax.lax.pmin(jnp.where(top == highest, best, vocab), TENSOR)
  entropy = lse - weighted / total
  return (label - lse, entropy, best), (h, w, labels, lse, entropy)


def _backward(temperature, chunk, saved, cotangents):
  """dz = g_logprob (onehot - p) - g_entropy p (log p + entropy), chunk by chunk."""
  h, w, labels, lse, entropy = saved
  g_logprob, g_entropy, _ = cotangents

  def visit(dh, part):
    rows, first = part
    z = _logits(h, rows, temperature)
    p = jnp.exp(z - lse[:, None])
    hit = first + jnp.arange(z.shape[1]) == labels[:, None]
    dz = jnp.where(hit, g_logprob[:, None], 0) - p * (
      g_logprob[:, None] + g_entropy[:, None] * (z - lse[:, None] + entropy[:, None])
    )
    dz = (dz / temperature).astype(h.dtype)
    dh = dh + jnp.einsum("nc,cd->nd", dz, rows.astype(h.dtype), preferred_element_type=jnp.float32)
    return dh, jnp.einsum("nc,nd->cd", dz, h, preferred_element_type=jnp.float32)

  varying = jax.typeof(h).vma | {TENSOR}
  dh = jax.lax.pvary(jnp.zeros(h.shape, jnp.float32), tuple(varying))
  parts = _chunks(w, chunk)
  if parts[0].shape[0] == 1:
    dh, dw = visit(dh, jax.tree.map(lambda x: x[0], parts))
  else:
    dh, dw = jax.lax.scan(visit, dh, parts)
  dh = jax.lax.psum(dh, TENSOR).astype(h.dtype)
  over = tuple(jax.typeof(dw).vma - jax.typeof(w).vma)
  return dh, jax.lax.psum(dw.reshape(w.shape), over).astype(w.dtype), None


_statistics.defvjp(_forward, _backward)
