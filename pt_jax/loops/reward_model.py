"""The reward-model stage: what it brings to the offline loop, and what held-out rewards say.

The trunk is that of the policy the stage starts from, the head is drawn from the seed. Held-out
figures are of the mean over members.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pt_jax import weights
from pt_jax.data.batch import ComparisonBatch
from pt_jax.data.groups import Group
from pt_jax.data.packing import Example
from pt_jax.experiment import ComparisonData, Reward
from pt_jax.loops import offline, ranking
from pt_jax.loops.context import Context
from pt_jax.loops.offline import Evaluation, Outputs, Training
from pt_jax.loops.report import COLORS, Drawn
from pt_jax.losses.reward import Kind, RewardObjective
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
  data = checked(stage.data(context.tokenizer), stage.objective.kind)
  table = heads.table(context.config, stage.members)
  params = heads.from_decoder(context.params, fresh_heads(context, stage.members))
  context = dataclasses.replace(context, table=table, params=params)
  objective = stage.objective
  labelled = objective.kind in ("outcome", "process")
  training = Training(
    context=context,
    updater=Updater(stage.optimizer, table, context.layout),
    update=compiled_step(context.config, stage.optimizer, context.layout, objective, stage.members),
    evaluate=compiled_evaluation(context.config, objective),
    figures=functools.partial(labelled_figures if labelled else ranked_figures, data),
    shown={"loss": "loss", "right": f"reward_model/{_OF_KIND[objective.kind][0]}"},
    histograms=(LABELLED if labelled else RANKED,),
  )
  return offline.run_offline(stage, data, training)


def checked(data: ComparisonData, kind: Kind) -> ComparisonData:
  """The data, with rows that are checked to be what this kind of reward model is trained on.

  Tokens behind the last one in the mask are cut off: templates add some behind the token that
  closes a turn, a rollout ends with that token, and there the reward is read.
  """

  def encode(row: Mapping[str, Any]) -> Group:
    group = data.encode(row)
    if not isinstance(group, Group):
      return group  # the pipeline says what is wrong
    _check_group(group, kind)
    ends = [int(np.max(np.flatnonzero(c.mask), initial=-1)) + 1 for c in group.completions]
    cut = lambda values, n: values[:n] if np.ndim(values) else values
    completions = [Example(c.tokens[:n], c.mask[:n]) for c, n in zip(group.completions, ends)]
    labels = [cut(label, n) for label, n in zip(group.labels, ends)]
    return group._replace(completions=tuple(completions), labels=tuple(labels))

  return dataclasses.replace(data, encode=encode)


def _check_group(group: Group, kind: Kind) -> None:
  count, labels = len(group.completions), [np.ravel(label) for label in group.labels]
  fewest, most = {"pairwise": (2, 2), "listwise": (2, count)}.get(kind, (1, 1))
  if not fewest <= count <= max(fewest, most):
    expected = str(fewest) if fewest == most else f"at least {fewest}"
    raise ValueError(f"{kind} rows: expected {expected} completions, found {count}")
  if not all(((label >= 0) & (label <= 1)).all() for label in labels):
    raise ValueError(f"{kind} rows: expected labels in 0..1, found {labels}")
  if kind == "pairwise" and not labels[0][-1] > 0.5 >= labels[1][-1]:
    found = [float(label[-1]) for label in labels]
    raise ValueError(f"pairwise rows: expected the chosen completion first, found labels {found}")


def fresh_heads(context: Context, members: int) -> jax.Array:
  """[E, D], drawn from the seed and the stage, where layout.params says."""
  row = {heads.HEAD: heads.head_row(context.config, members)}
  dtype = jnp.dtype(context.config.param_dtype)
  make = lambda key: weights.init(key, row, context.layout.params, dtype)
  return jax.jit(make)(context.key("head", 0))[heads.HEAD]


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
  """The jitted (state, batch with leaves [B, S]) -> Evaluation."""
  name = LABELLED if objective.kind in ("outcome", "process") else RANKED

  def evaluate(state: TrainState, batch: ComparisonBatch) -> Evaluation:
    sums, at, values = reward_evaluate(state.params, batch, config=config, objective=objective)
    everywhere = lambda x: jax.reshard(x, jax.P())  # on a pod, every host reads all of it
    outputs = {name: everywhere(values), "labels": everywhere(batch.labels)}
    return Evaluation(sums, everywhere(at), outputs)

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
    for name, part in ranking.by_slice(right, [names[row] for row in rows]).items():
      figures |= {f"slice/{name}/accuracy": part.value, f"slice/{name}/low": part.low}
      figures |= {f"slice/{name}/high": part.high, f"slice/{name}/count": float(part.count)}
  if scores.shape[1] > 1:
    figures |= dict(zip(_AGREEMENT, ranking.agreement(scores)))
  return {f"eval/{name}": value for name, value in figures.items()}


def draw(stage: str, outputs: Outputs) -> list[Drawn]:
  """The held-out rewards at the end: how often a prediction comes true, and how far apart they
  are."""
  figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
  left, right = figure.subplots(1, 2)
  if RANKED in outputs.values:
    pairs = pairs_of(outputs.rows, outputs.values[RANKED].astype(np.float64))
    margins = (pairs.chosen - pairs.rejected).mean(1)
    _reliability(left, ranking.pair_calibration(margins), "share ranked right")
    shares = {"chosen over rejected": margins[margins > 0], "not": margins[margins <= 0]}
    _histogram(right, shares, "margin, chosen - rejected", "pairs")
  else:
    values = outputs.values[LABELLED].astype(np.float64).mean(1)
    labels = outputs.values["labels"]
    _reliability(left, ranking.calibration(ranking.sigmoid(values), labels), "mean label")
    shares = {"label over 0.5": values[labels > 0.5], "label up to 0.5": values[labels <= 0.5]}
    _histogram(right, shares, "value", "predictions")
  return [Drawn(f"{stage}_rewards", f"{stage}: held-out rewards at the end", figure)]


def _reliability(axes: Axes, found: ranking.Calibration, what: str) -> None:
  held = found.counts > 0
  axes.plot(found.edges[[0, -1]], found.edges[[0, -1]], color=COLORS[6], linestyle="--")
  axes.plot(found.confidence[held], found.frequency[held], color=COLORS[0], linewidth=1)
  sizes = 8 + 120 * found.counts[held] / found.counts.max()
  label = f"size: how many; ECE {found.error:.3f}"
  axes.scatter(found.confidence[held], found.frequency[held], sizes, color=COLORS[0], label=label)
  axes.set(xlabel="predicted probability", ylabel=what, ylim=(-0.02, 1.02))
  axes.legend(frameon=False, fontsize=8)


def _histogram(axes: Axes, parts: dict[str, np.ndarray], x: str, y: str) -> None:
  everything = np.concatenate([*parts.values()])
  edges = np.histogram_bin_edges(everything, 40).tolist()
  for (name, part), color in zip(parts.items(), COLORS):
    label = f"{name}, {len(part) / len(everything):.0%}"
    axes.hist(part, edges, color=color, alpha=0.6, label=label)
  axes.axvline(0, color=COLORS[6], linestyle="--", linewidth=1)
  axes.set(xlabel=x, ylabel=y)
  axes.legend(frameon=False, fontsize=8)
