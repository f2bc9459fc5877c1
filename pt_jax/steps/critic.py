"""The critic's step, and the scoring pass before it. Pure functions.

A critic is a value model (`models.heads`): a network of its own, with one head. Its value of a
token is what it says after the token before, of the state in which the token was chosen.
"""

import jax
import jax.numpy as jnp

from pt_jax.data.batch import PolicyBatch
from pt_jax.losses import reduce
from pt_jax.losses.reduce import Sum
from pt_jax.losses.value import value_loss
from pt_jax.models import heads
from pt_jax.models.config import ModelConfig
from pt_jax.models.vocabulary import at_next_token
from pt_jax.steps.state import TrainState, Updater, filled, means, microbatch
from pt_jax.weights import Params


def token_values(params: Params, batch: PolicyBatch, config: ModelConfig) -> jax.Array:
  """[B, S] float32, the critic's value before each token of a batch [B, S]."""
  rows = (batch.tokens, batch.positions, batch.segment_ids, batch.prefix_ids)
  after = heads.values(params, config, *rows)
  return at_next_token(after[..., 0])


def score_values(params: Params, batch: PolicyBatch, *, config: ModelConfig) -> jax.Array:
  """[A, B, S], values of the trained tokens of a batch with leaves [A, B, S], 0 elsewhere."""

  def one(i: jax.Array, scores: jax.Array) -> jax.Array:
    part = microbatch(batch, i)
    return scores.at[i].set(jnp.where(part.mask > 0, token_values(params, part, config), 0))

  return jax.lax.fori_loop(0, filled(batch), one, jnp.zeros_like(batch.old_values))


def value_objective(
  params: Params, batch: PolicyBatch, *, config: ModelConfig, clip: float | None
) -> tuple[Sum, dict[str, Sum]]:
  """The mean value loss over the trained tokens of one microbatch [B, S], and its metrics."""
  values = token_values(params, batch, config)
  loss, metrics = value_loss(values, batch.returns, batch.old_values, batch.mask, clip=clip)
  mean = lambda x: reduce.reduce("token_mean", x, batch.mask, batch.segment_ids)
  return mean(loss), {f"critic/{name}": mean(value) for name, value in metrics.items()}


def value_step(
  state: TrainState,
  batch: PolicyBatch,
  *,
  config: ModelConfig,
  updater: Updater,
  clip: float | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update of the critic over A microbatches; batch leaves are [A, B, S].

  The metrics of its optimizer are those of the policy's under `critic/` in place of `optimizer/`.
  """
  loss = lambda params, part: value_objective(params, part, config=config, clip=clip)
  grads, value, metrics = updater.accumulate(loss, state.params, batch, filled(batch))
  state, optimizer = updater.apply(state, grads, value.weight)
  renamed = {name.replace("optimizer/", "critic/"): x for name, x in optimizer.items()}
  return state, means(metrics) | {"critic/loss": value.mean()} | renamed
