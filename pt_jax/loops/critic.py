"""The critic of an online stage: its state, its values of fresh rollouts, its updates."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.data.batch import PolicyBatch
from pt_jax.experiment import Critic
from pt_jax.loops.context import Context, abstract_state, initial_params
from pt_jax.losses.credit import Credit, Episodes
from pt_jax.models import heads
from pt_jax.steps.critic import score_values, value_step
from pt_jax.steps.state import TrainState, Updater
from pt_jax.weights import Params


class CriticLoop:
  """A network of its own that learns the returns of the policy's tokens."""

  def __init__(self, options: Critic, context: Context):
    self.options = options
    table = heads.table(context.config)
    self._context = dataclasses.replace(context, table=table)
    self.updater = Updater(options.optimizer, table, context.layout)
    self.state: TrainState | None = None  # set by `start` or from a checkpoint
    shared = {"config": context.config}
    step = functools.partial(value_step, updater=self.updater, clip=options.clip, **shared)
    self._update = jax.jit(step, donate_argnums=0)
    self._score = jax.jit(functools.partial(score_values, **shared))

  def abstract(self) -> TrainState:
    """Shapes and shardings of its state."""
    return abstract_state(self.updater, self._context)

  def start(self) -> None:
    """Begins from a reward model, or from the policy's trunk under a head drawn from the seed."""
    context = self._context
    if self.options.start is not None:
      params = context.left_by(self.options.start, context.table)
    else:
      params = heads.from_decoder(context.params, fresh_head(context))
    self.state = jax.jit(self.updater.create)(jax.tree.map(jnp.copy, params))

  def values(self, batch: PolicyBatch) -> jax.Array:
    """[A, B, S], of the trained tokens, under the weights of now."""
    assert self.state is not None
    return self._score(self.state.params, batch)

  def update(
    self, batches: Sequence[PolicyBatch], rng: np.random.Generator
  ) -> list[dict[str, jax.Array]]:
    """`epochs` passes over the minibatches; the metrics of every update."""
    metrics: list[dict[str, jax.Array]] = []
    for _ in range(self.options.epochs):
      for i in rng.permutation(len(batches)):
        self.state, measured = self._update(self.state, batches[i])
        metrics.append(measured)
    return metrics


def fresh_head(context: Context) -> jax.Array:
  """The head of a value model, drawn from the seed."""
  rows = {heads.HEAD: heads.head_row(context.config)}
  return initial_params(dataclasses.replace(context, table=rows))[heads.HEAD]


def explained_variance(episodes: Episodes, credit: Credit) -> float:
  """1 - Var(R - V) / Var(R) over the tokens, V before the update: 1 is perfect, 0 no better than a
  constant; 0 when all returns are equal."""
  assert episodes.values is not None
  trained = episodes.mask & credit.trained[:, None]
  returns = credit.returns[trained].astype(np.float64)
  error = returns - episodes.values[trained]
  if not returns.size:
    return 0.0
  return share_explained(float(error.var()), float(returns.var()))


def share_explained(error: float, variance: float) -> float:
  """1 - variance of the error / variance of the returns; 0 without variance."""
  return 1 - error / variance if variance > 0 else 0.0


def whole(tree: Params) -> Params:
  """Every array as NumPy, whole on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(tree, tiled=True)
