"""The policy-gradient step of every `Objective`, and the scoring passes before it. Pure
functions."""

import functools

import jax
import jax.numpy as jnp

from pt_jax.data.batch import Batch, ComparisonBatch, PolicyBatch
from pt_jax.losses import reduce
from pt_jax.losses.mismatch import logprob_gap
from pt_jax.losses.objective import Objective
from pt_jax.losses.policy import policy_loss
from pt_jax.losses.preference_objective import PreferenceObjective
from pt_jax.losses.reduce import Sum
from pt_jax.losses.value import value_loss
from pt_jax.models import decoder, heads
from pt_jax.models.config import ModelConfig
from pt_jax.models.divergence import next_token_kl
from pt_jax.models.logprobs import TokenStatistics, next_token_statistics
from pt_jax.models.vocabulary import at_next_token
from pt_jax.steps.preference import preference_objective
from pt_jax.steps.state import Max, TrainState, Updater, filled, means, microbatch
from pt_jax.weights import Params

AnyBatch = Batch | PolicyBatch | ComparisonBatch


def hidden_states(params: Params, batch: AnyBatch, config: ModelConfig) -> jax.Array:
  """[B, S, D] of a batch [B, S]."""
  shared = (batch.prefix_ids,) if isinstance(batch, PolicyBatch) else ()
  rows = (batch.tokens, batch.positions, batch.segment_ids, *shared)
  return decoder.forward(params, config, *rows)


def statistics_of(
  hidden: jax.Array, params: Params, batch: AnyBatch, config: ModelConfig, temperature: float
) -> TokenStatistics:
  """Log-prob, entropy and top-1 [B, S] of all tokens of a batch, from its hidden states."""
  return next_token_statistics(
    hidden,
    decoder.stored_unembedding(params, config),
    batch.tokens,
    temperature=temperature,
    chunk=config.vocab_chunk,
  )


def token_statistics(
  params: Params, batch: AnyBatch, config: ModelConfig, temperature: float
) -> TokenStatistics:
  """Log-prob, entropy and top-1 [B, S] of all tokens of a batch [B, S] at a temperature."""
  return statistics_of(hidden_states(params, batch, config), params, batch, config, temperature)


def score(
  params: Params,
  batch: PolicyBatch | ComparisonBatch,
  *,
  config: ModelConfig,
  temperature: float,
) -> jax.Array:
  """Log-probs [A, B, S] of the trained tokens under `params`, 0 elsewhere: the old or the reference
  ones of a batch with leaves [A, B, S], one microbatch at a time."""

  def one(i: jax.Array, scores: jax.Array) -> jax.Array:
    part = microbatch(batch, i)
    stats = token_statistics(params, part, config, temperature)
    return scores.at[i].set(jnp.where(part.mask > 0, stats.logprobs, 0))

  return jax.lax.fori_loop(0, filled(batch), one, jnp.zeros_like(batch.reference_logprobs))


def policy_objective(
  params: Params,
  batch: PolicyBatch,
  *,
  config: ModelConfig,
  objective: Objective,
  temperature: float,
  first_update: bool,
  reference: Params | None = None,
  kl_coefficient: jax.Array | None = None,
  positive_scale: jax.Array | float = 0.0,
  value_coefficient: float = 0.0,
  value_clip: float | None = None,
) -> tuple[Sum, dict[str, Sum | Max]]:
  """The objective of one microbatch under its reduction, and its metrics per trained token.

  Args:
    params: of `decoder.table(config)`; with a `value_coefficient` also with a head.
    batch: leaves [B, S].
    config: the model.
    objective: the algorithm.
    temperature: the one the rollouts were sampled at.
    first_update: the batch has not been trained on yet and there will be one update, so the
      log-probs of this very pass are the old ones and `batch.old_logprobs` is not read.
    reference: parameters of the reference policy, for an exact KL.
    kl_coefficient: [] where a controller moves it.
    positive_scale: what the NLL of `batch.positive` is multiplied by; see `policy_step`.
    value_coefficient: of the value loss, where the critic is a head on the policy.
    value_clip: of that loss.
  """
  hidden = hidden_states(params, batch, config)
  stats = statistics_of(hidden, params, batch, config, temperature)
  logprobs = jnp.where(batch.mask > 0, stats.logprobs, 0)
  old = jax.lax.stop_gradient(logprobs) if first_update else batch.old_logprobs
  exact = None
  if objective.kl is not None and objective.kl.estimator == "exact":
    exact = _exact_kl(hidden, params, reference, batch, config, temperature)
  loss, metrics = policy_loss(
    logprobs,
    old,
    batch.advantages,
    batch.mask,
    batch.segment_ids,
    objective=objective,
    reference_logprobs=batch.reference_logprobs,
    exact_kl=exact,
    sampler_logprobs=batch.sampler_logprobs,
    entropy=stats.entropy,
    kl_coefficient=kl_coefficient,
  )
  mean = lambda values: reduce.reduce("token_mean", values, batch.mask, batch.segment_ids)
  sums: dict[str, Sum | Max] = {f"policy/{name}": mean(value) for name, value in metrics.items()}
  sums |= {"policy/entropy": mean(stats.entropy)} | _gap(old, batch)
  if value_coefficient:
    values = at_next_token(heads.apply_head(params, config, hidden)[..., 0])
    of_value, measured = value_loss(
      values, batch.returns, batch.old_values, batch.mask, clip=value_clip
    )
    loss += value_coefficient * of_value
    sums |= {"critic/loss": mean(of_value)}
    sums |= {f"critic/{name}": mean(value) for name, value in measured.items()}
  whole = reduce.reduce(
    objective.reduction,
    loss,
    batch.mask,
    batch.segment_ids,
    constant_length=objective.constant_length,
  )
  if objective.positive_nll:
    nll = reduce.reduce("token_mean", -logprobs, batch.positive, batch.segment_ids)
    sums["policy/positive_nll"] = nll
    whole = Sum(whole.total + positive_scale * nll.total, whole.weight)
  return whole, jax.lax.stop_gradient(sums)


