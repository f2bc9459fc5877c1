"""The policy-gradient step of every `Objective`, and the scoring passes before it. Pure
functions."""

import jax
import jax.numpy as jnp

from pt_jax.data.batch import Batch, PolicyBatch
from pt_jax.losses import reduce
from pt_jax.losses.mismatch import logprob_gap
from pt_jax.losses.objective import Objective
from pt_jax.losses.policy import policy_loss
from pt_jax.losses.reduce import Sum
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.logprobs import TokenStatistics, next_token_statistics
from pt_jax.steps.state import Max, TrainState, Updater, means, microbatch
from pt_jax.weights import Params


def token_statistics(
  params: Params, batch: Batch | PolicyBatch, config: ModelConfig, temperature: float
) -> TokenStatistics:
  """Log-prob, entropy and top-1 [B, S] of all tokens of a batch [B, S] at a temperature."""
  hidden = decoder.forward(params, config, batch.tokens, batch.positions, batch.segment_ids)
  return next_token_statistics(
    hidden,
    decoder.unembedding(params, config),
    batch.tokens,
    temperature=temperature,
    chunk=config.vocab_chunk,
  )


def filled(batch: PolicyBatch) -> jax.Array:
  """[] int32, microbatches of a batch [A, B, S] up to the last one that holds a token."""
  held = (batch.segment_ids >= 0).any((1, 2))
  return jnp.max(jnp.where(held, jnp.arange(1, len(held) + 1), 0))


def score(
  params: Params, batch: PolicyBatch, *, config: ModelConfig, temperature: float
) -> jax.Array:
  """Log-probs [A, B, S] of the trained tokens under `params`, 0 elsewhere: the old or the reference
  ones of a batch with leaves [A, B, S], one microbatch at a time."""

  def one(i: jax.Array, scores: jax.Array) -> jax.Array:
    part = microbatch(batch, i)
    stats = token_statistics(params, part, config, temperature)
    return scores.at[i].set(jnp.where(part.mask > 0, stats.logprobs, 0))

  return jax.lax.fori_loop(0, filled(batch), one, jnp.zeros_like(batch.old_logprobs))


def policy_objective(
  params: Params,
  batch: PolicyBatch,
  *,
  config: ModelConfig,
  objective: Objective,
  temperature: float,
  first_update: bool,
) -> tuple[Sum, dict[str, Sum | Max]]:
  """The objective of one microbatch under its reduction, and its metrics per trained token.

  Args:
    params: of `decoder.table(config)`.
    batch: leaves [B, S].
    config: the model.
    objective: the algorithm.
    temperature: the one the rollouts were sampled at.
    first_update: the batch has not been trained on yet and there will be one update, so the
    log-probs
      of this very pass are the old ones and `batch.old_logprobs` is not read.
  """
  stats = token_statistics(params, batch, config, temperature)
  logprobs = jnp.where(batch.mask > 0, stats.logprobs, 0)
  old = jax.lax.stop_gradient(logprobs) if first_update else batch.old_logprobs
  loss, metrics = policy_loss(
    logprobs,
    old,
    batch.advantages,
    batch.mask,
    objective=objective,
    reference_logprobs=batch.reference_logprobs,
  )
  mean = lambda values: reduce.reduce("token_mean", values, batch.mask, batch.segment_ids)
  gap = logprob_gap(old, batch.sampler_logprobs, batch.mask)
  sums: dict[str, Sum | Max] = {f"policy/{name}": mean(value) for name, value in metrics.items()}
  sums |= {
    "policy/entropy": mean(stats.entropy),
    "rollout/logprob_gap_mean": mean(gap["logprob_gap"]),
    "rollout/logprob_gap_max": Max(gap["logprob_gap"].max()),
    "rollout/logprob_gap_kl": mean(gap["logprob_gap_kl"]),
  }
  value = reduce.reduce(
    objective.reduction,
    loss,
    batch.mask,
    batch.segment_ids,
    constant_length=objective.constant_length,
  )
  return value, jax.lax.stop_gradient(sums)


def policy_step(
  state: TrainState,
  batch: PolicyBatch,
  *,
  config: ModelConfig,
  updater: Updater,
  objective: Objective,
  temperature: float,
  first_update: bool,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update over A microbatches; batch leaves are [A, B, S]. See
  `policy_objective`. Microbatches behind the last one that holds a token are not computed."""

  def loss(params: Params, part: PolicyBatch) -> tuple[Sum, dict[str, Sum | Max]]:
    return policy_objective(
      params,
      part,
      config=config,
      objective=objective,
      temperature=temperature,
      first_update=first_update,
    )

  grads, value, metrics = updater.accumulate(loss, state.params, batch, filled(batch))
  state, optimizer_metrics = updater.apply(state, grads, value.weight)
  return state, means(metrics) | {"loss": value.mean()} | optimizer_metrics
