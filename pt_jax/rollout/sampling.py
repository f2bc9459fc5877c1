"""Drawing the next token. B sequences, V tokens; every row has its own key and its own options."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from pt_jax.rollout.rollouts import SamplingParams

CHUNK = 128  # tokens whose weights are summed by one matrix product


class Cuts(Protocol):
  """Which tokens may be drawn: numbers for all rows (`SamplingParams`), or arrays [B]."""

  @property
  def temperature(self) -> float | jax.Array: ...
  @property
  def top_k(self) -> int | jax.Array: ...
  @property
  def top_p(self) -> float | jax.Array: ...
  @property
  def min_p(self) -> float | jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Needs:
  """What at least one row of a batch wants; what none wants is not computed."""

  cuts: bool = False  # top-k, top-p or min-p
  top: int = 0  # most likely tokens that are reported
  gumbel: bool = False  # draw by the Gumbel trick: of the engine, whatever the rows want

  @classmethod
  def of(cls, params: SamplingParams) -> "Needs":
    """Of one row."""
    cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return cls(cuts and params.temperature > 0, params.top_logprobs)


def sample(
  logits: jax.Array, keys: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row, all rows alike.

  Args:
    logits: [B, V] float32.
    keys: [B] PRNG keys.
    params: how to draw; see `SamplingParams`. Static.

  Returns:
    tokens [B] int32, and their log-probs [B] float32 under the full softmax at the temperature
    (greedy: at temperature 1), before top-k, top-p and min-p.
  """
  tokens, logprobs, _ = draw(logits, keys, params, Needs.of(params))
  return tokens, logprobs


def scaled_logprobs(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
  """[B, V] log-softmax at the temperature of each row; greedy rows are at temperature 1."""
  temperature = _column(temperature)
  return jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0))


def draw(
  logits: jax.Array,
  keys: jax.Array,
  params: Cuts,
  needs: Needs,
  allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  """Draws one token per row.

  Args:
    logits: [B, V] float32.
    keys: [B] PRNG keys.
    params: how to draw each row.
    needs: of all rows together. Static.
    allowed: [B, V] bool, tokens that may be drawn; of the others the probability is 0.

  Returns:
    tokens [B] int32 and their log-probs [B] as `sample` has them, and the `needs.top` most likely
    tokens with their log-probs, [B, top] each.
  """
  logprobs = scaled_logprobs(logits, params.temperature)
  kept = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
  greedy = jnp.argmax(kept, -1)
  if needs.cuts:
    kept = keep_likely(kept, params)
  masked = jnp.where(jnp.isneginf(kept), -jnp.inf, logprobs)
  if allowed is not None:  # what is left may be so unlikely that its weights are all 0
    masked -= masked.max(-1, keepdims=True)
  if needs.gumbel:
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    drawn = jnp.argmax(masked + noise, -1)
  else:
    drawn = choose(jnp.exp(masked), jax.vmap(jax.random.uniform)(keys))
  tokens = jnp.where(_column(params.temperature)[:, 0] > 0, drawn, greedy).astype(jnp.int32)
  hit = jnp.arange(logits.shape[-1]) == tokens[:, None]
  best, which = jax.lax.top_k(logprobs, min(needs.top, logits.shape[-1]))
  return tokens, jnp.where(hit, logprobs, 0).sum(-1), (which.astype(jnp.int32), best)


def _column(x: float | jax.Array) -> jax.Array:
  """A number or [B] as [1 or B, 1]."""
  return jnp.reshape(jnp.asarray(x), (-1, 1))


def choose(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Draws from unnormalised probabilities by inverting their cumulative sum: one random number a
  row, where the Gumbel trick needs one for every token of the vocabulary.

  Args:
    weights: [B, V] >= 0; a token of weight 0 is never drawn.
    uniform: [B] in [0, 1).

  Returns:
    [B] int32, the first token whose cumulative weight exceeds uniform times the total.

  The sum is one of `CHUNK` weights within sums of chunks, so that its rounding (about 1e-7 of the
  total) does not grow with the vocabulary.
  """
  batch, vocab = weights.shape
  chunks = jnp.pad(weights, ((0, 0), (0, -vocab % CHUNK))).reshape(batch, -1, CHUNK)
  up_to = jnp.triu(jnp.ones((CHUNK, CHUNK), weights.dtype))
  within = jnp.einsum("bnc,cd->bnd", chunks, up_to, precision="highest")
  after = jnp.cumsum(within[:, :, -1], axis=1)
  before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)))
  cumulative = (before[:, :, None] + within).reshape(batch, -1)[:, :vocab]
  index = jnp.arange(vocab, dtype=jnp.int32)
  past = (cumulative > uniform[:, None] * after[:, -1:]) & (weights > 0)
  first = jnp.where(past, index, vocab).min(-1)
  last = jnp.where(weights > 0, index, 0).max(-1)  # where rounding left nothing past the mark
  return jnp.minimum(first, last)


def keep_likely(logits: jax.Array, params: Cuts) -> jax.Array:
  """Sets to -inf what top-k, then min-p, then top-p cut from [B, V]; the most likely token stays.

  Top-p keeps the shortest prefix, in order of probability, whose mass reaches top_p, of what the
  other two left (renormalised), as vLLM and transformers do; of equally likely tokens all stay.

  Bounds are taken from the logits as they came in, and compared with those: a value that a compiler
  computes in two places may differ in its last bit, and the token that is the bound would be cut.
  """
  top_k, top_p, min_p = (_column(x) for x in (params.top_k, params.top_p, params.min_p))
  temperature = _column(params.temperature)
  temperature = jnp.where(temperature > 0, temperature, 1.0)
  ordered = jnp.sort(logits, axis=-1, descending=True)
  index = jnp.arange(logits.shape[-1])
  worst = jnp.where((top_k == 0) | (index < top_k), ordered, jnp.inf).min(-1, keepdims=True)
  least = ordered[:, :1] + temperature * jnp.where(min_p > 0, jnp.log(min_p), -jnp.inf)
  left = jnp.where((ordered < worst) | (ordered < least), -jnp.inf, ordered)
  probs = jax.nn.softmax(left / temperature)
  before = jnp.cumsum(probs, -1) - probs
  mass = jnp.where((before < top_p) | (top_p >= 1), left, jnp.inf).min(-1, keepdims=True)
  lowest = jnp.maximum(jnp.maximum(worst, least), mass)
  return jnp.where(logits < lowest, -jnp.inf, logits)
