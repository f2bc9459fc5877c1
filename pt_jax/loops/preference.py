"""The preference stage: what it brings to the offline loop, and what it says of held-out pairs.

The reference is what the stage starts from. Its log-probs are computed with every batch, or once
and then read from the folder of the run.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from pt_jax.data.batch import ComparisonBatch
from pt_jax.data.groups import Group
from pt_jax.experiment import ComparisonData, Preference
from pt_jax.loops import offline, ranking, reference
from pt_jax.loops.context import Context
from pt_jax.loops.offline import Evaluation, Outputs, Training
from pt_jax.loops.report import COLORS, Drawn
from pt_jax.losses.preference_objective import PreferenceObjective
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import Layout
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.preference import (
  PreferenceState,
  PreferenceUpdater,
  completion_logprobs,
  preference_evaluate,
  preference_step,
  score,
)
from pt_jax.steps.state import Updater
from pt_jax.weights import Params

REFERENCE = "reference"  # folder of the run that cached log-probs are in


def metric_names(objective: PreferenceObjective) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """What a stage with this objective logs: of every step, and of an evaluation."""
  shared = {"accuracy", "margin", "chosen_reward", "rejected_reward"}
  if objective.reference:
    shared |= {"chosen_logprob_change", "rejected_logprob_change"}
  pairs, single = set(), set()
  if objective.unpaired:
    single |= {"reward"} | ({"baseline"} if objective.loss != "apo_zero_unpaired" else set())
  for name, there in (
    ("sft", objective.sft),
    ("confidence", objective.confidence_weighted),
    ("beyond_limit", objective.margin_limit is not None),
    ("beta", objective.dynamic_beta is not None),
    ("margin_at_beta", objective.dynamic_beta is not None),
  ):
    pairs |= {name} if there else set()
  step = {f"preference/{name}" for name in shared | single | pairs}
  figures = {"loss", "ranking_accuracy", "accuracy_low", "accuracy_high"}
  evaluation = {f"eval/{name}" for name in shared | pairs | figures}
  return (*offline.METRICS, *sorted(step)), tuple(sorted(evaluation))


def run_preference(stage: Preference, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes a preference stage; see `offline.run_offline`."""
  data = checked(stage.data(context.tokenizer))
  online = stage.objective.reference and stage.reference == "online"
  if stage.objective.reference and not online:
    data = _with_cached(stage, data, context)
  step = compiled_step(context.config, stage.optimizer, context.layout, stage.objective)
  evaluate = compiled_evaluation(context.config, stage.objective)
  policy = context.params if online else None
  training = Training(
    context=context,
    updater=PreferenceUpdater(Updater(stage.optimizer, context.table, context.layout)),
    update=lambda state, batch: step(state, batch, policy),
    evaluate=lambda state, batch: evaluate(state, batch, policy),
    figures=functools.partial(_figures, held_out_slices(data)),
    shown={"loss": "loss", "accuracy": "preference/accuracy", "margin": "preference/margin"},
    derived=functools.partial(_derived, stage.objective),
    histograms=("margin", "chosen_reward", "rejected_reward"),
  )
  return offline.run_offline(stage, data, training)


@functools.cache
def compiled_step(
  config: ModelConfig, optimizer: AdamW, layout: Layout, objective: PreferenceObjective
) -> Any:
  """The jitted, donated (state, batch [A, B, S], reference or None) -> (state, metrics).

  One program scores and updates. Two of them in flight at a time on several CPU devices wait for
  each other's threads.
  """
  updater = Updater(optimizer, decoder.table(config), layout)

  def step(
    state: PreferenceState, batch: ComparisonBatch, reference: Params | None
  ) -> tuple[PreferenceState, Any]:
    state, metrics = preference_step(
      state, batch, config=config, updater=updater, objective=objective, reference=reference
    )
    return state, metrics | offline.counted(batch)

  return jax.jit(step, donate_argnums=0)


@functools.cache
def compiled_score(config: ModelConfig) -> Any:
  """The jitted (params, batch with leaves [B, S]) -> log-probs [B, S]."""
  return jax.jit(functools.partial(completion_logprobs, config=config))


@functools.cache
def compiled_microbatch_scores(config: ModelConfig) -> Any:
  """The jitted (params, batch with leaves [A, B, S]) -> log-probs [A, B, S]."""
  return jax.jit(functools.partial(score, config=config))


@functools.cache
def compiled_evaluation(config: ModelConfig, objective: PreferenceObjective) -> Any:
  """The jitted (state, batch with leaves [B, S], reference or None) -> Evaluation."""

  def evaluate(
    state: PreferenceState, batch: ComparisonBatch, reference: Params | None
  ) -> Evaluation:
    found = preference_evaluate(
      state, batch, config=config, objective=objective, reference=reference
    )
    everywhere = lambda x: jax.reshard(x, jax.P())  # on a pod, every host reads all of it
    return Evaluation(found[0], *jax.tree.map(everywhere, found[1:]))

  return jax.jit(evaluate)


def checked(data: ComparisonData) -> ComparisonData:
  """The data, its rows checked to be what a preference objective can compare."""

  def encode(row: Mapping[str, Any]) -> Group:
    group = data.encode(row)
    if isinstance(group, Group):  # else the pipeline says so
      _check_group(group)
    return group

  return dataclasses.replace(data, encode=encode)


