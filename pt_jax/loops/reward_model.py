"""The reward-model stage: what it brings to the offline loop, and what held-out rewards say.

The trunk is that of the policy the stage starts from, the head is drawn from the seed. Held-out
figures are of the mean over members.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import weights
from pt_jax.data.batch import ComparisonBatch
from pt_jax.experiment import ComparisonData, Reward
from pt_jax.loops import offline, ranking
from pt_jax.loops.context import Context
from pt_jax.loops.offline import Evaluation, Outputs, Training
from pt_jax.losses.reward import RewardObjective
from pt_jax.models import heads
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import Layout
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.reward_model import reward_evaluate, reward_step
from pt_jax.steps.state import TrainState, Updater
from pt_jax.weights import Params

_OF_KIND = {
  "pairwise": ("accuracy", "margin", "chosen", "rejected"),
  "listwise": ("choice_probability",),
  "outcome": ("accuracy", "value"),
  "process": ("accuracy", "value"),
}
_FIGURES = ("loss", "accuracy", "accuracy_low", "accuracy_high", "auc", "ece")
_AGREEMENT = ("agreement", "correlation", "spread")
RANKED, LABELLED = "rewards", "predictions"  # names of the held-out outputs


def metrics_of(stage: Reward) -> tuple[str, ...]:
  """What the stage logs at every step and evaluation, figures by slice apart."""
  names = _OF_KIND[stage.objective.kind] + (("spread",) if stage.members > 1 else ())
  figures = _FIGURES + (_AGREEMENT if stage.members > 1 else ())
  return (
    *offline.METRICS,
    *(f"reward_model/{name}" for name in names),
    *(f"eval/{name}" for name in figures),
  )


def run_reward(stage: Reward, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes a reward-model stage; see `offline.run_offline`.

  Returns a tree of `heads.table(config, stage.members)` and the last held-out evaluation.
  """
  data = stage.data(context.tokenizer)
  table = heads.table(context.config, stage.members)
  key = context.key("head", 0)
  context = dataclasses.replace(context, table=table)
  fresh = fresh_head(key, context, stage.members)
  context = dataclasses.replace(context, params=heads.from_decoder(context.params, table | fresh))
  objective = stage.objective
  labelled = objective.kind in ("outcome", "process")
  training = Training(
    context=context,
    update=compiled_step(context.config, stage.optimizer, context.layout, objective, stage.members),
    evaluate=compiled_evaluation(context.config, objective),
    figures=functools.partial(labelled_figures if labelled else ranked_figures, data),
    shown={"loss": "loss", "right": f"reward_model/{_OF_KIND[objective.kind][0]}"},
    histograms=(LABELLED if labelled else RANKED,),
  )
  return offline.run_offline(stage, data, training)


def fresh_head(key: jax.Array, context: Context, members: int) -> Params:
  """{HEAD: [E, D]}, drawn where layout.params says."""
  row = {heads.HEAD: heads.head_row(context.config, members)}
  dtype = jnp.dtype(context.config.param_dtype)
  return jax.jit(lambda key: weights.init(key, row, context.layout.params, dtype))(key)


@functools.cache
def compiled_step(
  config: ModelConfig, optimizer: AdamW, layout: Layout, objective: RewardObjective, members: int
) -> Any:
  """The jitted, donated (state, batch with leaves [A, B, S]) -> (state, metrics)."""
  updater = Updater(optimizer, heads.table(config, members), layout)

  def step(state: TrainState, batch: ComparisonBatch) -> tuple[TrainState, dict[str, jax.Array]]:
    state, metrics = reward_step(state, batch, config=config, updater=updater, objective=objective)
    return state, metrics | offline.counted(batch)

  return jax.jit(step, donate_argnums=0)


