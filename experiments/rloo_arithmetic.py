"""RLOO on three-digit sums: the other completions of a prompt are the baseline.

  python -m launch.local experiments.rloo_arithmetic

`remax` takes the greedy completion as the baseline instead.

Seen on a 2-core CPU, seed 0, 512 held-out problems: pass@1 0.787 (greedy
0.920) after 25 steps, 0.414 (0.508) after the cold start. The steps took 64 s; `remax` 0.770.
"""

from experiments import arithmetic
from pt_jax.experiment import Experiment


def config(
  *,
  initial: str | None = None,
  steps: int = 25,
  lr: float = 1e-4,
  seed: int = 0,
) -> Experiment:
  """The cold start of `experiments.arithmetic`, then RLOO.

  Args:
    initial: what the stage `sft` of another run left; without it the cold start is trained here.
    steps: of RL.
    lr: peak learning rate of the policy.
    seed: of initialisation, data order and sampling.
  """
  return arithmetic.named(
    "rloo_arithmetic",
    "rloo",
    initial=initial,
    steps=steps,
    lr=lr,
    seed=seed,
  )


def remax(*, initial: str | None = None, seed: int = 0) -> Experiment:
  """ReMax: the reward of the greedy completion is the baseline.

  Args:
    initial: what the stage `sft` of another run left.
    seed: of initialisation, data order and sampling.
  """
  return arithmetic.named("rloo_arithmetic_remax", "remax", initial=initial, seed=seed)
