"""Drawing the next token. B sequences, V tokens; every row has its own key."""

import jax
import jax.numpy as jnp

from pt_jax.rollout.rollouts import SamplingParams

CHUNK = 128  # tokens whose weights are summed by one matrix product


def sample(
  logits: jax.Array, keys: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row.

  Args:
    logits: [B, V] float32.
    keys: [B] PRNG keys.
    params: how to draw; see `SamplingParams`. Static.

  Returns:
    tokens [B] int32, and their log-probs [B] float32 under the full softmax at the temperature
    (greedy: at temperature 1), before top-k, top-p and min-p.
  """
  logprobs = jax.nn.log_softmax(logits / (params.temperature or 1.0))
  if params.temperature == 0:
    tokens = jnp.argmax(logits, -1)
  else:
    weights = jnp.where(jnp.isneginf(keep_likely(logits, params)), 0, jnp.exp(logprobs))
    tokens = choose(weights, jax.vmap(jax.random.uniform)(keys))
  hit = jnp.arange(logits.shape[-1]) == tokens[:, None]
  return tokens.astype(jnp.int32), jnp.where(hit, logprobs, 0).sum(-1)


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


def keep_likely(logits: jax.Array, params: SamplingParams) -> jax.Array:
  """Sets to -inf what top-k, then min-p, then top-p cut from [B, V]; the most likely token stays.

  Top-p keeps the shortest prefix, in order of probability, whose mass reaches top_p, of what the
  other two left (renormalised), as vLLM and transformers do; of equally likely tokens all stay.

  Bounds are taken from the logits as they came in, and compared with those: a value that a compiler
  computes in two places may differ in its last bit, and the token that is the bound would be cut.
  """
  kept = logits
  if params.top_k:
    lowest = jax.lax.top_k(logits, min(params.top_k, logits.shape[-1]))[0][:, -1:]
    kept = jnp.where(logits < lowest, -jnp.inf, kept)
  if params.min_p > 0:
    lowest = logits.max(-1, keepdims=True) + params.temperature * jnp.log(params.min_p)
    kept = jnp.where(logits < lowest, -jnp.inf, kept)
  if params.top_p < 1:
    ordered = jnp.sort(kept, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered / params.temperature)
    before = jnp.cumsum(probs, -1) - probs
    lowest = jnp.where(before < params.top_p, ordered, jnp.inf).min(-1, keepdims=True)
    kept = jnp.where(logits < lowest, -jnp.inf, kept)
  return kept
