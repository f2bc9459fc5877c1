"""The preference step of every `PreferenceObjective`, its evaluation, and the passes before it.

Pure functions. Shapes: A microbatches, B rows, S positions. In a packed row every position of a
group holds the sums over its completions; a group counts once, at its first position, with its
weight. A pair has a completion with a label over 1/2, the chosen one, and another. For unpaired
objectives a group is one completion, and for KTO another with a negative label behind it, of
another prompt: those tell how far the policy has moved, and nothing else.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.data.batch import ComparisonBatch
from pt_jax.losses.preference import Completions, pair_loss, unpaired_loss
from pt_jax.losses.preference_objective import PreferenceObjective
from pt_jax.losses.reduce import Sum
from pt_jax.losses.segments import segment_starts, segment_sum
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.logprobs import next_token_statistics
from pt_jax.steps.state import TrainState, Updater, filled, means, microbatch
from pt_jax.weights import Params

RUNNING_MOMENTUM = 0.9  # of the running mean (arXiv 2407.08639, section 4.1)


@flax.struct.dataclass
class PreferenceState:
  """What a preference update reads and writes."""

  train: TrainState
  # [] float32, mean over the updates before, of the implicit reward margin (`dynamic_beta`) or of
  # the implicit reward (BCO); 0 for other objectives, as it is before the first update.
  running: jax.Array

  @property
  def params(self) -> Params:
    """Of the policy."""
    return self.train.params


class PreferenceUpdater(NamedTuple):
  """`Updater` with the running mean beside."""

  updater: Updater

  def create(self, params: Params) -> PreferenceState:
    """The state before the first update. `params` may live anywhere."""
    return PreferenceState(self.updater.create(params), jnp.zeros((), jnp.float32))


def completion_logprobs(
  params: Params, batch: ComparisonBatch, *, config: ModelConfig
) -> jax.Array:
  """Log-probs [B, S] of the tokens in the mask, 0 elsewhere; batch leaves are [B, S]."""
  hidden = decoder.forward(params, config, batch.tokens, batch.positions, batch.segment_ids)
  stats = next_token_statistics(
    hidden, decoder.stored_unembedding(params, config), batch.tokens, chunk=config.vocab_chunk
  )
  return jnp.where(batch.mask > 0, stats.logprobs, 0)


def score(params: Params, batch: ComparisonBatch, *, config: ModelConfig) -> jax.Array:
  """`completion_logprobs` [A, B, S], one microbatch at a time: those of the reference."""
  one = lambda i, scores: scores.at[i].set(
    completion_logprobs(params, microbatch(batch, i), config=config)
  )
  return jax.lax.fori_loop(0, len(batch.mask), one, jnp.zeros_like(batch.mask))


def comparison_loss(
  logprobs: jax.Array,
  batch: ComparisonBatch,
  *,
  objective: PreferenceObjective,
  baseline: jax.Array | float = 0.0,
) -> tuple[Sum, dict[str, Sum]]:
  """The objective of packed completions and its metrics, both as weighted sums over groups.

  Args:
    logprobs: [B, S] float32, of the tokens in the mask under the policy.
    batch: leaves [B, S]; `reference_logprobs` are read if the objective has a reference.
    objective: the algorithm.
    baseline: [], no gradient; what `pair_loss` calls `mean_margin` or `reward_shift`, and
      `unpaired_loss` `baseline`. The same for all microbatches.

  Returns:
    (sum of weight * loss and of weights, metrics under `preference/`).
  """
  weights = _weights(batch)
  if not objective.unpaired:
    loss, metrics = _pairs(logprobs, batch, objective, baseline)
    sums = {}
  else:
    (own,) = _completions(logprobs, batch, [batch.labels >= 0], objective)
    loss, metrics = unpaired_loss(own, batch.labels, objective=objective, baseline=baseline)
    right, change = metrics.pop("label"), metrics.pop("logprob_change")
    sums = {}
    for side, share in (("chosen", right), ("rejected", 1 - right)):
      sums[f"{side}_reward"] = _mean(metrics["reward"], weights * share)
      sums[f"{side}_logprob_change"] = _mean(change, weights * share)
  sums |= {name: _mean(value, weights) for name, value in metrics.items()}
  named = {f"preference/{name}": value for name, value in sums.items()}
  return _mean(loss, weights), jax.lax.stop_gradient(named)


def preference_objective(
  params: Params,
  batch: ComparisonBatch,
  *,
  config: ModelConfig,
  objective: PreferenceObjective,
  baseline: jax.Array | float = 0.0,
) -> tuple[Sum, dict[str, Sum]]:
  """`comparison_loss` of one microbatch with leaves [B, S] under `params`."""
  logprobs = completion_logprobs(params, batch, config=config)
  return comparison_loss(logprobs, batch, objective=objective, baseline=baseline)


def preference_step(
  state: PreferenceState,
  batch: ComparisonBatch,
  *,
  config: ModelConfig,
  updater: Updater,
  objective: PreferenceObjective,
  reference: Params | None = None,
) -> tuple[PreferenceState, dict[str, jax.Array]]:
  """One optimizer update over A microbatches; batch leaves are [A, B, S].

  With parameters of a `reference` the batch's `reference_logprobs` are computed, not read.

  KTO's baseline is the mean over the whole batch, computed before the gradients, so that it does
  not depend on the microbatches. Where the objective reads a running mean, it reads that of the
  updates before.
  """
  params, baseline = state.train.params, state.running
  if reference is not None:
    scores = score(reference, batch, config=config)
    batch = dataclasses.replace(batch, reference_logprobs=scores)
  if objective.loss == "kto":
    baseline = kl_baseline(params, batch, config=config, objective=objective)

  def loss(params: Params, part: ComparisonBatch) -> tuple[Sum, dict[str, Sum]]:
    return preference_objective(params, part, config=config, objective=objective, baseline=baseline)

  grads, value, sums = updater.accumulate(loss, params, batch, filled(batch))
  train, optimizer_metrics = updater.apply(state.train, grads, value.weight)
  metrics = means(sums)
  running = state.running
  if (seen := tracked(metrics, objective)) is not None:
    running = RUNNING_MOMENTUM * running + (1 - RUNNING_MOMENTUM) * seen
  metrics |= {"loss": value.mean(), **optimizer_metrics}
  return PreferenceState(train, running), metrics


def kl_baseline(
  params: Params, batch: ComparisonBatch, *, config: ModelConfig, objective: PreferenceObjective
) -> jax.Array:
  """[] mean of log-prob minus reference log-prob over the mismatched completions of a batch with
  leaves [A, B, S], per token if the objective is; nats. 0 if there are none."""

  def one(i: jax.Array, seen: Sum) -> Sum:
    part = microbatch(batch, i)
    logprobs = completion_logprobs(params, part, config=config)
    (moved,) = _completions(logprobs, part, [part.labels < 0], objective)
    assert moved.reference_logprobs is not None  # unpaired objectives have a reference
    difference = moved.logprobs - moved.reference_logprobs
    if objective.length_normalized:
      difference = moved.per_token(difference)
    counted = segment_starts(part.group_ids) & (moved.lengths > 0)
    return seen + _mean(difference, counted.astype(jnp.float32))

  nothing = Sum(jnp.zeros(()), jnp.zeros(()))
  return jax.lax.fori_loop(0, filled(batch), one, nothing).mean()


def tracked(metrics: dict[str, jax.Array], objective: PreferenceObjective) -> jax.Array | None:
  """What the running mean is of, in this update; None if the objective reads none."""
  named = {name.removeprefix("preference/"): value for name, value in metrics.items()}
  if objective.dynamic_beta is not None:
    return named["margin_at_beta"]
  if objective.loss == "bco_pair":
    return (named["chosen_reward"] + named["rejected_reward"]) / 2
  return named["reward"] if objective.loss == "bco" else None


def preference_evaluate(
  state: PreferenceState,
  batch: ComparisonBatch,
  *,
  config: ModelConfig,
  objective: PreferenceObjective,
  reference: Params | None = None,
) -> tuple[dict[str, Sum], jax.Array, dict[str, jax.Array]]:
  """Figures of the pairs in one batch with leaves [B, S]; `reference` as in `preference_step`.

  An unpaired objective is evaluated on pairs as well: their rewards are its own, their loss that of
  `sigmoid`. `ranking_accuracy` is the share of pairs whose chosen completion has the higher
  log-prob per token, without the reference (arXiv 2405.19534).

  Returns:
    (metrics as Sums, [B, S] bool the first position of each pair, outputs [B, S] there: the
    rewards, their difference `margin`, and with a reference how far the log-probs moved).
  """
  if objective.unpaired:
    objective = PreferenceObjective(
      beta=objective.beta, length_normalized=objective.length_normalized
    )
  if reference is not None:
    scores = completion_logprobs(reference, batch, config=config)
    batch = dataclasses.replace(batch, reference_logprobs=scores)
  logprobs = completion_logprobs(state.params, batch, config=config)
  loss, metrics = _pairs(logprobs, batch, objective, state.running)
  starts, weights = segment_starts(batch.group_ids), _weights(batch)
  chosen, rejected = _completions(logprobs, batch, _sides(batch), objective)
  higher = chosen.per_token(chosen.logprobs) > rejected.per_token(rejected.logprobs)
  metrics |= {"loss": loss, "ranking_accuracy": higher.astype(jnp.float32)}
  names = ("chosen_reward", "rejected_reward", "margin")
  changes = [name for name in metrics if name.endswith("_logprob_change")]
  outputs = {name: metrics[name] for name in (*names, *changes)}
  return {name: _mean(value, weights) for name, value in metrics.items()}, starts, outputs


def _pairs(
  logprobs: jax.Array,
  batch: ComparisonBatch,
  objective: PreferenceObjective,
  running: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss and metrics [B, S] of the pair that each position belongs to."""
  chosen, rejected = _completions(logprobs, batch, _sides(batch), objective)
  loss, metrics = pair_loss(
    chosen, rejected, objective=objective, mean_margin=running, reward_shift=running
  )
  if objective.dynamic_beta is not None:  # at the objective's own beta
    metrics["margin_at_beta"] = metrics["margin"] * objective.beta / metrics["beta"]
  return loss, metrics


