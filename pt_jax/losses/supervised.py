"""Supervised objectives: the loss of a target token, and what a step minimises as a value.

A target was written by somebody else, not sampled from the policy. p is its probability under the
policy, q under the reference: the parameters that the stage started from, or those of some updates
ago (`refresh_every`).
"""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from pt_jax.losses import reduce
from pt_jax.losses.kl import kl_estimate
from pt_jax.losses.options import check, check_choice
from pt_jax.losses.ratio import log_ratio

Metrics = dict[str, jax.Array]
TokenLoss = Literal["nll", "dft", "clipped"]
KlForm = Literal["exact", "k1", "k2", "k3"]
Direction = Literal["policy_reference", "reference_policy"]  # KL(first || second)


def nll(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """Negative log-likelihood, -log p(token | what stands before it in its segment), in nats.

  Args:
    logprobs: [B, S] float32, of the token at the same position.
    mask: [B, S] float32, 0 where the token is not trained.

  Returns:
    [B, S], 0 outside the mask and not weighted by it. It is its own metric: the exponential of its
    `token_mean` is the perplexity.
  """
  chex.assert_rank([logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, mask])
  chex.assert_type([logprobs, mask], jnp.float32)
  return jnp.where(mask > 0, -logprobs, 0)


@dataclasses.dataclass(frozen=True)
class ReferenceKl:
  """coefficient * KL between policy and reference, added to the loss of each target token.

  exact  over the whole vocabulary at that position, in the given direction
  k1     log p/q of the target. Its gradient is that of -NLL: it only scales the loss down
  k2     (log p/q)^2 / 2 of the target: pulls its log-prob back to the reference's
  k3     q/p - 1 - log q/p of the target: pulls back hard below the reference, at most like k1 above

  Targets are not drawn from the policy, so only "exact" is a divergence of the two policies; the
  others are penalties in the form of `kl.kl_estimate`, and cost no second pass over the vocabulary.
  """

  coefficient: float = 0.1  # 0: measured, not minimised
  form: KlForm = "exact"
  direction: Direction = "policy_reference"  # KL(policy || reference); only "exact" has another

  def __post_init__(self):
    check("kl.coefficient", self.coefficient, self.coefficient >= 0, "a number >= 0")
    check_choice("kl.form", self.form, KlForm)
    check_choice("kl.direction", self.direction, Direction)
    if self.form != "exact" and self.direction != "policy_reference":
      raise ValueError(f"kl.direction: {self.form!r} does not read it, found {self.direction!r}")


@dataclasses.dataclass(frozen=True)
class SupervisedObjective:
  """What a supervised step minimises: the loss of a target token, a KL, and how they are averaged.

  Rows and kinds of text weigh differently by `Batch.weights` and `Batch.mask`; see `reduce.py`.
  """

  loss: TokenLoss = "nll"
  label_smoothing: float = 0.0  # read by "nll": share of the target that all tokens get alike
  clip: float | None = None  # for "clipped": a target gains until p = (1 + clip) q
  kl: ReferenceKl | None = None
  refresh_every: int | None = None  # updates after which the policy is the reference; None: never
  reduction: reduce.Reduction = "token_mean"
  constant_length: int | None = None  # for the reduction `constant`: tokens a segment may have

  def __post_init__(self):
    check_choice("loss", self.loss, TokenLoss)
    share = self.label_smoothing
    check("label_smoothing", share, 0 <= share < 1, "a number in [0, 1)")
    if self.loss != "nll" and share:
      raise ValueError(f"label_smoothing: {self.loss!r} does not read it, found {share}")
    if self.loss == "clipped":
      check("clip", self.clip, self.clip is not None and self.clip > 0, "a number > 0")
    elif self.clip is not None:
      raise ValueError(f"clip: {self.loss!r} does not read it, found {self.clip}")
    if (every := self.refresh_every) is not None:
      check("refresh_every", every, every > 0, "a number of updates > 0")
      if not self.needs_reference:
        raise ValueError(f"refresh_every: expected an objective with a reference, found {every}")
    reduce.check_reduction(self.reduction, self.constant_length)

  @property
  def needs_reference(self) -> bool:
    """Whether a step has to be given the reference's parameters."""
    return self.loss == "clipped" or self.kl is not None

  @property
  def needs_reference_logprobs(self) -> bool:
    """Whether the reference's log-probs of the targets are read."""
    return self.loss == "clipped" or (self.kl is not None and self.kl.form != "exact")

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of the metrics of `supervised_loss`."""
    names = ["nats_per_token"]
    names += ["uniform_nats"] * bool(self.label_smoothing)
    names += ["probability"] * (self.loss == "dft")
    names += ["ratio", "clip_fraction"] * (self.loss == "clipped")
    return (*names, *(["kl"] * (self.kl is not None)))


def sft() -> SupervisedObjective:
  """Every target token weighs the same."""
  return SupervisedObjective()


def label_smoothed(share: float = 0.1) -> SupervisedObjective:
  """(1 - share) NLL + share * mean over the vocabulary of -log p (arXiv 1512.00567, section 7).

  As torch's `cross_entropy(label_smoothing=share)` and transformers' `LabelSmoother`: the target
  keeps 1 - share + share / V of the probability.
  """
  return SupervisedObjective(label_smoothing=share)


def dft() -> SupervisedObjective:
  """Dynamic fine-tuning (arXiv 2508.05629, eq. 9): the NLL times p, without a gradient through it.

  Tokens that the model finds unlikely pull little: their gradient is -p. TRL's `loss_type="dft"`.
  """
  return SupervisedObjective(loss="dft")


def psft(coefficient: float = 0.1, form: KlForm = "exact") -> SupervisedObjective:
  """Proximal: SFT that is held near the policy that it started from, by a KL.

  Args:
    coefficient: of the KL, in nats of NLL a nat.
    form: "exact" is KL(policy || start) over the vocabulary; see `ReferenceKl`.
  """
  return SupervisedObjective(kl=ReferenceKl(coefficient, form))


def psft_clipped(clip: float = 0.28, refresh_every: int | None = 8) -> SupervisedObjective:
  """Proximal SFT as in arXiv 2508.17784: PPO's clipped ratio with an advantage of 1 everywhere.

  Args:
    clip: a target that has become 1 + clip times as likely as under the old policy is left alone;
      0.28 is the authors' (the lower bound of PPO's clip never bites for a positive advantage).
    refresh_every: updates for which a policy stays the old one; the authors' 256 / 32. None: it is
      the one that the stage started from, and no target ever becomes much likelier than that.
  """
  return SupervisedObjective(loss="clipped", clip=clip, refresh_every=refresh_every)


def supervised_loss(
  logprobs: jax.Array,
  mask: jax.Array,
  *,
  objective: SupervisedObjective,
  mean_logprobs: jax.Array | None = None,
  reference_logprobs: jax.Array | None = None,
  exact_kl: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """The loss of each target token, plus kl.coefficient * KL. With lp its log-prob:

                                                                  gradient by lp
  nll      -(1 - s) lp - s mean_v log p(v), s = label_smoothing   -(1 - s)
  dft      -p lp, no gradient through p                           -p
  clipped  -min(p/q, 1 + clip)                                    -p/q; 0 above 1 + clip

  Args:
    logprobs: [B, S] float32, lp.
    mask: [B, S] float32, 0 where the token is not trained; nothing there is read.
    objective: reads all but its `refresh_every` and its reduction.
    mean_logprobs: [B, S] float32, mean over the vocabulary of log p; read with label smoothing.
    reference_logprobs: [B, S] float32, log q; read if `needs_reference_logprobs`.
    exact_kl: [B, S] float32, over the vocabulary, in nats; read with `kl.form` "exact".

  Returns:
    loss [B, S], 0 outside the mask and not weighted by it, and metrics of the same shape, without
    gradient, to be reduced by `token_mean`: `nats_per_token` (-lp), with label smoothing
    `uniform_nats` (-mean_v log p), for dft `probability`, for clipped `ratio` and `clip_fraction`,
    with a KL `kl` (without coefficient).

  Raises:
    ValueError: when what the objective reads is None.
  """
  values = nll(logprobs, mask)
  loss, metrics = _token_loss(values, mask, objective, mean_logprobs, reference_logprobs)
  if (option := objective.kl) is not None:
    if option.form == "exact":
      kl = jnp.where(mask > 0, _given("exact_kl", exact_kl), 0)
    else:
      other = _given("reference_logprobs", reference_logprobs)
      kl = kl_estimate(logprobs, other, mask, estimator=option.form)
    metrics["kl"] = kl
    if option.coefficient:
      loss += option.coefficient * kl
  return loss, jax.lax.stop_gradient({"nats_per_token": values} | metrics)


def _token_loss(
  values: jax.Array,
  mask: jax.Array,
  objective: SupervisedObjective,
  mean_logprobs: jax.Array | None,
  reference_logprobs: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
  """`values` [B, S] are the NLL."""
  if objective.loss == "dft":
    p = jnp.where(mask > 0, jnp.exp(-jax.lax.stop_gradient(values)), 0)
    return p * values, {"probability": p}
  if objective.loss == "clipped":
    assert objective.clip is not None  # see `SupervisedObjective`
    other = _given("reference_logprobs", reference_logprobs)
    ratio = jnp.where(mask > 0, jnp.exp(log_ratio(-values, other, mask)), 0)
    beyond = (ratio > 1 + objective.clip).astype(jnp.float32)
    return -jnp.minimum(ratio, 1 + objective.clip), {"ratio": ratio, "clip_fraction": beyond}
  if share := objective.label_smoothing:
    uniform = jnp.where(mask > 0, -_given("mean_logprobs", mean_logprobs), 0)
    return (1 - share) * values + share * uniform, {"uniform_nats": uniform}
  return values, {}


def _given(name: str, value: jax.Array | None) -> jax.Array:
  if value is None:
    raise ValueError(f"{name}: the objective needs them, found None")
  return value
