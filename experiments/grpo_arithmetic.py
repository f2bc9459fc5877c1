"""GRPO and its relatives on three-digit sums: the ablations `grpo`, `dr_grpo` and `dapo`.

  python -m launch.local experiments.grpo_arithmetic:dapo --seed 1
  python -m launch.sweep experiments.grpo_arithmetic --algorithm grpo dr_grpo dapo

`experiments.arithmetic` with twice as many problems a step, one update on them, and held-out
evaluations on the way.

Seen on a 2-core CPU, seed 0, 512 held-out problems: pass@1 0.414 after the cold start, then 0.850
with grpo, 0.854 with dr_grpo, 0.861 with dapo (greedy 0.508, then 0.936, 0.934, 0.943). They do not
differ: the standard error is 0.016. The sweep took 26 minutes beside other jobs.
"""

import dataclasses
from typing import Literal, get_args

from experiments import arithmetic
from pt_jax.experiment import Experiment

Algorithm = Literal["grpo", "dr_grpo", "dapo"]


def config(
  *,
  algorithm: Algorithm = "grpo",
  initial: str | None = None,
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
    initial: what the stage `sft` of another run left; without it the cold start is trained here.
    sft_steps: updates of the cold start.
    steps: of RL, one update each.
    lr: peak learning rate of RL.
    prompts: problems per step.
    group_size: completions per problem.
    seed: of initialisation, data order and sampling.
  """
  if algorithm not in get_args(Algorithm):
    names = ", ".join(get_args(Algorithm))
    raise ValueError(f"algorithm: expected one of {names}, found {algorithm!r}")
  return arithmetic.named(
    "grpo_arithmetic",
    algorithm,
    initial=initial,
    sft_steps=sft_steps,
    steps=steps,
    lr=lr,
    prompts=prompts,
    group_size=group_size,
    minibatches=1,
    evaluate_every=20,
    seed=seed,
  )


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
