"""The reward-model step and its evaluation: pure functions, jitted by the caller."""

import jax

from pt_jax.data.batch import ComparisonBatch
from pt_jax.losses import bootstrap, reduce, segments
from pt_jax.losses.reduce import Sum
from pt_jax.losses.reward import Kind, RewardObjective, reward_loss
from pt_jax.models import heads
from pt_jax.models.config import ModelConfig
from pt_jax.steps.state import TrainState, Updater, means
from pt_jax.weights import Params


def reward_objective(
  params: Params, batch: ComparisonBatch, *, config: ModelConfig, objective: RewardObjective
) -> tuple[Sum, dict[str, Sum], jax.Array]:
  """The loss of packed groups, its metrics, and the values it was made of.

  Args:
    params: of `heads.table(config, members)`.
    batch: leaves [B, S].
    config: the model under the head.
    objective: the kind of reward model; see `losses.reward.reward_loss`.

  Returns:
    (Sum of the objective over groups, metrics as Sums under `reward_model/`, values [B, S, E]
    float32 of each member after each token).
  """
  values = heads.values(params, config, batch.tokens, batch.positions, batch.segment_ids)
  hashes = None
  if objective.bootstrap:
    hashes = bootstrap.group_hashes(batch.tokens, batch.positions, batch.group_ids)
  loss, counts, metrics = reward_loss(
    values,
    batch.segment_ids,
    batch.group_ids,
    batch.mask,
    batch.labels,
    batch.weights,
    batch.margins,
    objective=objective,
    hashes=hashes,
  )
  mean = lambda x: reduce.reduce("token_mean", x, counts, batch.segment_ids)
  return mean(loss), {f"reward_model/{name}": mean(x) for name, x in metrics.items()}, values


def reward_step(
  state: TrainState,
  batch: ComparisonBatch,
  *,
  config: ModelConfig,
  updater: Updater,
  objective: RewardObjective,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update over A microbatches; batch leaves are [A, B, S]."""

  def loss(params: Params, part: ComparisonBatch) -> tuple[Sum, dict[str, Sum]]:
    return reward_objective(params, part, config=config, objective=objective)[:2]

  grads, value, metrics = updater.accumulate(loss, state.params, batch)
  state, optimizer_metrics = updater.apply(state, grads, value.weight)
  return state, means(metrics) | {"loss": value.mean()} | optimizer_metrics


def reward_evaluate(
  params: Params, batch: ComparisonBatch, *, config: ModelConfig, objective: RewardObjective
) -> tuple[dict[str, Sum], jax.Array, jax.Array]:
  """Metrics and loss of one batch [B, S] as Sums, and the rewards themselves.

  Returns:
    (Sums, that of the objective under `loss`; [B, S] bool where a reward stands, see `rewarded`;
    values [B, S, E]).
  """
  value, metrics, values = reward_objective(params, batch, config=config, objective=objective)
  return metrics | {"loss": value}, rewarded(batch, objective.kind), values


def rewarded(batch: ComparisonBatch, kind: Kind) -> jax.Array:
  """[B, S] bool: the last token of every completion, or for `process` every step mark."""
  return batch.mask > 0 if kind == "process" else segments.segment_ends(batch.segment_ids)
