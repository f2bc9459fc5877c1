"""The supervised stage: what it brings to the offline loop."""

import functools
from typing import Any

import jax

from pt_jax.data.batch import Batch
from pt_jax.experiment import Supervised
from pt_jax.loops import offline
from pt_jax.loops.context import Context
from pt_jax.loops.diagnostics import perplexity
from pt_jax.loops.offline import Evaluation, Outputs, Training
from pt_jax.losses.supervised import SupervisedObjective
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import Layout
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.state import Updater
from pt_jax.steps.supervised import RefreshedUpdater, refreshed_sft_step, sft_evaluate, sft_step
from pt_jax.weights import Params


def step_metrics(objective: SupervisedObjective) -> tuple[str, ...]:
  """Names of the metrics of every step."""
  return (*offline.METRICS, *(f"loss/{name}" for name in _of_tokens(objective)))


def evaluation_metrics(objective: SupervisedObjective) -> tuple[str, ...]:
  """Names of the metrics of every held-out evaluation."""
  return tuple(f"eval/{name}" for name in _of_tokens(objective))


def _of_tokens(objective: SupervisedObjective) -> tuple[str, ...]:
  return (*objective.metrics, "accuracy", "entropy", "perplexity")


def run_supervised(stage: Supervised, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes a supervised stage; see `offline.run_offline`.

  The parameters it starts from are the reference of an objective that needs one, also when it is
  resumed; with `refresh_every` the reference is part of the state.
  """
  objective = stage.objective
  updater = Updater(stage.optimizer, context.table, context.layout)
  step = compiled_step(context.config, stage.optimizer, context.layout, objective)
  evaluate = compiled_evaluation(context.config, objective)
  start = context.params if objective.needs_reference else None
  if objective.refresh_every:
    creator, update = RefreshedUpdater(updater), step
    judge = lambda state, batch: evaluate(state.params, batch, state.reference)
  else:
    creator, update = updater, lambda state, batch: step(state, batch, start)
    judge = lambda state, batch: evaluate(state.params, batch, start)
  training = Training(
    context=context,
    updater=creator,
    update=update,
    evaluate=judge,
    figures=_figures,
    shown={"loss": "loss", "accuracy": "loss/accuracy"},
    derived=lambda metrics: {"loss/perplexity": perplexity(metrics["loss/nats_per_token"])},
  )
  return offline.run_offline(stage, stage.data(context.tokenizer), training)


@functools.cache
def compiled_step(
  config: ModelConfig, optimizer: AdamW, layout: Layout, objective: SupervisedObjective
) -> Any:
  """The jitted, donated (state, batch with leaves [A, B, S], reference) -> (state, metrics); with
  `refresh_every` the reference is in the state and is not given."""
  updater = Updater(optimizer, decoder.table(config), layout)
  update = refreshed_sft_step if objective.refresh_every else sft_step

  def step(state: Any, batch: Batch, *reference: Params) -> tuple[Any, dict[str, jax.Array]]:
    options = {"config": config, "updater": updater, "objective": objective}
    state, metrics = update(state, batch, *reference, **options)
    del metrics["loss/weight"]  # tokens or segments, as the reduction has it
    return state, metrics | offline.counted(batch)

  return jax.jit(step, donate_argnums=0)


@functools.cache
def compiled_evaluation(config: ModelConfig, objective: SupervisedObjective) -> Any:
  """The jitted (params, batch with leaves [B, S], reference) -> Evaluation."""

  def evaluate(params: Params, batch: Batch, reference: Params | None) -> Evaluation:
    return Evaluation(sft_evaluate(params, batch, reference, config=config, objective=objective))

  return jax.jit(evaluate)


def _figures(means: dict[str, float], _: Outputs) -> dict[str, float]:
  metrics = {f"eval/{name.removeprefix('loss/')}": value for name, value in means.items()}
  return metrics | {"eval/perplexity": perplexity(metrics["eval/nats_per_token"])}
