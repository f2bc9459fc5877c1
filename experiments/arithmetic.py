"""Every policy-gradient preset on three-digit sums, from one cold start.

  python -m launch.local experiments.arithmetic:cold_start
  python -m launch.sweep experiments.arithmetic --algorithm grpo dr_grpo dapo gspo cispo sapo rloo \
    reinforce_plus_plus remax ppo vapo --initial runs/arithmetic_cold_start/seed=0/params/sft

The model, the cold start and the rewards are those of `experiments.quickstart`; the problems are
sums and differences of two numbers of three digits, and what is compared is the objective. Each
step draws 24 x 8 completions and makes two updates, so that ratios and clips have something to do.
What they reached: docs/results.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

from experiments import quickstart
from pt_jax.experiment import Critic, Evaluate, Experiment, Online, Stage, Supervised
from pt_jax.losses import objective as objectives
from pt_jax.losses.objective import Objective
from pt_jax.steps.optimizer import AdamW

Algorithm = Literal[
  "ppo",
  "vapo",
  "grpo",
  "dr_grpo",
  "dapo",
  "gspo",
  "cispo",
  "sapo",
  "rloo",
  "reinforce_plus_plus",
  "reinforce_plus_plus_baseline",
  "remax",
]
FAMILIES = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}}
LENGTH = 48  # tokens of a completion
PRESETS: dict[str, Callable[[], Objective]] = {
  "ppo": objectives.ppo,
  "vapo": functools.partial(objectives.vapo, alpha=0.5),  # lambda 0.95 at 40 tokens
  "grpo": objectives.grpo,
  "dr_grpo": functools.partial(objectives.dr_grpo, LENGTH),
  "dapo": functools.partial(objectives.dapo, LENGTH, buffer=LENGTH // 4),
  "gspo": objectives.gspo,
  "cispo": objectives.cispo,
  "sapo": objectives.sapo,
  "rloo": objectives.rloo,
  "reinforce_plus_plus": objectives.reinforce_plus_plus,
  "reinforce_plus_plus_baseline": functools.partial(objectives.reinforce_plus_plus, baseline=True),
  "remax": objectives.remax,
}
PRETRAIN = {"vapo": 5}  # steps in which only the critic learns


def config(
  *,
  algorithm: Algorithm,
  initial: str | None = None,
  sft_steps: int = 400,
  steps: int = 25,
  lr: float = 1e-4,
  critic_lr: float = 5e-4,
  prompts: int = 24,
  group_size: int = 8,
  minibatches: int = 2,
  evaluate_every: int = 0,
  seed: int = 0,
) -> Experiment:
  """A cold start (or the one that another run left), then the chosen algorithm.

  Args:
    algorithm: the preset of `pt_jax.losses.objective`.
    initial: what the stage `sft` of another run left; without it the cold start is trained here.
    sft_steps: updates of the cold start.
    steps: of RL.
    lr: peak learning rate of RL.
    critic_lr: of the critic, where the algorithm has one.
    prompts: problems per step.
    group_size: completions per problem.
    minibatches: updates per step.
    evaluate_every: steps between held-out evaluations; 0: only at the end.
    seed: of initialisation, data order and sampling.
  """
  if algorithm not in PRESETS:
    names = ", ".join(get_args(Algorithm))
    raise ValueError(f"algorithm: expected one of {names}, found {algorithm!r}")
  base = quickstart.config(
    sft_steps=sft_steps,
    grpo_steps=steps,
    grpo_lr=lr,
    prompts=prompts,
    group_size=group_size,
    minibatches=minibatches,
    seed=seed,
  )
  stages = tuple(map(on_sums, base.stages))
  chosen = PRESETS[algorithm]()
  critic = None
  if chosen.has_critic:
    critic = critic_of(critic_lr, steps, minibatches, pretrain=PRETRAIN.get(algorithm, 0))
  policy = dataclasses.replace(
    stages[-1], name="rl", objective=chosen, critic=critic, evaluate_every=evaluate_every
  )
  before = stages[:-1] if initial is None else ()
  return dataclasses.replace(
    base, name="arithmetic", stages=(*before, policy), initial=initial, seed=seed
  )


def cold_start(*, sft_steps: int = 400, seed: int = 0) -> Experiment:
  """The cold start alone, and what it solves.

  Args:
    sft_steps: updates.
    seed: of initialisation, data order and sampling.
  """
  base = config(algorithm="grpo", sft_steps=sft_steps, seed=seed)
  return dataclasses.replace(base, name="arithmetic_cold_start", stages=base.stages[:-1])


def named(name: str, algorithm: Algorithm, **options: Any) -> Experiment:
  """`config` under a name of its own: what the experiments of one algorithm return."""
  return dataclasses.replace(config(algorithm=algorithm, **options), name=name)


def critic_of(lr: float, steps: int, minibatches: int, *, pretrain: int) -> Critic:
  """A critic of the policy's size that makes two passes over the completions of a step."""
  updates = (steps + pretrain) * 2 * minibatches
  optimizer = AdamW(lr, steps=updates, warmup=min(5, updates), final_scale=0.2)
  return Critic(optimizer, epochs=2, pretrain=pretrain)


def on_sums(stage: Stage) -> Any:
  """A stage of the quickstart on sums and differences of three digits alone."""
  if isinstance(stage, Supervised):
    return dataclasses.replace(stage, data=_families(stage.data))
  assert isinstance(stage, Online | Evaluate)
  return dataclasses.replace(stage, problems=_families(stage.problems))


def _families(recipe: Any) -> functools.partial:
  return functools.partial(recipe.func, **recipe.keywords | {"families": FAMILIES})
