"""GRPO and its relatives on three-digit sums: the ablations `grpo`, `dr_grpo` and `dapo`.

  python -m launch.local experiments.grpo_arithmetic:dapo --seed 1
  python -m launch.sweep experiments.grpo_arithmetic --algorithm grpo dr_grpo dapo

The stages, the model and the cold start are those of `experiments.quickstart`; the problems are
sums and differences of two numbers of three digits, and what is compared is the objective.

Seen on a 2-core CPU, seed 0, 512 held-out problems: pass@1 0.414 after the cold start, then 0.850
with grpo, 0.854 with dr_grpo, 0.861 with dapo (greedy 0.508, then 0.936, 0.934, 0.943). They do not
differ: the standard error is 0.016. The sweep took 26 minutes beside other jobs.
"""

import dataclasses
import functools
from typing import Any, Literal

from experiments import quickstart
from pt_jax.experiment import Evaluate, Experiment, Online, Stage, Supervised
from pt_jax.losses import objective as objectives
from pt_jax.losses.objective import Objective

Algorithm = Literal["grpo", "dr_grpo", "dapo"]
FAMILIES = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}}


def config(
  *,
  algorithm: Algorithm = "grpo",
  sft_steps: int = 400,
  steps: int = 80,
  lr: float = 1e-4,
  prompts: int = 48,
  group_size: int = 8,
  seed: int = 0,
) -> Experiment:
  """A cold start, then the chosen objective.

  Args:
    algorithm: the preset of `pt_jax.losses.objective`.
    sft_steps: updates of the cold start.
    steps: of RL, one update each.
    lr: peak learning rate of RL.
    prompts: problems per step.
    group_size: completions per problem.
    seed: of initialisation, data order and sampling.
  """
  base = quickstart.config(
    sft_steps=sft_steps,
    grpo_steps=steps,
    grpo_lr=lr,
    prompts=prompts,
    group_size=group_size,
    seed=seed,
  )
  length = next(s.sampling.max_tokens for s in base.stages if isinstance(s, Online))
  chosen = _objective(algorithm, length)
  stages = tuple(_on_sums(stage, chosen) for stage in base.stages)
  return dataclasses.replace(base, name="grpo_arithmetic", stages=stages)


def grpo(*, seed: int = 0) -> Experiment:
  """DeepSeekMath's objective: std of the group, mean per completion, k3 KL to the cold start.

  Args:
    seed: of initialisation, data order and sampling.
  """
  return _named("grpo", seed)


def dr_grpo(*, seed: int = 0) -> Experiment:
  """GRPO without the std and without lengths in the denominator.

  Args:
    seed: of initialisation, data order and sampling.
  """
  return _named("dr_grpo", seed)


def dapo(*, seed: int = 0) -> Experiment:
  """Clip-higher, dynamic sampling, token-level loss, overlong penalty, no KL.

  Args:
    seed: of initialisation, data order and sampling.
  """
  return _named("dapo", seed)


def _named(algorithm: Algorithm, seed: int) -> Experiment:
  base = config(algorithm=algorithm, seed=seed)
  return dataclasses.replace(base, name=f"{base.name}_{algorithm}")


def _objective(algorithm: Algorithm, length: int) -> Objective:
  presets = {
    "grpo": objectives.grpo(),
    "dr_grpo": objectives.dr_grpo(length),
    "dapo": objectives.dapo(length, buffer=length // 4),
  }
  if algorithm not in presets:
    raise ValueError(f"algorithm: expected one of {', '.join(presets)}, found {algorithm!r}")
  return presets[algorithm]


def _on_sums(stage: Stage, chosen: Objective) -> Stage:
  """The stage on sums alone, and with the chosen objective."""
  if isinstance(stage, Supervised):
    return dataclasses.replace(stage, data=_families(stage.data))
  if isinstance(stage, Evaluate):
    return dataclasses.replace(stage, problems=_families(stage.problems))
  assert isinstance(stage, Online)
  return dataclasses.replace(stage, problems=_families(stage.problems), objective=chosen)


def _families(recipe: Any) -> functools.partial:
  return functools.partial(recipe.func, **recipe.keywords | {"families": FAMILIES})