def check_kind(group: Group, objective: PreferenceObjective, *, held_out: bool) -> None:
  """Raises ValueError when the group is not of the kind that the objective trains, or is evaluated
  on."""
  given = sum(is_given(label) for label in group.labels)
  wanted = 2 if held_out or not objective.unpaired else 1
  if given != wanted:
    kinds = {1: "one labelled completion", 2: "a pair of completions"}
    why = "a held-out row" if held_out else f"the loss {objective.loss!r}"
    raise ValueError(f"{why}: expected {kinds[wanted]}, found {kinds.get(given, given)}")
  if objective.loss == "kto" and not held_out and len(group.completions) == given:
    raise ValueError(
      "the loss 'kto': expected a mismatched completion behind the labelled one, found none"
    )


def is_given(label: Any) -> bool:
  """Whether a completion is one of the row's, not one of another prompt."""
  return bool(np.all(np.asarray(label) >= 0))


def _check_group(group: Group) -> None:
  given = [c for c, label in zip(group.completions, group.labels) if is_given(label)]
  labels = [float(np.ravel(label)[0]) for label in group.labels[: len(given)]]
  if len(given) == 2 and not labels[0] > 0.5 >= labels[1]:
    raise ValueError(f"expected the chosen completion before the rejected one, found {labels}")
  if len(given) == 2 and np.array_equal(given[0].tokens, given[1].tokens):
    raise ValueError("expected two different completions, found the same one twice")
  if group.margin:
    raise ValueError(f"margin: a preference objective does not read it, found {group.margin}")


def held_out_slices(data: ComparisonData) -> list[str] | None:
  """The slice of every held-out row, if the data has slices."""
  if data.slice is None:
    return None
  return [data.slice(data.held_out[i]) for i in range(len(data.held_out))]


def _with_cached(stage: Preference, data: ComparisonData, context: Context) -> ComparisonData:
  """The data with the reference log-probs that the run has on disk, or gets now."""
  rows = stage.layout.batch_size // stage.microbatches
  known = reference.cached(
    data,
    dataclasses.replace(stage.layout, batch_size=rows),
    functools.partial(compiled_score(context.config), context.params),
    context.stage.folder / REFERENCE / reference.params_hash(context.params),
    context.mesh,
  )
  return reference.with_references(data, known)


def _derived(objective: PreferenceObjective, metrics: dict[str, float]) -> dict[str, float]:
  if not objective.unpaired:
    return {}
  rewards = (metrics[f"preference/{side}_reward"] for side in ("chosen", "rejected"))
  chosen, rejected = rewards
  return {"preference/margin": chosen - rejected}


def _figures(
  slices: list[str] | None, means: dict[str, float], outputs: Outputs
) -> dict[str, float]:
  """Of all held-out pairs: means, and the accuracy (a draw is half right) with its 95 % interval;
  accuracy and mean margin of every slice, the least separated first."""
  margins = outputs.values["margin"]
  right = ranking.right_order(margins)
  share = ranking.share(right)
  figures = {
    **means,
    "accuracy": share.value,
    "accuracy_low": share.low,
    "accuracy_high": share.high,
  }
  if slices is not None:
    names = np.array([slices[row] for row in outputs.rows])
    mean = {name: float(margins[names == name].mean()) for name in np.unique(names).tolist()}
    parts = ranking.by_slice(right, names.tolist())
    for name in sorted(mean, key=lambda name: (mean[name], name)):
      part = parts[name]
      of_slice = {"margin": mean[name], "accuracy": part.value, "low": part.low, "high": part.high}
      of_slice["count"] = float(part.count)
      figures |= {f"slice/{name}/{what}": value for what, value in of_slice.items()}
  return {f"eval/{name}": value for name, value in figures.items()}


def draw(stage: str, outputs: Outputs) -> list[Drawn]:
  """The held-out pairs at the end: their margins, and how far the log-probs moved."""
  margins = outputs.values["margin"]
  sides = {
    name: outputs.values[f"{name}_logprob_change"]
    for name in ("chosen", "rejected")
    if f"{name}_logprob_change" in outputs.values
  }
  figure = Figure(figsize=(10 if sides else 6, 3.8), dpi=120, layout="constrained")
  panels = figure.subplots(1, 2 if sides else 1, squeeze=False)[0]
  edges = np.histogram_bin_edges(margins, 40)
  right = float((margins > 0).mean())
  for wrong, color in ((True, COLORS[1]), (False, COLORS[0])):
    part = margins[(margins <= 0) == wrong]
    share = 1 - right if wrong else right
    label = f"{'rejected' if wrong else 'chosen'} preferred, {share:.0%}"
    panels[0].hist(part, edges, color=color, label=label)
  panels[0].axvline(float(margins.mean()), color=COLORS[6], linestyle="--", label="mean")
  panels[0].set(xlabel="implicit reward margin, chosen - rejected", ylabel="pairs")
  panels[0].legend(frameon=False, fontsize=8)
  if sides:
    edges = np.histogram_bin_edges(np.concatenate([*sides.values()]), 40)
    for (name, change), color in zip(sides.items(), COLORS):
      label = f"{name}, mean {change.mean():+.1f}"
      panels[1].hist(change, edges, color=color, alpha=0.6, label=label)
    panels[1].set(xlabel="log-prob of the completion - reference, nats", ylabel="completions")
    panels[1].legend(frameon=False, fontsize=8)
  return [Drawn(f"{stage}_margins", f"{stage}: held-out pairs at the end", figure)]