def policy_step(
  state: TrainState,
  batch: PolicyBatch,
  *,
  config: ModelConfig,
  updater: Updater,
  objective: Objective,
  temperature: float,
  first_update: bool,
  reference: Params | None = None,
  kl_coefficient: jax.Array | None = None,
  value_coefficient: float = 0.0,
  value_clip: float | None = None,
  pairs: ComparisonBatch | None = None,
  mixed: tuple[PreferenceObjective, float] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update over A microbatches; batch leaves are [A, B, S]. See
  `policy_objective`. Microbatches behind the last one that holds a token are not computed.

  With `pairs` and `mixed` = (objective, alpha), alpha times the preference loss of those pairs is
  added: two losses, each divided by its own weight.

  The NLL of right completions is averaged over their own tokens. To divide once all the same, its
  total is scaled by the ratio of both weights of the whole batch.
  """
  count = filled(batch)
  scale = _positive_scale(batch, objective, count) if objective.positive_nll else 0.0

  def loss(params: Params, part: PolicyBatch) -> tuple[Sum, dict[str, Sum | Max]]:
    return policy_objective(
      params,
      part,
      config=config,
      objective=objective,
      temperature=temperature,
      first_update=first_update,
      reference=reference,
      kl_coefficient=kl_coefficient,
      positive_scale=scale,
      value_coefficient=value_coefficient,
      value_clip=value_clip,
    )

  grads, value, sums = updater.accumulate(loss, state.params, batch, count)
  metrics = means(sums) | {"loss": value.mean()}
  weight = jnp.where(value.weight == 0, 1, value.weight)  # no token of a whole batch is trained
  if pairs is not None and mixed is not None:
    preferred, alpha = mixed
    of_pairs = functools.partial(preference_objective, config=config, objective=preferred)
    more, other, sums = updater.accumulate(of_pairs, state.params, pairs, filled(pairs))
    share = alpha * weight / other.weight  # so that one division by `weight` is left
    grads = jax.tree.map(lambda a, b: a + share * b, grads, more)
    metrics |= means(sums) | {"preference/loss": other.mean()}
    metrics["loss"] += alpha * other.mean()
  state, optimizer_metrics = updater.apply(state, grads, weight)
  return state, metrics | optimizer_metrics


def _positive_scale(batch: PolicyBatch, objective: Objective, count: jax.Array) -> jax.Array:
  """`positive_nll` times the objective's weight over that of the NLL, of the whole batch."""

  def one(i: jax.Array, seen: jax.Array) -> jax.Array:
    part = microbatch(batch, i)
    _, weight = reduce.token_weights(
      objective.reduction, part.mask, part.segment_ids, constant_length=objective.constant_length
    )
    return seen + jnp.stack([weight, part.positive.sum()])

  weight, positive = jax.lax.fori_loop(0, count, one, jnp.zeros(2))
  return objective.positive_nll * weight / jnp.maximum(positive, 1)


def _exact_kl(
  hidden: jax.Array,
  params: Params,
  reference: Params | None,
  batch: PolicyBatch,
  config: ModelConfig,
  temperature: float,
) -> jax.Array:
  """KL(policy || reference) over the vocabulary [B, S]; the reference runs in the same step."""
  if reference is None:
    raise ValueError("reference: an exact KL needs the parameters of the reference, found None")
  frozen = jax.lax.stop_gradient(reference)
  return next_token_kl(
    hidden,
    decoder.stored_unembedding(params, config),
    jax.lax.stop_gradient(hidden_states(frozen, batch, config)),
    decoder.stored_unembedding(frozen, config),
    temperature=temperature,
    chunk=config.vocab_chunk,
  )


def _gap(old: jax.Array, batch: PolicyBatch) -> dict[str, Sum | Max]:
  """How far the log-probs of the rollout engine are from the trainer's before the update."""
  gap = logprob_gap(old, batch.sampler_logprobs, batch.mask)
  mean = lambda values: reduce.reduce("token_mean", values, batch.mask, batch.segment_ids)
  return {
    "rollout/logprob_gap_mean": mean(gap["logprob_gap"]),
    "rollout/logprob_gap_max": Max(gap["logprob_gap"].max()),
    "rollout/logprob_gap_kl": mean(gap["logprob_gap_kl"]),
  }