@functools.cache
def compiled_evaluation(config: ModelConfig, objective: RewardObjective) -> Any:
  """The jitted (params, batch with leaves [B, S]) -> Evaluation."""
  name = LABELLED if objective.kind in ("outcome", "process") else RANKED

  def evaluate(params: Params, batch: ComparisonBatch) -> Evaluation:
    sums, at, values = reward_evaluate(params, batch, config=config, objective=objective)
    whole = lambda x: jax.reshard(x, jax.P(*(None,) * x.ndim))
    return Evaluation(sums, whole(at), {name: whole(values), "labels": whole(batch.labels)})

  return jax.jit(evaluate)


class Pairs(NamedTuple):
  """Every two completions of a held-out group, the better one first."""

  rows: np.ndarray  # [N] int64, index of the held-out row
  chosen: np.ndarray  # [N, E]
  rejected: np.ndarray  # [N, E]


def pairs_of(rows: np.ndarray, rewards: np.ndarray) -> Pairs:
  """From rewards [n, E] of completions, those of a group side by side and the best first."""
  starts = np.flatnonzero(np.diff(rows, prepend=-1))
  better, worse = [], []
  for start, stop in itertools.pairwise([*starts, len(rows)]):
    for a, b in itertools.combinations(range(start, stop), 2):
      better.append(a)
      worse.append(b)
  first, second = np.array(better, np.int64), np.array(worse, np.int64)
  return Pairs(rows[first], rewards[first], rewards[second])


def ranked_figures(
  data: ComparisonData, means: dict[str, float], outputs: Outputs
) -> dict[str, float]:
  """Of pairs, or of every two of a list: `eval/accuracy` (ties half right) with its 95 % interval,
  by slice too; `eval/auc` (a chosen over a rejected one of any group); `eval/ece` of
  sigmoid(|margin|); `eval/agreement`, `eval/correlation` and `eval/spread` of several members."""
  pairs = pairs_of(outputs.rows, outputs.values[RANKED].astype(np.float64))
  if not len(pairs.rows):
    raise ValueError("held-out rows: expected at least one pair to compare, found none")
  margins = pairs.chosen - pairs.rejected
  right = ranking.right_order(margins.mean(1))
  extra = {
    "auc": ranking.auc(pairs.chosen.mean(1), pairs.rejected.mean(1)),
    "ece": ranking.pair_calibration(margins.mean(1)).error,
  }
  return _named(data, means["loss"], pairs.rows, right, extra, margins)


def labelled_figures(
  data: ComparisonData, means: dict[str, float], outputs: Outputs
) -> dict[str, float]:
  """Of completions or steps with labels: a prediction is right when it is on the label's side of
  0.5; otherwise as `ranked_figures`, with `eval/ece` of sigmoid(value)."""
  values = outputs.values[LABELLED].astype(np.float64)
  labels = outputs.values["labels"]
  mean, positive = values.mean(1), labels > 0.5
  right = ranking.right_order(np.where(positive, mean, -mean))
  extra = {
    "auc": ranking.auc(mean[positive], mean[~positive]),
    "ece": ranking.calibration(ranking.sigmoid(mean), labels).error,
  }
  return _named(data, means["loss"], outputs.rows, right, extra, values)


def _named(
  data: ComparisonData,
  loss: float,
  rows: np.ndarray,
  right: np.ndarray,
  extra: dict[str, float],
  scores: np.ndarray,
) -> dict[str, float]:
  share = ranking.share(right)
  figures = {"loss": loss, "accuracy": share.value, **extra}
  figures |= {"accuracy_low": share.low, "accuracy_high": share.high}
  if data.slice is not None:
    names = {row: data.slice(data.held_out[int(row)]) for row in np.unique(rows)}
    slices = ranking.by_slice(right, [names[row] for row in rows])
    figures |= {f"accuracy/{name}": of_slice.value for name, of_slice in slices.items()}
  if scores.shape[1] > 1:
    figures |= dict(zip(_AGREEMENT, ranking.agreement(scores)))
  return {f"eval/{name}": value for name, value in figures.items()}
