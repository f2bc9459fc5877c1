"""The parts of an `Objective`: frozen values whose fields are checked when they are made."""

import dataclasses
import typing
from typing import Literal

from pt_jax.losses import advantages

Estimator = Literal["k1", "k2", "k3", "exact"]
Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]


def check(field: str, value: object, holds: bool, expected: str) -> None:
  """Raises ValueError naming the field, what was expected and what was found."""
  if not holds:
    raise ValueError(f"{field}: expected {expected}, found {value!r}")


def check_choice(field: str, value: str, choices: typing.Any) -> None:
  """Raises ValueError unless the value is one of a `Literal`'s or tuple's choices."""
  names = choices if isinstance(choices, tuple) else typing.get_args(choices)
  check(field, value, value in names, f"one of {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class GroupRelative:
  """(R - group mean) / (std + epsilon); see `advantages.group_relative`."""

  scale: advantages.Scale = "group"  # where the std comes from
  epsilon: float = 1e-4  # in units of reward
  ddof: int = 1  # the std divides by n - ddof

  def __post_init__(self):
    check_choice("advantage.scale", self.scale, advantages.SCALES)
    check("advantage.epsilon", self.epsilon, self.epsilon >= 0, "a number >= 0")
    check("advantage.ddof", self.ddof, self.ddof in (0, 1), "0 or 1")


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
  """R - mean of the others of the group (RLOO); see `advantages.leave_one_out`."""


@dataclasses.dataclass(frozen=True)
class Greedy:
  """R - R of the greedy completion of the prompt (ReMax)."""


@dataclasses.dataclass(frozen=True)
class Returns:
  """Discounted return of each token, whitened over the tokens of the batch (REINFORCE++)."""

  gamma: float = 1.0  # discount per token
  baseline: bool = False  # the mean reward of the group is taken off first
  whiten: bool = True

  def __post_init__(self):
    check("advantage.gamma", self.gamma, 0 < self.gamma <= 1, "a number in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Gae:
  """Generalized advantage estimation with a critic; see `gae.generalized_advantage`."""

  gamma: float = 1.0  # discount per token
  lam: float = 0.95  # of the advantages, and of the returns unless they have their own
  critic_lam: float | None = None  # of the returns that the critic learns (VAPO: 1.0); None: lam
  adaptive: float | None = None  # alpha of VAPO's lam = 1 - 1 / (alpha * length), replaces lam
  whiten: bool = True

  def __post_init__(self):
    check("advantage.gamma", self.gamma, 0 < self.gamma <= 1, "a number in (0, 1]")
    for name in ("lam", "critic_lam"):
      value = getattr(self, name)
      check(f"advantage.{name}", value, value is None or 0 <= value <= 1, "a number in [0, 1]")
    if self.adaptive is not None:
      check("advantage.adaptive", self.adaptive, self.adaptive > 0, "a number > 0")


@dataclasses.dataclass(frozen=True)
class MonteCarlo:
  """V(next step) - V(step), each V the mean reward of completions from there (VinePPO)."""

  rollouts: int = 4  # completions from each step

  def __post_init__(self):
    check("advantage.rollouts", self.rollouts, self.rollouts >= 1, "a number >= 1")


Advantage = GroupRelative | LeaveOneOut | Greedy | Returns | Gae | MonteCarlo


@dataclasses.dataclass(frozen=True)
class Process:
  """Step rewards beside the outcome's. See `credit.assign_credit` for how they are mixed."""

  weight: float = 1.0  # of the step rewards
  outcome_weight: float = 1.0

  def __post_init__(self):
    check("process.weight", self.weight, self.weight > 0, "a number > 0")
    check("process.outcome_weight", self.outcome_weight, self.outcome_weight >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class Clip:
  """min(r A, clip(r, 1 - low, 1 + high) A) (PPO); clip-higher is high > low."""

  low: float = 0.2
  high: float = 0.2
  dual: float | None = None  # at least `dual * A` where A < 0 (arXiv 1912.09729; verl: 3)

  def __post_init__(self):
    check("clip.low", self.low, 0 < self.low <= 1, "a number in (0, 1]")
    check("clip.high", self.high, self.high > 0, "a number > 0")
    if self.dual is not None:
      bound = 1 + self.high
      check("clip.dual", self.dual, self.dual > bound, f"a number > 1 + high = {bound:g}")


@dataclasses.dataclass(frozen=True)
class Cispo:
  """sg(clip(r, low, high)) A log p: a clipped token keeps its gradient (arXiv 2506.13585).

  The bounds are those of the ratio itself. TRL has 0 and 5; verl's are 1 - 0.2 and 1 + 0.2.
  """

  low: float = 0.0
  high: float = 5.0

  def __post_init__(self):
    check("cispo.low", self.low, 0 <= self.low < 1, "a number in [0, 1)")
    check("cispo.high", self.high, self.high > 1, "a number > 1")


@dataclasses.dataclass(frozen=True)
class Sapo:
  """4 / tau * sigmoid(tau (r - 1)) A: a soft gate instead of a clip (arXiv 2511.20347)."""

  positive: float = 1.0  # tau where A > 0
  negative: float = 1.05  # tau where A <= 0

  def __post_init__(self):
    for name in ("positive", "negative"):
      value = getattr(self, name)
      check(f"sapo.{name}", value, value > 0, "a number > 0")


Surrogate = Clip | Cispo | Sapo


@dataclasses.dataclass(frozen=True)
class KlController:
  """Moves the coefficient of the KL after every step, so that the KL stays near a target.

  proportional  coefficient *= 1 + gain * clip(kl / target - 1, -0.2, 0.2) (arXiv 1909.08593)
  threshold     * 2 where kl > 1.5 target, / 2 where kl < target / 1.5 (arXiv 1707.06347, eq. 8)
  """

  target: float  # nats per token
  rule: Literal["proportional", "threshold"] = "proportional"
  gain: float = 0.1  # of the proportional rule

  def __post_init__(self):
    check("kl.controller.target", self.target, self.target > 0, "a number > 0")
    check("kl.controller.gain", self.gain, self.gain > 0, "a number > 0")
    read = self.rule == "proportional" or self.gain == 0.1
    check("kl.controller.gain", self.gain, read, "the default: the threshold rule does not read it")
    check_choice("kl.controller.rule", self.rule, ("proportional", "threshold"))


@dataclasses.dataclass(frozen=True)
class Kl:
  """KL(policy || reference): a term of the loss, or taken off the reward of every token.

  In the reward of an algorithm that normalises by the group it also distorts the advantage.
  """

  coefficient: float = 0.04  # 0: measured, not minimised; with a controller, where it starts
  estimator: Estimator = "k3"
  importance_weighted: bool = False  # times the differentiable ratio (DeepSeek-V3.2; TRL's default)
  where: Literal["loss", "reward"] = "loss"
  controller: KlController | None = None

  def __post_init__(self):
    check("kl.coefficient", self.coefficient, self.coefficient >= 0, "a number >= 0")
    check_choice("kl.estimator", self.estimator, Estimator)
    check_choice("kl.where", self.where, ("loss", "reward"))
    if self.where == "reward":
      check("kl.estimator", self.estimator, self.estimator != "exact", "k1, k2 or k3 in the reward")
      weighted = self.importance_weighted
      check("kl.importance_weighted", weighted, not weighted, "False for a KL in the reward")
    if self.controller is not None:
      check("kl.coefficient", self.coefficient, self.coefficient > 0, "a number > 0 to be adapted")


@dataclasses.dataclass(frozen=True)
class Correction:
  """Weighs the surrogate by w = trainer / sampler probability before the update (TIS, IcePop).

  What the rollout engine sampled from and what the trainer differentiates are the same weights;
  where numerics or an older version part them, w says by how much.
  """

  level: Level = "token"  # w of the token, or the product over its completion
  mode: Mode = "truncate"  # clip(w, low, high), or 0 outside of [low, high]
  low: float = 0.0
  high: float = 2.0

  def __post_init__(self):
    check_choice("correction.level", self.level, Level)
    check_choice("correction.mode", self.mode, Mode)
    check("correction.low", self.low, 0 <= self.low <= 1, "a number in [0, 1]")
    check("correction.high", self.high, self.high >= 1, "a number >= 1")


@dataclasses.dataclass(frozen=True)
class Filters:
  """What is drawn again, and what is not trained on."""

  zero_variance: bool = False  # dynamic sampling: a group of equal rewards is drawn again
  truncated: bool = False  # a completion cut at its limit stays in its group, its mask is 0


@dataclasses.dataclass(frozen=True)
class Overlong:
  """Soft penalty on the length of a completion, `weight * advantages.overlong_penalty`."""

  max_length: int  # tokens; the penalty is whole from here
  buffer: int  # tokens before max_length over which it grows
  weight: float = 1.0  # in units of reward

  def __post_init__(self):
    inside = 0 < self.buffer <= self.max_length
    check("overlong.buffer", self.buffer, inside, f"1 to max_length = {self.max_length}")
    check("overlong.weight", self.weight, self.weight > 0, "a number > 0")
