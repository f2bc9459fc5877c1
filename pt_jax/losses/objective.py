"""A policy-gradient algorithm is a value: `Objective`, and functions that return the known ones.

An ablation is `dataclasses.replace(grpo(), reduction="token_mean")`. Who reads what: `advantage`,
`process`, `filters`, `overlong` and a KL in the reward are read by `credit.py` on the host;
`ratio`, `surrogate`, `kl`, `entropy`, `positive_nll` and `correction` by `policy.py`; `reduction`
and `constant_length` by `reduce.py` in the step.
"""

import dataclasses
from dataclasses import field

from pt_jax.losses import reduce
from pt_jax.losses.options import (
  Advantage,
  Cispo,
  Clip,
  Correction,
  Filters,
  Gae,
  Greedy,
  GroupRelative,
  Kl,
  LeaveOneOut,
  MonteCarlo,
  Overlong,
  Process,
  Returns,
  Sapo,
  Surrogate,
  check,
  check_choice,
)
from pt_jax.losses.ratio import RATIOS, Ratio


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a policy-gradient step minimises, and how its samples are judged and chosen."""

  advantage: Advantage = field(default_factory=GroupRelative)
  process: Process | None = None  # step rewards; None: only the outcome counts
  ratio: Ratio = "token"  # see `ratio.importance_ratio`
  surrogate: Surrogate = field(default_factory=Clip)
  kl: Kl | None = None  # None: no reference policy is needed
  entropy: float = 0.0  # nats of the policy's entropy are worth so much (a bonus if positive)
  positive_nll: float = 0.0  # times the NLL of the tokens of right completions (VAPO)
  correction: Correction | None = None
  reduction: reduce.Reduction = "token_mean"
  constant_length: int | None = None  # for the reduction `constant`: tokens a completion may have
  filters: Filters = field(default_factory=Filters)
  overlong: Overlong | None = None

  def __post_init__(self):
    check_choice("ratio", self.ratio, RATIOS)
    check("positive_nll", self.positive_nll, self.positive_nll >= 0, "a number >= 0")
    if isinstance(self.advantage, MonteCarlo):
      check("process", self.process, self.process is None, "None beside MonteCarlo's own steps")
      check(
        "overlong", self.overlong, self.overlong is None, "None: values of steps have no penalty"
      )
      where = self.kl.where if self.kl is not None else "loss"
      check("kl.where", where, where == "loss", "loss: values of steps have no KL")
    reduce.check_reduction(self.reduction, self.constant_length)

  @property
  def has_critic(self) -> bool:
    """Whether the advantages need a critic's values."""
    return isinstance(self.advantage, Gae)

  @property
  def compares(self) -> bool:
    """Whether the completions of a prompt are compared, so that one alone would teach nothing."""
    kind = self.advantage
    grouped = isinstance(kind, GroupRelative | LeaveOneOut | MonteCarlo)
    return grouped or (isinstance(kind, Returns) and kind.baseline) or self.filters.zero_variance

  @property
  def has_steps(self) -> bool:
    """Whether the advantages need to know where steps end."""
    return self.process is not None or isinstance(self.advantage, MonteCarlo)


def ppo() -> Objective:
  """InstructGPT's: GAE with a critic, KL to the reference in the reward (arXiv 2203.02155).

  gamma 1 and lambda 0.95; k1 with coefficient 0.02 per token, clip 0.2, mean over tokens.
  """
  return Objective(advantage=Gae(), kl=Kl(0.02, "k1", where="reward"))


def vapo(alpha: float = 0.05) -> Objective:
  """PPO for long reasoning: arXiv 2504.05118.

  Lambda 1 for the critic and 1 - 1 / (alpha * length) for the policy, clip-higher, 0.1 times the
  NLL of right completions, mean over tokens, no KL. Pretrain the critic: `Critic.pretrain`.

  Args:
    alpha: of the length-adaptive lambda; with short completions 0.05 gives lambda 0.
  """
  return Objective(
    advantage=Gae(critic_lam=1.0, adaptive=alpha), surrogate=Clip(0.2, 0.28), positive_nll=0.1
  )


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
    advantage=GroupRelative(scale="none"), reduction="constant", constant_length=max_length
  )


def dapo(max_length: int, buffer: int) -> Objective:
  """Clip-higher, token-level loss, dynamic sampling, overlong penalty, no KL (arXiv 2503.14476).

  Args:
    max_length: tokens a completion may have; the paper's 20480.
    buffer: tokens before it over which the penalty grows; the paper's 4096.
  """
  return Objective(
    surrogate=Clip(low=0.2, high=0.28),
    filters=Filters(zero_variance=True),
    overlong=Overlong(max_length, buffer),
  )


def gspo() -> Objective:
  """Ratio and clip of the whole sequence, exp(mean log-ratio) (arXiv 2507.18071).

  The paper's clip is 3e-4 and 4e-4: the mean over a sequence moves far less than one token.
  """
  return Objective(ratio="sequence", surrogate=Clip(3e-4, 4e-4), reduction="segment_mean")


def cispo() -> Objective:
  """MiniMax-M1's: the ratio is clipped as a weight, no token loses its gradient.

  arXiv 2506.13585. No KL, mean over tokens; the bound 5 is TRL's.
  """
  return Objective(surrogate=Cispo())


def sapo() -> Objective:
  """A sigmoid gate in place of the clip (arXiv 2511.20347), averaged as GRPO."""
  return Objective(surrogate=Sapo(), reduction="segment_mean")


def rloo() -> Objective:
  """REINFORCE with the mean of the other completions as baseline (arXiv 2402.14740).

  The ratio is that of whole completions (their product), the KL is in the reward (k1, 0.05, as
  TRL), the mean over completions.
  """
  return Objective(
    advantage=LeaveOneOut(),
    ratio="product",
    kl=Kl(0.05, "k1", where="reward"),
    reduction="segment_mean",
  )


def reinforce_plus_plus(*, baseline: bool = False) -> Objective:
  """Discounted returns, whitened over the batch, PPO's clip (arXiv 2501.03262).

  Args:
    baseline: the paper's second form: the group's mean is taken off the reward, and the KL (k2) is
      a term of the loss instead of the reward (k1).
  """
  kl = Kl(0.01, "k2") if baseline else Kl(0.01, "k1", where="reward")
  return Objective(advantage=Returns(baseline=baseline), kl=kl)


def remax() -> Objective:
  """REINFORCE with the reward of the greedy completion as baseline (arXiv 2310.10505).

  Each completion is divided by its length; with `ratio="product"` it is the paper's sum over
  tokens. The KL is taken off the reward of the whole completion, as in `rloo`.
  """
  return Objective(advantage=Greedy(), kl=Kl(0.05, "k1", where="reward"), reduction="segment_mean")


def vine_ppo(rollouts: int = 4) -> Objective:
  """PPO whose values are means of completions from every step (arXiv 2410.01679).

  Args:
    rollouts: completions from each step; the paper's is 9.
  """
  return Objective(advantage=MonteCarlo(rollouts), kl=Kl(1e-4))


__all__ = [
  "Cispo",
  "Clip",
  "Correction",
  "Filters",
  "Gae",
  "Greedy",
  "GroupRelative",
  "Kl",
  "LeaveOneOut",
  "MonteCarlo",
  "Objective",
  "Overlong",
  "Process",
  "Returns",
  "Sapo",
]
