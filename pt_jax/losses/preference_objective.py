"""A preference algorithm is a value: `PreferenceObjective`, and functions that return known ones.

An ablation is `dataclasses.replace(dpo(), beta=0.3)`. `preference.py` computes them. What differs
between two algorithms stands in the presets at the end of this file. Notation, per completion:
`lp` its summed log-prob, `c` and `j` the scores of the chosen and the rejected one (below).
"""

import dataclasses
import typing
from typing import Literal

from pt_jax.losses.options import check

Difference = Literal["sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop"]
Sides = Literal["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "odds_ratio"]
Unpaired = Literal["kto", "bco", "apo_zero_unpaired"]
Loss = Literal[Difference, Sides, Unpaired]

DIFFERENCE: tuple[str, ...] = typing.get_args(Difference)  # they read c - j only
SIDES: tuple[str, ...] = typing.get_args(Sides)  # they read c and j on their own
UNPAIRED: tuple[str, ...] = typing.get_args(Unpaired)  # one completion and its label
LOSSES: tuple[str, ...] = DIFFERENCE + SIDES + UNPAIRED

# Options of few losses -> the losses that read them.
READ_BY = {
  "label_smoothing": ("sigmoid", "robust", "exo_pair"),
  "gamma": DIFFERENCE,
  "margin_limit": DIFFERENCE,
  "dynamic_beta": DIFFERENCE,
  "tau": ("discopop",),
  "sft": DIFFERENCE + SIDES,
  "confidence_weighted": DIFFERENCE + SIDES,
  "desirable_weight": UNPAIRED,
  "undesirable_weight": UNPAIRED,
}


@dataclasses.dataclass(frozen=True)
class DynamicBeta:
  """beta_i = [1 + alpha (M_i - M_0)] beta of each pair, no gradient through it (arXiv 2407.08639).

  M_i is the implicit reward margin of the pair at `beta`, M_0 its running mean over the run, which
  the caller keeps and hands in. A negative beta_i would train the pair backwards: it is cut.
  """

  alpha: float = 0.6  # per unit of implicit reward; the paper's
  minimum: float = 1e-3  # beta_i is not smaller; not in the paper

  def __post_init__(self):
    check("dynamic_beta.alpha", self.alpha, self.alpha > 0, "a number > 0")
    check("dynamic_beta.minimum", self.minimum, self.minimum > 0, "a number > 0")


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
  """What a preference step minimises.

  The score of a completion is lp - reference lp, or lp without a reference; divided by the tokens
  of the completion if `length_normalized`. Its implicit reward is beta * score.
  """

  loss: Loss = "sigmoid"
  beta: float = 0.1  # implicit reward per nat; for `odds_ratio` the weight of the loss (its lambda)
  reference: bool = True  # False: no reference policy is needed
  length_normalized: bool = False  # nats per token instead of nats
  label_smoothing: float = 0.0  # share of labels believed to be flipped
  gamma: float = 0.0  # target margin, taken off the reward margin: outside the product with beta
  margin_limit: float | None = None  # reward margin from which a pair stops pulling (epsilon-DPO)
  dynamic_beta: DynamicBeta | None = None
  tau: float = 0.05  # discopop: width of the switch between its two parts
  sft: float = 0.0  # weight of -lp / tokens of the chosen completion, in nats per token (RPO)
  confidence_weighted: bool = False  # the pair weighs as likely as the policy finds it (WPO)
  desirable_weight: float = 1.0  # of right completions when unpaired
  undesirable_weight: float = 1.0  # of wrong ones

  @property
  def unpaired(self) -> bool:
    """Whether it judges single labelled completions rather than pairs."""
    return self.loss in UNPAIRED

  def __post_init__(self):
    check("loss", self.loss, self.loss in LOSSES, f"one of {', '.join(LOSSES)}")
    for field in dataclasses.fields(self):
      losses, value = READ_BY.get(field.name, LOSSES), getattr(self, field.name)
      if self.loss not in losses and value != field.default:
        raise ValueError(f"{field.name}: {self.loss!r} does not read it, found {value!r}")
    check("beta", self.beta, self.beta > 0, "a number > 0")
    smoothing, least = self.label_smoothing, "(0" if self.loss == "exo_pair" else "[0"
    inside = 0 <= smoothing < 0.5 and (smoothing > 0 or self.loss != "exo_pair")
    check("label_smoothing", smoothing, inside, f"a number in {least}, 0.5)")
    check("gamma", self.gamma, self.gamma >= 0, "a number >= 0")
    limit = self.margin_limit
    check("margin_limit", limit, limit is None or limit > 0, "None or a number > 0")
    check("tau", self.tau, 0 < self.tau < 1, "a number in (0, 1)")
    check("sft", self.sft, self.sft >= 0, "a number >= 0")
    check("desirable_weight", self.desirable_weight, self.desirable_weight >= 0, "a number >= 0")
    weight = self.undesirable_weight
    check("undesirable_weight", weight, weight >= 0, "a number >= 0")
    if self.unpaired and not self.reference:
      raise ValueError(f"reference: {self.loss!r} needs one, found False")


def dpo(beta: float = 0.1) -> PreferenceObjective:
  """-log sigmoid(beta (c - j)) (arXiv 2305.18290 eq. 7)."""
  return PreferenceObjective(beta=beta)


def cdpo(label_smoothing: float, beta: float = 0.1) -> PreferenceObjective:
  """Conservative DPO: cross-entropy against a label of 1 - label_smoothing (Mitchell 2023).

  TRL's `sigmoid` ignores `label_smoothing`.
  """
  return dataclasses.replace(dpo(beta), label_smoothing=label_smoothing)


def rdpo(label_smoothing: float, beta: float = 0.1) -> PreferenceObjective:
  """Robust DPO: unbiased when that share of the labels is flipped (arXiv 2403.00409 eq. 12)."""
  return PreferenceObjective(loss="robust", beta=beta, label_smoothing=label_smoothing)


def hinge(beta: float = 0.1) -> PreferenceObjective:
  """max(0, 1 - beta (c - j)), SLiC's margin loss on DPO's scores (arXiv 2305.10425)."""
  return PreferenceObjective(loss="hinge", beta=beta)


def ipo(beta: float = 0.1) -> PreferenceObjective:
  """(c - j - 1 / (2 beta))^2 on the sums, as the paper has it (arXiv 2310.12036 eq. 17)."""
  return PreferenceObjective(loss="ipo", beta=beta)


def ipo_mean(beta: float = 0.1) -> PreferenceObjective:
  """`ipo` on the means over tokens: TRL's `ipo`."""
  return dataclasses.replace(ipo(beta), length_normalized=True)


def dpo_normalized(beta: float = 0.1) -> PreferenceObjective:
  """DPO on log-ratios per token: TRL's `sigmoid_norm` (arXiv 2405.14734, table 3)."""
  return dataclasses.replace(dpo(beta), length_normalized=True)


def trajectory_dpo(beta: float = 0.1) -> PreferenceObjective:
  """`dpo_normalized` of whole trajectories (arXiv 2406.14868).

  The same sums: the mask of the batch decides that they run over the tokens that the model wrote
  and not over what tools and users answered, and that the lengths count those tokens only.
  """
  return dpo_normalized(beta)


def exo(beta: float = 0.1, label_smoothing: float = 1e-3) -> PreferenceObjective:
  """KL(softmax of the rewards || smoothed label) (arXiv 2402.00856 eq. 16)."""
  return PreferenceObjective(loss="exo_pair", beta=beta, label_smoothing=label_smoothing)


def discopop(beta: float = 0.05, tau: float = 0.05) -> PreferenceObjective:
  """Logistic and exponential loss, mixed by the margin (arXiv 2406.08414 eq. 5)."""
  return PreferenceObjective(loss="discopop", beta=beta, tau=tau)


def nca(beta: float = 0.1) -> PreferenceObjective:
  """Noise contrast on absolute rewards, two completions (arXiv 2402.05369 eq. 10)."""
  return PreferenceObjective(loss="nca_pair", beta=beta)


def bco(beta: float = 0.1) -> PreferenceObjective:
  """Binary classifier of single completions, with a shift of the rewards (arXiv 2404.04656)."""
  return PreferenceObjective(loss="bco", beta=beta)


def bco_pair(beta: float = 0.1) -> PreferenceObjective:
  """`bco` of both completions of a pair. TRL's `bco_pair` has no shift any more."""
  return PreferenceObjective(loss="bco_pair", beta=beta)


def sppo(beta: float = 0.1) -> PreferenceObjective:
  """(c - 1 / (2 beta))^2 + (j + 1 / (2 beta))^2: hard wins (arXiv 2405.00675 eq. 4.7)."""
  return PreferenceObjective(loss="sppo_hard", beta=beta)


def apo_zero(beta: float = 0.1) -> PreferenceObjective:
  """Raises the chosen, lowers the rejected: chosen above the policy (arXiv 2408.06266 eq. 7)."""
  return PreferenceObjective(loss="apo_zero", beta=beta)


def apo_down(beta: float = 0.1) -> PreferenceObjective:
  """Lowers both, the rejected more: chosen below the policy (arXiv 2408.06266 eq. 8)."""
  return PreferenceObjective(loss="apo_down", beta=beta)


def kto(
  beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> PreferenceObjective:
  """Single completions judged against the KL to the reference (arXiv 2402.01306 eq. 8)."""
  weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
  return PreferenceObjective(loss="kto", beta=beta, **weights)


def simpo(beta: float = 2.0, gamma: float = 1.0) -> PreferenceObjective:
  """-log sigmoid(beta (lp_c/|c| - lp_j/|j|) - gamma) (arXiv 2405.14734 eq. 6).

  The paper: beta 2.0 to 2.5 and gamma / beta about 0.5.
  """
  return PreferenceObjective(beta=beta, reference=False, length_normalized=True, gamma=gamma)


def cpo(beta: float = 0.1, sft: float = 1.0) -> PreferenceObjective:
  """-log sigmoid(beta (lp_c - lp_j)) + sft * NLL (arXiv 2401.08417 eq. 3)."""
  return PreferenceObjective(beta=beta, reference=False, sft=sft)


def orpo(beta: float = 0.1, sft: float = 1.0) -> PreferenceObjective:
  """sft * NLL - beta * log sigmoid(log odds ratio) (arXiv 2403.07691 eqs. 6 and 7).

  The odds are of exp(lp / tokens). TRL takes the NLL over the prompt too; here it is the answer's.
  """
  return PreferenceObjective(
    loss="odds_ratio", beta=beta, reference=False, length_normalized=True, sft=sft
  )


def rpo(beta: float = 0.1, sft: float = 1.0) -> PreferenceObjective:
  """DPO + sft * NLL per token of the chosen completion (arXiv 2404.19733 eq. 1)."""
  return dataclasses.replace(dpo(beta), sft=sft)


def beta_dpo(beta: float = 0.1, alpha: float = 0.6) -> PreferenceObjective:
  """DPO with a beta for each pair (arXiv 2407.08639); see `DynamicBeta`."""
  return dataclasses.replace(dpo(beta), dynamic_beta=DynamicBeta(alpha))


def epsilon_dpo(margin_limit: float, beta: float = 0.1) -> PreferenceObjective:
  """DPO in which a pair stops pulling at a reward margin of `margin_limit`."""
  return dataclasses.replace(dpo(beta), margin_limit=margin_limit)


def wpo(beta: float = 0.1) -> PreferenceObjective:
  """DPO weighted by the policy's own probability of the two completions (arXiv 2406.11827)."""
  return dataclasses.replace(dpo(beta), confidence_weighted=True)
