"""The exact KL divergence between the next-token distributions of two models, in chunks.

Over the whole vocabulary at every position, without ever holding [B, S, V]; sharded like
`logprobs.py`, letters as in `kernels/linear_logprob/chunks.py`. The reference is a constant: only
the policy's hidden states and output matrix get a gradient.

KL(p || q) is summed as p (q/p - 1 - log(q/p)): no term is negative and none cancel, so that a
small divergence keeps its digits. Chunks are merged by the chain rule of the KL: the divergence of
two parts is the mean of theirs, weighed by p, plus that of which part the token is in.
"""

import functools
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from kernels import varying
from kernels.linear_logprob import chunks
from pt_jax import weights
from pt_jax.models import vocabulary
from pt_jax.models.vocabulary import TENSOR
from pt_jax.sharding import USE

Direction = Literal["policy_reference", "reference_policy"]  # KL(first || second)


def kl_divergence(
  hidden: jax.Array,
  unembedding: jax.Array,
  reference_hidden: jax.Array,
  reference_unembedding: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 8192,
  direction: Direction = "policy_reference",
) -> jax.Array:
  """KL of softmax(hidden @ unembedding.T / temperature) to the reference's at every position.

  "policy_reference": sum_v p(v) (log p(v) - log q(v)), p the policy's and q the reference's
  distribution; "reference_policy": sum_v q(v) (log q(v) - log p(v)).

  Args:
    hidden: [B, S, D].
    unembedding: [V, D], split over `tensor` along V.
    reference_hidden: [B, S, E], of any width.
    reference_unembedding: [V, E].
    temperature: divides the logits of both.
    chunk: logits held at once per position, device and model; rounded down to a divisor of the
      shard.
    direction: which of the two distributions the mean is over.

  Returns:
    [B, S] float32, nats, >= 0. The reference gets no gradient.
  """
  chex.assert_rank([hidden, reference_hidden, unembedding, reference_unembedding], [3, 3, 2, 2])
  chex.assert_equal_shape_prefix([hidden, reference_hidden], 2)
  chex.assert_equal_shape_prefix([unembedding, reference_unembedding], 1)

  def local(h: jax.Array, w: jax.Array, ref_h: jax.Array, ref_w: jax.Array) -> jax.Array:
    flat, ref_flat = (x.reshape(-1, x.shape[-1]) for x in (h, ref_h))
    w, ref_w = (
      weights.whole(matrix, spec, x.dtype)
      for matrix, x, spec in ((w, h, stored), (ref_w, ref_h, ref_stored))
    )
    size = chunks.divisor(w.shape[0], chunk)
    return _divergence(flat, w, ref_flat, ref_w, temperature, size, direction).reshape(h.shape[:2])

  states = USE.spec("batch", "seq", "embed")
  stored, ref_stored = (jax.typeof(m).sharding.spec for m in (unembedding, reference_unembedding))
  mapped = jax.shard_map(
    local, in_specs=(states, stored, states, ref_stored), out_specs=USE.spec("batch", "seq")
  )
  return mapped(hidden, unembedding, reference_hidden, reference_unembedding)


def next_token_kl(
  hidden: jax.Array,
  unembedding: jax.Array,
  reference_hidden: jax.Array,
  reference_unembedding: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 8192,
  direction: Direction = "policy_reference",
) -> jax.Array:
  """`kl_divergence` aligned with the token that is predicted: entry t speaks of the distributions
  that tokens[:, t] is drawn from. Entry 0 is 0, and so is meaningless at the first token of any
  segment."""
  return vocabulary.at_next_token(
    kl_divergence(
      hidden,
      unembedding,
      reference_hidden,
      reference_unembedding,
      temperature=temperature,
      chunk=chunk,
      direction=direction,
    )
  )


class _Partial(NamedTuple):
  """What is known of both distributions after some chunks; every field is [N]."""

  lse: jax.Array  # logsumexp of the policy's logits
  ref_lse: jax.Array  # and of the reference's
  kl: jax.Array  # between both, given that the token is in these chunks


