"""A policy-gradient algorithm is a value: `Objective`, and functions that return the known ones.

An ablation is `dataclasses.replace(grpo(), reduction="token_mean")`. Who reads what: `advantage`,
`filters` and `overlong` are read by `credit.py` on the host, `clip` and `kl` by `policy.py`,
`reduction` and `constant_length` by `reduce.py` in the step.
"""

import dataclasses

from pt_jax.losses import advantages, kl, reduce


def _check(field: str, value: object, holds: bool, expected: str) -> None:
  if not holds:
    raise ValueError(f"{field}: expected {expected}, found {value!r}")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
  _check(field, value, value in choices, f"one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Advantage:
  """(R - group mean) / (std + epsilon); see `advantages.group_relative`."""

  scale: advantages.Scale = "group"  # where the std comes from
  epsilon: float = 1e-4  # in units of reward

  def __post_init__(self):
    _check_choice("advantage.scale", self.scale, advantages.SCALES)
    _check("advantage.epsilon", self.epsilon, self.epsilon >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class Clip:
  """The ratio is clipped to [1 - low, 1 + high]; clip-higher is high > low."""

  low: float = 0.2
  high: float = 0.2

  def __post_init__(self):
    _check("clip.low", self.low, 0 < self.low <= 1, "a number in (0, 1]")
    _check("clip.high", self.high, self.high > 0, "a number > 0")


@dataclasses.dataclass(frozen=True)
class Kl:
  """KL(policy || reference), a term of the loss. In the reward it would distort the advantage."""

  coefficient: float = 0.04  # 0: measured, not minimised
  estimator: kl.Estimator = "k3"
  importance_weighted: bool = False  # times the differentiable ratio (DeepSeek-V3.2; TRL's default)

  def __post_init__(self):
    _check("kl.coefficient", self.coefficient, self.coefficient >= 0, "a number >= 0")
    _check_choice("kl.estimator", self.estimator, kl.ESTIMATORS)


@dataclasses.dataclass(frozen=True)
class Filters:
  """What is drawn again, and what is not trained on."""

  zero_variance: bool = False  # dynamic sampling: a group of equal rewards is drawn again
  truncated: bool = (
    False  # a completion cut at its limit keeps its place in the group, its mask is 0
  )


@dataclasses.dataclass(frozen=True)
class Overlong:
  """Soft penalty on the length of a completion, `weight * advantages.overlong_penalty`."""

  max_length: int  # tokens; the penalty is whole from here
  buffer: int  # tokens before max_length over which it grows
  weight: float = 1.0  # in units of reward

  def __post_init__(self):
    inside = 0 < self.buffer <= self.max_length
    _check("overlong.buffer", self.buffer, inside, f"1 to max_length = {self.max_length}")
    _check("overlong.weight", self.weight, self.weight > 0, "a number > 0")


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a policy-gradient step minimises, and how its samples are judged and chosen."""

  advantage: Advantage = Advantage()
  clip: Clip = Clip()
  kl: Kl | None = None  # None: no reference policy is needed
  reduction: reduce.Reduction = "token_mean"
  constant_length: int | None = None  # for the reduction `constant`: tokens a completion may have
  filters: Filters = Filters()
  overlong: Overlong | None = None

  def __post_init__(self):
    reduce.check_reduction(self.reduction, self.constant_length)


def grpo() -> Objective:
  """DeepSeekMath's: std of the group, each completion weighs the same, k3 KL (arXiv 2402.03300).

  The paper's coefficient is 0.04; it names no epsilon, 0.2 is PPO's. Without a reference:
  `dataclasses.replace(grpo(), kl=None)`, which is TRL's `loss_type="grpo"` at its defaults.
  """
  return Objective(kl=Kl(0.04), reduction="segment_mean")


def bnpo() -> Objective:
  """`grpo` in which each token weighs the same.

  TRL's `bnpo`, except that TRL divides each microbatch by its own tokens.
  """
  return dataclasses.replace(grpo(), reduction="token_mean")


def dr_grpo(max_length: int) -> Objective:
  """GRPO done right: no std, no length in the denominator, no KL (arXiv 2503.20783).

  Args:
    max_length: tokens a completion may have; every completion is divided by it.
  """
  return Objective(
    advantage=Advantage(scale="none"), reduction="constant", constant_length=max_length
  )


def dapo(max_length: int, buffer: int) -> Objective:
  """Clip-higher, token-level loss, dynamic sampling, overlong penalty, no KL (arXiv 2503.14476).

  Args:
    max_length: tokens a completion may have; the paper's 20480.
    buffer: tokens before it over which the penalty grows; the paper's 4096.
  """
  return Objective(
    clip=Clip(low=0.2, high=0.28),
    reduction="token_mean",
    filters=Filters(zero_variance=True),
    overlong=Overlong(max_length, buffer),
  )
