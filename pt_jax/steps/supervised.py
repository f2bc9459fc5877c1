"""The supervised step of every `SupervisedObjective` and its evaluation: pure functions of (state,
batch), jitted by the caller."""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.data.batch import Batch
from pt_jax.losses import reduce, supervised
from pt_jax.losses.reduce import Sum
from pt_jax.losses.supervised import SupervisedObjective
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.divergence import next_token_kl
from pt_jax.models.logprobs import next_token_mean_logit, next_token_statistics
from pt_jax.steps.state import TrainState, Updater, means
from pt_jax.weights import Params


def sft_loss(
  params: Params,
  batch: Batch,
  reference: Params | None = None,
  *,
  config: ModelConfig,
  objective: SupervisedObjective,
) -> tuple[Sum, dict[str, Sum]]:
  """The objective of one microbatch under its reduction, and its metrics.

  Args:
    params: of `decoder.table(config)`.
    batch: leaves [B, S].
    reference: as `params`, if `objective.needs_reference`; it gets no gradient.
    config: the model.
    objective: what is minimised.

  Returns:
    (Sum of the objective, metrics as Sums per target token: those of `supervised_loss`, accuracy of
    the label, entropy of the prediction).

  Raises:
    ValueError: when the objective has a reference and none is given.
  """
  hidden = decoder.forward(params, config, batch.tokens, batch.positions, batch.segment_ids)
  unembedding = decoder.stored_unembedding(params, config)
  stats = next_token_statistics(hidden, unembedding, batch.tokens, chunk=config.vocab_chunk)
  mean_logprobs = None
  if objective.label_smoothing:
    mean_logprobs = next_token_mean_logit(hidden, unembedding) - stats.logsumexp
  reference_logprobs, kl = None, None
  if objective.needs_reference:
    if reference is None:
      raise ValueError("reference: the objective needs its parameters, found None")
    reference_logprobs, kl = _beside(reference, batch, hidden, unembedding, config, objective)
  loss, metrics = supervised.supervised_loss(
    stats.logprobs,
    batch.mask,
    objective=objective,
    mean_logprobs=mean_logprobs,
    reference_logprobs=reference_logprobs,
    exact_kl=kl,
  )
  metrics["accuracy"] = (stats.top1 == batch.tokens).astype(loss.dtype)
  metrics["entropy"] = stats.entropy
  add = functools.partial(
    reduce.reduce, mask=batch.mask, segment_ids=batch.segment_ids, weights=batch.weights
  )
  sums = {f"loss/{name}": add("token_mean", values) for name, values in metrics.items()}
  return add(objective.reduction, loss, constant_length=objective.constant_length), sums


def _beside(
  reference: Params,
  batch: Batch,
  hidden: jax.Array,
  unembedding: jax.Array,
  config: ModelConfig,
  objective: SupervisedObjective,
) -> tuple[jax.Array | None, jax.Array | None]:
  """What the objective reads of the reference: its log-probs of the targets, the exact KL."""
  reference = jax.lax.stop_gradient(reference)
  other = decoder.forward(reference, config, batch.tokens, batch.positions, batch.segment_ids)
  matrix, chunk = decoder.stored_unembedding(reference, config), config.vocab_chunk
  logprobs, kl = None, None
  if objective.needs_reference_logprobs:
    logprobs = next_token_statistics(other, matrix, batch.tokens, chunk=chunk).logprobs
  if (option := objective.kl) is not None and option.form == "exact":
    if not option.coefficient:
      hidden, unembedding = jax.lax.stop_gradient((hidden, unembedding))
    kl = next_token_kl(hidden, unembedding, other, matrix, chunk=chunk, direction=option.direction)
  return logprobs, kl


def sft_step(
  state: TrainState,
  batch: Batch,
  reference: Params | None = None,
  *,
  config: ModelConfig,
  updater: Updater,
  objective: SupervisedObjective,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update over A microbatches; batch leaves are [A, B, S]. See `sft_loss`."""
  loss = lambda params, part: sft_loss(params, part, reference, config=config, objective=objective)
  grads, value, metrics = updater.accumulate(loss, state.params, batch)
  state, optimizer_metrics = updater.apply(state, grads, value.weight)
  return state, means(metrics) | {
    "loss": value.mean(),
    "loss/weight": value.weight,
  } | optimizer_metrics


class RefreshedUpdater(NamedTuple):
  """Makes the state of an objective with `refresh_every`."""

  updater: Updater

  def create(self, params: Params) -> "Refreshed":
    """The state before the first update; the reference shares no buffer with the parameters."""
    train = self.updater.create(params)
    return Refreshed(train, jax.tree.map(jnp.copy, train.params))


@flax.struct.dataclass
class Refreshed:
  """A train state beside the reference of an objective with `refresh_every`."""

  train: TrainState
  reference: Params  # the parameters after the last multiple of `refresh_every` updates

  @property
  def params(self) -> Params:
    """Those that are trained."""
    return self.train.params


def refreshed_sft_step(
  state: Refreshed,
  batch: Batch,
  *,
  config: ModelConfig,
  updater: Updater,
  objective: SupervisedObjective,
) -> tuple[Refreshed, dict[str, jax.Array]]:
  """`sft_step` whose reference becomes the policy every `objective.refresh_every` updates."""
  assert objective.refresh_every is not None
  due = state.train.step % objective.refresh_every == 0
  now = lambda policy, old: jnp.where(due, policy, old)
  reference = jax.tree.map(now, state.params, state.reference)
  train, metrics = sft_step(
    state.train, batch, reference, config=config, updater=updater, objective=objective
  )
  return Refreshed(train, reference), metrics


def sft_evaluate(
  params: Params,
  batch: Batch,
  reference: Params | None = None,
  *,
  config: ModelConfig,
  objective: SupervisedObjective,
) -> dict[str, Sum]:
  """Metrics of one batch [B, S] as Sums, so that batches add up to a mean over the whole set."""
  return sft_loss(params, batch, reference, config=config, objective=objective)[1]
