"""An experiment from config to report: each stage starts from what the one before left."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from pt_jax import checkpoint, sharding, weights
from pt_jax.experiment import (
  Experiment,
  Offline,
  Online,
  OnlinePreference,
  Preference,
  Reward,
  Stage,
  Supervised,
)
from pt_jax.loops import preference, report, reward_model
from pt_jax.loops.checks import check_model, check_stage
from pt_jax.loops.context import Context, initial_params
from pt_jax.loops.evaluation import run_evaluate
from pt_jax.loops.offline import Outputs, read_outputs
from pt_jax.loops.online import run_online
from pt_jax.loops.online_preference import run_online_preference
from pt_jax.loops.preference import run_preference
from pt_jax.loops.reward_model import run_reward
from pt_jax.loops.run import Run
from pt_jax.loops.supervised import run_supervised
from pt_jax.models import decoder, hf
from pt_jax.models.config import ARCHITECTURE, ModelConfig
from pt_jax.weights import Params

PICTURES = (
  *report.PICTURES,
  report.Picture(
    "samples",
    "Diversity and leakage of samples",
    "share",
    ("samples/distinct*", "samples/*diversity", "samples/*leakage"),
  ),
  report.Picture(
    "margin",
    "Implicit rewards and their difference",
    "beta times nats",
    ("preference/reward", "preference/*_reward", "preference/margin"),
  ),
  report.Picture(
    "displacement",
    "Log-prob of a completion, policy minus reference",
    "nats",
    ("preference/*logprob_change",),
  ),
)


# Pictures of what a kind of stage kept of its last held-out evaluation: (stage's name, outputs) ->
PICTURED: dict[type[Offline], Callable[[str, Outputs], list[report.Drawn]]] = {
  Preference: preference.draw,
  Reward: reward_model.draw,
}
Results = dict[str, dict[str, float]]  # stage name -> its figures


class Finished(NamedTuple):
  """What an experiment left."""

  folder: Path  # of the run
  results: Results
  params: Params


def run_experiment(
  experiment: Experiment, *, runs: str | os.PathLike[str] = "runs", id: str, quiet: bool = False
) -> Finished:
  """Runs an experiment, or goes on with it where its folder `runs/NAME/id` says it was.

  Args:
    experiment: what to do.
    runs: the folder of all runs.
    id: of this run of the experiment.
    quiet: no progress on the terminal.

  Raises ValueError with one line: for what cannot work (tokenizer, checkpoint, mesh, data, stage)
  before anything is compiled or written; for a loss that is not finite, before a checkpoint of it
  is written.
  """
  tokenizer = experiment.tokenizer()
  config = _config(experiment)
  table, layout = decoder.table(config), sharding.zero(experiment.zero)
  mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
  stages = [_opened_once(stage) for stage in experiment.stages]
  context = functools.partial(
    Context,
    mesh=mesh,
    tokenizer=tokenizer,
    config=config,
    table=table,
    layout=layout,
    seed=experiment.seed,
    quiet=quiet,
  )
  with jax.set_mesh(mesh):
    check_model(config, table, layout, tokenizer, mesh)
    for stage in stages:
      check_stage(stage, config, table, tokenizer, mesh)
    loaded = None
    if experiment.checkpoint is not None:
      loaded = hf.load(experiment.checkpoint, config, mesh, layout.params)
    if experiment.initial is not None:
      like = weights.abstract(table, layout.params, mesh, np.dtype(config.param_dtype))
      loaded = checkpoint.restore_params(experiment.initial, like)
    with Run.open(runs, experiment.name, id, experiment) as opened:
      params, results = _run_stages(opened, stages, context, loaded)
      if jax.process_index() == 0:
        rows = results_table(results)
        title, drawn = f"{experiment.name} {id}", _drawn(stages, opened.folder)
        report.write_report(opened.folder, title, rows, PICTURES, drawn)
  return Finished(opened.folder, results, params)


def _config(experiment: Experiment) -> ModelConfig:
  """The model; with a checkpoint, in the dtypes and with the rematerialisation that `model` asks
  for. Raises ValueError where the checkpoint is of another model."""
  if experiment.checkpoint is None:
    return cast(ModelConfig, experiment.model)
  saved = hf.read_config(experiment.checkpoint)
  config = experiment.model or saved
  for field in ARCHITECTURE:
    wanted, found = getattr(config, field), getattr(saved, field)
    if wanted != found:
      where = f"{experiment.checkpoint}/config.json: {field}"
      raise ValueError(f"{where}: expected {wanted} (the experiment's model), found {found}")
  return config


def results_table(results: Results) -> list[dict[str, str | float | None]]:
  """A row for every figure, a column for every stage."""
  names = dict.fromkeys(name for figures in results.values() for name in figures)
  return [
    {"figure": name, **{stage: figures.get(name) for stage, figures in results.items()}}
    for name in names
  ]


def _drawn(stages: Sequence[Stage], folder: Path) -> list[report.Drawn]:
  pictures: list[report.Drawn] = []
  for stage in stages:
    outputs = read_outputs(folder, stage.name)
    if outputs is not None and isinstance(stage, tuple(PICTURED)):
      pictures += PICTURED[type(stage)](stage.name, outputs)
  return pictures


def _run_stages(
  opened: Run, stages: Sequence[Stage], context: Callable[..., Context], loaded: Params | None
) -> tuple[Params, Results]:
  """Runs the stages that are not finished; the first from `loaded`, or from random ones if None."""
  results: Results = {}
  saved = lambda name, like: opened.stage(name).params(like)
  context = functools.partial(context, saved=saved)
  last, policy = None, loaded  # the stage that left the policy, and the policy if it is in memory
  for stage in stages:
    handle, left = opened.stage(stage.name), None
    if not handle.finished:
      begin = _policy_of(stage.start or last, last, policy, context(stage=handle, params=None))
      given = context(stage=handle, params=begin)
      left, results[stage.name] = _run_stage(stage, given)
      handle.finish(left, results[stage.name])
    else:
      results[stage.name] = handle.results()
    if stage.leaves_policy:
      last, policy = stage.name, left
  given = context(stage=opened.stage(stages[-1].name), params=None)
  return _policy_of(last, last, policy, given), results


def _policy_of(
  stage: str | None, last: str | None, policy: Params | None, context: Context
) -> Params:
  """What `stage` left (None: what there was before the first): `policy` if that is what `last`
  left and it is still in memory, else read from the run or drawn anew."""
  if policy is not None and stage == last:
    return policy
  return context.left_by(stage, context.table) if stage else initial_params(context)


def _run_stage(stage: Stage, context: Context) -> tuple[Params, dict[str, float]]:
  if isinstance(stage, Supervised):
    return run_supervised(stage, context)
  if isinstance(stage, Reward):
    return run_reward(stage, context)
  if isinstance(stage, Preference):
    return run_preference(stage, context)
  if isinstance(stage, Online):
    return run_online(stage, context)
  if isinstance(stage, OnlinePreference):
    return run_online_preference(stage, context)
  return run_evaluate(stage, context)


def _opened_once(stage: Stage) -> Stage:
  """The stage with its data function remembering what it opened: checks and loop share it."""
  if isinstance(stage, Offline):
    return dataclasses.replace(stage, data=cast(Any, functools.cache(stage.data)))
  return dataclasses.replace(stage, problems=functools.cache(stage.problems))