def _terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """p (q/p - 1 - log(q/p)), whose sum over a distribution is KL(p || q); each is >= 0.

  Near 0 by the series of exp(d) - 1 - d, whose first term left out is d^7 / 5040.
  """
  p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_q - log_p
  small = jnp.clip(d, -0.3, 0.3)
  series = 1 / 2 + small * (1 / 6 + small * (1 / 24 + small * (1 / 120 + small / 720)))
  return jnp.where(small == d, p * small * small * series, q - p * (1 + d))


def _directed(log_p: jax.Array, log_q: jax.Array, direction: Direction) -> jax.Array:
  return _terms(log_p, log_q) if direction == "policy_reference" else _terms(log_q, log_p)


def _mean(part: _Partial, log_p: jax.Array, log_q: jax.Array, direction: Direction) -> jax.Array:
  """A part's share of the whole divergence; log_p and log_q of the part itself."""
  weight = jnp.exp(log_p if direction == "policy_reference" else log_q)
  return weight * part.kl + _directed(log_p, log_q, direction)


def _merge(a: _Partial, b: _Partial, direction: Direction) -> _Partial:
  lse, ref_lse = jnp.logaddexp(a.lse, b.lse), jnp.logaddexp(a.ref_lse, b.ref_lse)
  share = lambda part: _mean(part, part.lse - lse, part.ref_lse - ref_lse, direction)
  return _Partial(lse, ref_lse, share(a) + share(b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _divergence(h, w, ref_h, ref_w, temperature, chunk, direction):
  """h [N, D], w [V/t, D], ref_h [N, E], ref_w [V/t, E] -> [N]; inside shard_map."""
  return _forward(h, w, ref_h, ref_w, temperature, chunk, direction)[0]


def _forward(h, w, ref_h, ref_w, temperature, chunk, direction):
  def measure(part):
    (rows, ref_rows), _ = part
    z = chunks.products(h, rows) / temperature
    ref_z = chunks.products(ref_h, ref_rows) / temperature
    lse, ref_lse = jax.nn.logsumexp(z, -1), jax.nn.logsumexp(ref_z, -1)
    kl = _directed(z - lse[:, None], ref_z - ref_lse[:, None], direction).sum(-1)
    return _Partial(lse, ref_lse, kl)

  merge = functools.partial(_merge, direction=direction)
  part = chunks.fold(measure, merge, (w, ref_w), chunk)
  lse, ref_lse = _whole_logsumexp(part.lse), _whole_logsumexp(part.ref_lse)
  kl = jax.lax.psum(_mean(part, part.lse - lse, part.ref_lse - ref_lse, direction), TENSOR)
  return kl, (h, w, ref_h, ref_w, lse, ref_lse, kl)


def _whole_logsumexp(x: jax.Array) -> jax.Array:
  """logsumexp over the devices of `tensor`."""
  top = jax.lax.pmax(x, TENSOR)
  return top + jnp.log(jax.lax.psum(jnp.exp(x - top), TENSOR))


def _backward(temperature, chunk, direction, saved, g):
  """dz = g p (log p - log q - KL) for KL(p || q), g (p - q) for KL(q || p), chunk by chunk."""
  h, w, ref_h, ref_w, lse, ref_lse, kl = saved

  g = g[:, None] / temperature

  def by_products(x, part):
    (_, ref_rows), _ = part
    log_p = x / temperature - lse[:, None]
    log_q = chunks.products(ref_h, ref_rows) / temperature - ref_lse[:, None]
    p = jnp.exp(log_p)
    if direction == "reference_policy":
      return g * (p - jnp.exp(log_q))
    return g * p * (log_p - log_q - kl[:, None])

  dh, dw = chunks.gradients(by_products, h, (w, ref_w), chunk)
  return varying.like(dh, h), varying.like(dw, w), None, None


_divergence.defvjp(_forward, _backward)
