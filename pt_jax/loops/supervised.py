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
from pt_jax.losses.reduce import Reduction
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import Layout
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.state import TrainState, Updater
from pt_jax.steps.supervised import sft_evaluate, sft_step
from pt_jax.weights import Params

_OF_TOKENS = ("nats_per_token", "accuracy", "entropy", "perplexity")
METRICS = (*offline.METRICS, *(f"loss/{name}" for name in _OF_TOKENS))  # of every step
EVALUATION_METRICS = tuple(f"eval/{name}" for name in _OF_TOKENS)


def run_supervised(stage: Supervised, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes a supervised stage; see `offline.run_offline`."""
  evaluate = compiled_evaluation(context.config)
  training = Training(
    context=context,
    updater=Updater(stage.optimizer, context.table, context.layout),
    update=compiled_step(context.config, stage.optimizer, context.layout, stage.reduction),
    evaluate=lambda state, batch: evaluate(state.params, batch),
    figures=_figures,
    shown={"loss": "loss", "accuracy": "loss/accuracy"},
    derived=lambda metrics: {"loss/perplexity": perplexity(metrics["loss/nats_per_token"])},
  )
  return offline.run_offline(stage, stage.data(context.tokenizer), training)


@functools.cache
def compiled_step(
  config: ModelConfig, optimizer: AdamW, layout: Layout, reduction: Reduction
) -> Any:
  """The jitted, donated (state, batch with leaves [A, B, S]) -> (state, metrics)."""
  updater = Updater(optimizer, decoder.table(config), layout)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    state, metrics = sft_step(state, batch, config=config, updater=updater, reduction=reduction)
    del metrics["loss/weight"]  # tokens or segments, as the reduction has it
    return state, metrics | offline.counted(batch)

  return jax.jit(step, donate_argnums=0)


@functools.cache
def compiled_evaluation(config: ModelConfig) -> Any:
  """The jitted (params, batch with leaves [B, S]) -> Evaluation."""
  return jax.jit(lambda params, batch: Evaluation(sft_evaluate(params, batch, config=config)))


def _figures(means: dict[str, float], _: Outputs) -> dict[str, float]:
  metrics = {f"eval/{name.removeprefix('loss/')}": value for name, value in means.items()}
  return metrics | {"eval/perplexity": perplexity(metrics["eval/nats_per_token"])}
