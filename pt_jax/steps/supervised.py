"""The SFT step and its evaluation: pure functions of (state, batch), jitted by the caller."""

import functools

import jax

from pt_jax.data.batch import Batch
from pt_jax.losses import reduce, supervised
from pt_jax.losses.reduce import Reduction, Sum
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.logprobs import next_token_statistics
from pt_jax.steps.state import TrainState, Updater, means
from pt_jax.weights import Params


def sft_loss(
  params: Params, batch: Batch, *, config: ModelConfig, reduction: Reduction
) -> tuple[Sum, dict[str, Sum]]:
  """Negative log-likelihood of the target tokens under a named reduction, and its metrics.

  Args:
    params: of `decoder.table(config)`.
    batch: leaves [B, S].
    config: the model.
    reduction: "token_mean" weighs every target token alike, "segment_mean" every sample.

  Returns:
    (Sum of the objective, metrics as Sums per target token: nats and accuracy of the label, entropy
    of the prediction).
  """
  hidden = decoder.forward(params, config, batch.tokens, batch.positions, batch.segment_ids)
  stats = next_token_statistics(
    hidden, decoder.unembedding(params, config), batch.tokens, chunk=config.vocab_chunk
  )
  nll = supervised.nll(stats.logprobs, batch.mask)
  add = functools.partial(
    reduce.reduce, mask=batch.mask, segment_ids=batch.segment_ids, weights=batch.weights
  )
  mean = functools.partial(add, "token_mean")
  metrics = {
    "loss/nats_per_token": mean(nll),
    "loss/accuracy": mean((stats.top1 == batch.tokens).astype(nll.dtype)),
    "loss/entropy": mean(stats.entropy),
  }
  return add(reduction, nll), metrics


def sft_step(
  state: TrainState, batch: Batch, *, config: ModelConfig, updater: Updater, reduction: Reduction
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update over A microbatches; batch leaves are [A, B, S]."""
  loss = lambda params, part: sft_loss(params, part, config=config, reduction=reduction)
  grads, value, metrics = updater.accumulate(loss, state.params, batch)
  state, optimizer_metrics = updater.apply(state, grads, value.weight)
  return state, means(metrics) | {
    "loss": value.mean(),
    "loss/weight": value.weight,
  } | optimizer_metrics


def sft_evaluate(params: Params, batch: Batch, *, config: ModelConfig) -> dict[str, Sum]:
  """Metrics of one batch [B, S] as Sums, so that batches add up to a mean over the whole set."""
  return sft_loss(params, batch, config=config, reduction="token_mean")[1]
