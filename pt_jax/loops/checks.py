"""What can be wrong with an experiment, found before anything is compiled or written.

A stage's data is opened and its first row encoded, so that a wrong path, field or template shows at
once. Rows further on are checked when they are read; the prompts of problems are all checked here,
since one that leaves no room for an answer would otherwise end a run in its middle.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from pt_jax import sharding, weights
from pt_jax.data import pipeline
from pt_jax.data.sources import Source, Subset
from pt_jax.data.tasks import Problem
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import (
  Critic,
  EarlyStop,
  Evaluate,
  Offline,
  Online,
  OnlinePreference,
  Preference,
  Problems,
  Reward,
  Stage,
  Supervised,
  ValueHead,
)
from pt_jax.loops import preference, reward_model, supervised
from pt_jax.loops.context import in_stage
from pt_jax.loops.diagnostics import SAMPLE_METRICS
from pt_jax.loops.rollouts import CORRECT
from pt_jax.models import heads
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import USE
from pt_jax.weights import Table


def check_model(
  config: ModelConfig,
  table: Table,
  layout: sharding.Layout,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
) -> None:
  """Raises ValueError when the tokenizer or the mesh does not fit the model."""
  if config.vocab_size < tokenizer.vocab_size:
    raise ValueError(
      f"model: vocab_size: expected at least {tokenizer.vocab_size} (tokenizer {tokenizer.name}), "
      f"found {config.vocab_size}"
    )
  for rules in (USE, *layout):
    weights.check_mesh(table, rules, mesh)


def check_stage(
  stage: Stage,
  config: ModelConfig,
  table: Table,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
) -> None:
  """Raises ValueError naming the stage and what of it cannot run."""
  with in_stage(stage.name):
    if isinstance(stage, Offline):
      trained = heads.table(config, stage.members) if isinstance(stage, Reward) else table
      stage.optimizer.transform(trained)
      _check_offline(stage, config, tokenizer, mesh)
    else:
      if isinstance(stage, Online | OnlinePreference):
        head = isinstance(stage, Online) and isinstance(stage.critic, ValueHead)
        extra = {heads.HEAD: heads.head_row(config)} if head else {}
        stage.optimizer.transform({**table, **extra})
        _check_rows(stage.rows, stage.row_length, config, mesh)
      if isinstance(stage, Online):
        _check_online(stage, config, tokenizer, mesh)
      _check_problems(stage, tokenizer, config, mesh)


def _check_online(
  stage: Online, config: ModelConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> None:
  """What the stage has besides a policy and its problems."""
  if isinstance(stage.critic, Critic):
    stage.critic.optimizer.transform(heads.table(config))
  if stage.mix is not None:
    layout = stage.mix.layout
    _check_rows(layout.batch_size, layout.row_length, config, mesh)
    data = preference.checked(stage.mix.data(tokenizer))
    check = functools.partial(preference.check_kind, objective=stage.mix.objective, held_out=False)
    for source in data.train.sources.values():
      _check_first_row(source, data.encode, layout, data.form)
      _check_comparison(source, data.encode, check)


def _check_offline(
  stage: Offline, config: ModelConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> None:
  rows = stage.layout.batch_size // stage.microbatches
  _check_rows(rows, stage.layout.row_length, config, mesh)
  _check_stop(stage.stop, _logged(stage))
  data = stage.data(tokenizer)
  if isinstance(stage, Reward):
    data = reward_model.checked(stage.data(tokenizer), stage.objective.kind)
  if isinstance(stage, Preference):
    data = preference.checked(stage.data(tokenizer))
  for source in (*data.train.sources.values(), data.held_out):
    _check_first_row(source, data.encode, stage.layout, data.form)
    if isinstance(stage, Preference):
      held_out = source is data.held_out
      check = functools.partial(preference.check_kind, objective=stage.objective)
      _check_comparison(source, data.encode, functools.partial(check, held_out=held_out))
  if stage.sample_every:
    assert stage.sampling is not None  # see `Offline`
    if not data.prompts:
      raise ValueError("sample_every: expected data with prompts, found none")
    named = ((f"prompt {i}", prompt) for i, prompt in enumerate(data.prompts))
    _check_prompts(named, config.max_length, stage.sampling.max_tokens)


def _logged(stage: Offline) -> set[str]:
  """The metrics that a stage logs, those under names of its data apart."""
  if isinstance(stage, Reward):
    return set(reward_model.metrics_of(stage))
  if isinstance(stage, Preference):
    step, evaluation = preference.metric_names(stage.objective)
  else:
    assert isinstance(stage, Supervised)
    step = supervised.step_metrics(stage.objective)
    evaluation = supervised.evaluation_metrics(stage.objective)
  return {*step, *evaluation, *(SAMPLE_METRICS if stage.sample_every else ())}


def _check_stop(rules: Iterable[EarlyStop], logged: set[str]) -> None:
  for rule in rules:
    if rule.metric not in logged:
      names = ", ".join(sorted(logged))
      raise ValueError(f"early stop: expected a metric among {names}, found {rule.metric!r}")


def _check_rows(rows: int, length: int, config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
  sharding.check_divides("a microbatch", (rows, length), ("batch", "seq"), USE, mesh)
  if length > config.max_length:
    raise ValueError(
      f"row_length: expected at most the model's max_length {config.max_length}, found {length}"
    )


def _check_first_row(
  source: Source, encode: pipeline.Encode, layout: pipeline.Layout, form: pipeline.Form
) -> None:
  """The first row can be encoded, and fits where a longer one would be an error."""
  length = layout.row_length
  if layout.too_long != "error":
    length = max(length, form.length(encode(source[0])))
  one = dataclasses.replace(layout, batch_size=1, row_length=length)
  next(iter(pipeline.eval_batches(Subset(source, [0]), encode, one, form=form)))


def _check_comparison(
  source: Source, encode: pipeline.Encode, check: Callable[[Any], None]
) -> None:
  """The first row holds what the objective compares."""
  try:
    check(encode(source[0]))
  except ValueError as error:
    raise ValueError(f"{source.where(0)}: {error}") from error


def _check_prompts(
  prompts: Iterable[tuple[str, Sequence[int]]], room: int, max_tokens: int
) -> None:
  """Every prompt (a name and tokens) has tokens, and `room` for them and for a completion."""
  for name, prompt in prompts:
    if not 0 < len(prompt) <= room - max_tokens:
      raise ValueError(
        f"{name}: expected 1 to {room - max_tokens} tokens ({max_tokens} of {room} are for the "
        f"completion), found {len(prompt)}"
      )


def _check_problems(
  stage: Online | OnlinePreference | Evaluate,
  tokenizer: Tokenizer,
  config: ModelConfig,
  mesh: jax.sharding.Mesh,
) -> None:
  sharding.check_divides("slots", (stage.slots,), ("batch",), USE, mesh)
  problems, stack = stage.problems(tokenizer), stage.rewards()
  names = [component.name for component in stack.components]
  if CORRECT not in names:
    raise ValueError(
      f"expected a reward component named {CORRECT!r} (pass@1 is its mean), found {names}"
    )
  count = stage.count if isinstance(stage, Evaluate) else stage.evaluate_problems
  if len(problems.held_out) < count:
    raise ValueError(f"held-out problems: expected {count}, found {len(problems.held_out)}")
  room = config.max_length if isinstance(stage, Evaluate) else stage.row_length
  if isinstance(stage, OnlinePreference):
    room //= stage.completions_per_group
  train = () if isinstance(stage, Evaluate) else _trained_on(stage, problems)
  asked = itertools.chain(train, itertools.islice(problems.held_out, count))
  prompts = ((f"problem {problem.id}", problems.encode(problem)) for problem in asked)
  _check_prompts(prompts, room, stage.sampling.max_tokens)


def _trained_on(stage: Online | OnlinePreference, problems: Problems) -> Iterable[Problem]:
  """All problems that the stage may draw."""
  if isinstance(stage, OnlinePreference) or stage.curriculum is None:
    return problems.train
  least, found = max(2, stage.curriculum.first + 1), len(problems.levels)
  if found < least:
    raise ValueError(f"curriculum: expected at least {least} levels of problems, found {found}")
  return itertools.chain(*problems.levels)
