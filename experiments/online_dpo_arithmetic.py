"""Online preference learning on three-digit sums: `online_dpo`, `online_ipo`, `online_kto`.

  python -m launch.local experiments.online_dpo_arithmetic:online_dpo
  python -m launch.local experiments.online_dpo_arithmetic --algorithm dpo --refresh-every 4

The cold start, the problems and the rewards are those of `experiments.arithmetic`. At every step
the policy answers 24 problems 8 times; the verifier orders the answers to a problem, and the best
stands against the worst (DPO, IPO), or each is right or wrong (KTO).

Seen on a 2-core CPU, seed 0, 512 held-out problems: pass@1 0.414 after the cold start, then 0.762
with dpo, 0.756 with ipo, 0.783 with kto (greedy 0.508, then 0.902, 0.912, 0.920). From a cold start
that is there the 25 steps take 41 s, 40 s and 1m48s.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from experiments import arithmetic
from pt_jax.experiment import Experiment, Online, OnlinePreference
from pt_jax.losses import preference_objective as objectives
from pt_jax.losses.preference_objective import PreferenceObjective
from pt_jax.steps.optimizer import AdamW

Algorithm = Literal["dpo", "ipo", "kto"]
OBJECTIVES: dict[str, Callable[[float], PreferenceObjective]] = {
  "dpo": objectives.dpo,
  "ipo": objectives.ipo,
  "kto": objectives.kto,
}


def config(
  *,
  algorithm: Algorithm = "dpo",
  initial: str | None = None,
  sft_steps: int = 400,
  steps: int = 25,
  lr: float = 1e-4,
  beta: float = 0.1,
  prompts: int = 24,
  group_size: int = 8,
  minibatches: int = 2,
  refresh_every: int = 1,
  reference_every: int = 0,
  seed: int = 0,
) -> Experiment:
  """A cold start (or the one that another run left), then the objective on what the policy samples.

  Args:
    algorithm: the objective.
    initial: what the stage `sft` of another run left; without it the cold start is trained here.
    sft_steps: updates of the cold start.
    steps: batches of samples.
    lr: peak learning rate of the preference stage.
    beta: implicit reward per nat; for ipo the regularisation.
    prompts: problems per step.
    group_size: completions per problem.
    minibatches: updates per step.
    refresh_every: steps whose completions are drawn from the same weights.
    reference_every: steps after which the policy becomes the reference; 0: never.
    seed: of initialisation, data order and sampling.
  """
  if algorithm not in OBJECTIVES:
    raise ValueError(f"algorithm: expected one of {', '.join(OBJECTIVES)}, found {algorithm!r}")
  base = arithmetic.config(algorithm="grpo", initial=initial, sft_steps=sft_steps, seed=seed)
  *before, online = base.stages
  assert isinstance(online, Online)
  updates = steps * minibatches
  stage = OnlinePreference(
    name="preference",
    problems=online.problems,
    rewards=online.rewards,
    objective=OBJECTIVES[algorithm](beta),
    sampling=online.sampling,
    optimizer=AdamW(lr, steps=updates, warmup=min(5, updates), final_scale=0.2),
    steps=steps,
    prompts=prompts,
    group_size=group_size,
    minibatches=minibatches,
    rows=8,
    row_length=online.row_length,
    refresh_every=refresh_every,
    reference_every=reference_every,
    checkpoint_every=10,
  )
  return dataclasses.replace(base, name="online_preference_arithmetic", stages=(*before, stage))


def online_dpo(*, seed: int = 0) -> Experiment:
  """The best of eight answers against the worst.

  Args:
    seed: of initialisation, data order and sampling.
  """
  return _named("online_dpo", config(algorithm="dpo", seed=seed))


def online_ipo(*, seed: int = 0) -> Experiment:
  """The same pairs, with a margin of 1 / (2 beta) to aim at.

  Args:
    seed: of initialisation, data order and sampling.
  """
  return _named("online_ipo", config(algorithm="ipo", seed=seed))


def online_kto(*, seed: int = 0) -> Experiment:
  """Right and wrong answers, unpaired.

  Args:
    seed: of initialisation, data order and sampling.
  """
  return _named("online_kto", config(algorithm="kto", prompts=12, seed=seed))


def _named(name: str, made: Experiment) -> Experiment:
  return dataclasses.replace(made, name=f"{name}_arithmetic")
