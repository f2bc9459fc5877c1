"""Drawing the next token. B sequences, V tokens; every row has its own key."""

import jax
import jax.numpy as jnp

from pt_jax.rollout.rollouts import SamplingParams


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
  if params.temperature > 0:
    logits = logits / params.temperature
  logprobs = jax.nn.log_softmax(logits)
  if params.temperature == 0:
    tokens = jnp.argmax(logits, -1)
  else:
    kept = keep_likely(logprobs, params)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(kept + noise, -1)
  hit = jnp.arange(logits.shape[-1]) == tokens[:, None]
  return tokens.astype(jnp.int32), jnp.where(hit, logprobs, 0).sum(-1)


def keep_likely(logprobs: jax.Array, params: SamplingParams) -> jax.Array:
  """Sets to -inf what top-k, then min-p, then top-p cut from [B, V]; the most likely token stays.

  Top-p keeps the shortest prefix, in order of probability, whose mass reaches top_p, of what the
  other two left (renormalised), as vLLM and transformers do; of equally likely tokens all stay.
  """
  if params.top_k:
    lowest = jax.lax.top_k(logprobs, min(params.top_k, logprobs.shape[-1]))[0][:, -1:]
    logprobs = jnp.where(logprobs < lowest, -jnp.inf, logprobs)
  if params.min_p > 0:
    lowest = logprobs.max(-1, keepdims=True) + jnp.log(params.min_p)
    logprobs = jnp.where(logprobs < lowest, -jnp.inf, logprobs)
  if params.top_p < 1:
    probs = jnp.sort(jax.nn.softmax(logprobs), axis=-1, descending=True)
    before = jnp.cumsum(probs, -1) - probs
    lowest = jnp.where(before < params.top_p, probs, jnp.inf).min(-1, keepdims=True)
    logprobs = jnp.where(jax.nn.softmax(logprobs) < lowest, -jnp.inf, logprobs)
  return logprobs