def _sides(batch: ComparisonBatch) -> list[jax.Array]:
  """[B, S] bool, where the chosen and where the rejected completions are."""
  chosen = batch.labels > 0.5
  return [chosen, ~chosen & (batch.labels >= 0)]


def _completions(
  logprobs: jax.Array,
  batch: ComparisonBatch,
  sides: Sequence[jax.Array],
  objective: PreferenceObjective,
) -> list[Completions]:
  """Sums over the tokens of a group that are in the mask and on one side, at each of its positions,
  for every side [B, S] bool."""
  values = []
  for side in sides:
    mask = jnp.where(side, batch.mask, 0)
    held = lambda x, mask=mask: jnp.where(mask > 0, x * mask, 0)
    values += [held(logprobs), mask]
    values += [held(batch.reference_logprobs)] if objective.reference else []
  # All in one pass: it is one loop to compile instead of one for each.
  sums = list(jax.vmap(segment_sum, (0, None))(jnp.stack(values), batch.group_ids))
  each = len(sums) // len(sides)
  return [Completions(*sums[i : i + each]) for i in range(0, len(sums), each)]


def _weights(batch: ComparisonBatch) -> jax.Array:
  """[B, S] weight of the group at its first position, 0 elsewhere."""
  return jnp.where(segment_starts(batch.group_ids), batch.weights, 0)


def _mean(values: jax.Array, weights: jax.Array) -> Sum:
  """The weighted mean, still to be divided."""
  return Sum(jnp.sum(jnp.where(weights > 0, values * weights, 0)), jnp.sum(weights))
