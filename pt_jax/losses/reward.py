"""What reward models minimise: pairs, ranked lists, outcomes and steps. And vote margins."""

import dataclasses
import typing
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pt_jax.losses import bootstrap, segments

Kind = Literal["pairwise", "listwise", "outcome", "process"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
Metrics = dict[str, jax.Array]

# Share of the votes for the chosen answer, and the margin asked for; even votes ask for none.
_VOTE_SHARES, _VOTE_MARGINS = (0.5, 0.51, 0.75, 1.0), (0.0, 0.1, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class RewardObjective:
  """What a reward model is trained on and by which loss; see `reward_loss`.

  kind       data of a group                  loss of a group
  pairwise   a chosen, a rejected completion  `bradley_terry`
  listwise   completions, best first          -log Plackett-Luce
  outcome    one completion, a label          `soft_cross_entropy` at its last token
  process    one completion, labelled steps   `soft_cross_entropy` at every step mark
  """

  kind: Kind = "pairwise"
  margins: bool = False  # pairwise: the margin of the group is subtracted
  center: float = 0.0  # pairwise: coefficient of (chosen + rejected)^2 (arXiv 2312.09244)
  bootstrap: bool = False  # each member of an ensemble weighs each group by its own Poisson(1)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"reward.kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
    if self.center < 0:
      raise ValueError(f"reward.center: expected a number >= 0, found {self.center!r}")
    for name in ("margins", "center"):
      if self.kind != "pairwise" and getattr(self, name):
        raise ValueError(
          f"reward.{name}: {self.kind!r} does not read it, found {getattr(self, name)!r}"
        )


def vote_margin(share: ArrayLike) -> np.ndarray:
  """The margin of a pair from the share of votes for the chosen answer; float32, on the host.

  1.0 for 100:0, 0.5 for 75:25, 0.1 for 51:49, 0 for an even vote, linear between them.

  Raises ValueError for a share outside [0.5, 1]: the chosen answer has at least half of the votes.
  """
  share = np.asarray(share, np.float64)
  if not ((share >= 0.5) & (share <= 1)).all():
    raise ValueError(f"vote share: expected numbers in [0.5, 1], found {share.tolist()}")
  return np.asarray(np.interp(share, _VOTE_SHARES, _VOTE_MARGINS), np.float32)


def bradley_terry(
  chosen: jax.Array, rejected: jax.Array, margins: jax.Array | float = 0.0, *, center: float = 0.0
) -> jax.Array:
  """-log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)^2, element by element.

  Source: arXiv 2009.01325 eq. 1; the margin arXiv 2307.09288 eq. 2; centering arXiv 2312.09244.
  """
  loss = jax.nn.softplus(margins - (chosen - rejected))
  return loss + center * jnp.square(chosen + rejected) if center else loss


def soft_cross_entropy(values: jax.Array, labels: jax.Array) -> jax.Array:
  """-y log sigmoid(v) - (1 - y) log sigmoid(-v), element by element, for labels y in 0..1.

  An outcome reward model has one value a completion (arXiv 2110.14168), a process reward model one
  a step (arXiv 2305.20050), with the share of right continuations as the label in arXiv 2312.08935.
  """
  return labels * jax.nn.softplus(-values) + (1 - labels) * jax.nn.softplus(values)


def reward_loss(
  values: jax.Array,
  segment_ids: jax.Array,
  group_ids: jax.Array,
  mask: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  margins: jax.Array,
  *,
  objective: RewardObjective,
  hashes: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
  """The loss of packed groups: the mean over the members of an ensemble of heads.

  The reward of a completion is the value at its last token. Plackett-Luce of a list, best first, is
  -sum_i log(exp r_i / sum_{j >= i} exp r_j); of two completions it is `bradley_terry`. Members
  differ by their initial heads and, with `objective.bootstrap`, by what they weigh: member e
  minimises sum_g w_g b_ge loss_ge / sum_g w_g with b_ge a Poisson(1) number (`bootstrap.py`).

  Args:
    values: [B, S, E] float32, one a member after having read each token.
    segment_ids: [B, S] int32, of completions, -1 on padding.
    group_ids: [B, S] int32, of groups, -1 on padding; segments of a group stand side by side.
    mask: [B, S] float32, weight of a step mark; read by `process`.
    labels: [B, S] float32: pairwise over 0.5 for the chosen completion; outcome and process 0..1 of
      the completion or the step; not read by `listwise`.
    weights: [B, S] float32, of the group.
    margins: [B, S] float32, of the group; read if `objective.margins`.
    objective: the kind, and what it reads.
    hashes: [B, S] uint32 of `bootstrap.group_hashes`, read if `objective.bootstrap`.

  Returns:
    loss [B, S]; counts [B, S], the weight of each value, which is the mask that `token_mean` takes:
    the group's weight at its last token (pairwise, listwise; 0 for what is no pair, or a list of
    one) or at the last token (outcome), times the mask at a mark (process), and 0 elsewhere; and
    metrics [B, S], to be averaged alike: pairwise `accuracy` (ties are half right), `margin`,
    `chosen`, `rejected`; listwise `choice_probability` (mean over ranks, of choosing the best one
    that is left); outcome and process `accuracy` (value over 0 where the label is over 0.5),
    `value`. They are of the mean over members; `spread` is the std over members of the margin,
    choice probability or value, if there are several.

  Raises:
    ValueError: when the objective bootstraps and `hashes` is None.

  Source: Plackett-Luce as in arXiv 2305.18290 eq. 18 (appendix A.3).
  """
  chex.assert_rank(values, 3)
  fields = [segment_ids, group_ids, mask, labels, weights, margins]
  chex.assert_equal_shape([values[..., 0], *fields])
  chex.assert_type([values, *fields], [jnp.float32, jnp.int32, jnp.int32, *[jnp.float32] * 4])
  if objective.bootstrap and hashes is None:
    raise ValueError("hashes: objective.bootstrap needs them, found None")
  batch = _Packed(segments.segment_ends(segment_ids), group_ids, mask, labels, margins)
  counts = _counts(batch, weights, objective.kind)
  # The members, and their mean for the metrics, are judged by one program (`vmap`).
  mean = jnp.mean(values, -1, keepdims=True)
  judge = lambda value: _JUDGES[objective.kind](batch, value, objective)
  losses, scores, metrics = jax.vmap(judge, -1, -1)(jnp.concatenate([values, mean], -1))
  members = values.shape[-1]
  drawn = [1.0] * members
  if objective.bootstrap and hashes is not None:
    drawn = [bootstrap.poisson_weights(hashes, e) for e in range(members)]
  loss = sum((losses[..., e] * drawn[e] / members for e in range(members)), jnp.zeros_like(weights))
  metrics = {name: metric[..., -1] for name, metric in metrics.items()}
  if members > 1:
    metrics["spread"] = jnp.std(scores[..., :-1], axis=-1)
  keep = lambda x: jnp.where(counts > 0, x, 0)
  return keep(loss), counts, {k: jax.lax.stop_gradient(keep(v)) for k, v in metrics.items()}


class _Packed(NamedTuple):
  """What a value is judged by; all [B, S]."""

  ends: jax.Array  # bool, last token of a completion
  group_ids: jax.Array
  mask: jax.Array
  labels: jax.Array
  margins: jax.Array

  def total(self, values: jax.Array, where: jax.Array) -> jax.Array:
    """The sum over the group of `values` at the positions `where`, at every position of it."""
    return segments.segment_sum(jnp.where(where, values, 0), self.group_ids)

  def ends_of(self, chosen: bool) -> jax.Array:
    """Where the chosen, or the rejected, completions end."""
    return self.ends & ((self.labels > 0.5) == chosen)


def _counts(batch: _Packed, weights: jax.Array, kind: Kind) -> jax.Array:
  """[B, S], where a loss value stands, and what it weighs."""
  if kind == "outcome":
    return jnp.where(batch.ends, weights, 0)
  if kind == "process":
    return jnp.where(batch.mask > 0, weights * batch.mask, 0)
  ones = jnp.ones_like(weights)
  if kind == "listwise":
    comparable = batch.total(ones, batch.ends) > 1
  else:
    of_each = [batch.total(ones, batch.ends_of(chosen)) for chosen in (True, False)]
    comparable = (of_each[0] == 1) & (of_each[1] == 1)
  return jnp.where(segments.segment_ends(batch.group_ids) & comparable, weights, 0)


# The loss, what members may disagree on, and metrics; read only where something is counted.
_Judged = tuple[jax.Array, jax.Array, Metrics]


def _judge_pair(batch: _Packed, values: jax.Array, objective: RewardObjective) -> _Judged:
  """The chosen against the rejected completion."""
  chosen, rejected = (batch.total(values, batch.ends_of(best)) for best in (True, False))
  margins = batch.margins if objective.margins else 0.0
  loss = bradley_terry(chosen, rejected, margins, center=objective.center)
  margin = chosen - rejected
  metrics = {"accuracy": _half_on_ties(margin), "margin": margin}
  return loss, margin, metrics | {"chosen": chosen, "rejected": rejected}


def _judge_list(batch: _Packed, values: jax.Array, objective: RewardObjective) -> _Judged:
  """Completions from best to worst."""
  del objective
  left = segments.segment_suffix_logsumexp(values, batch.ends, batch.group_ids)
  terms = jnp.where(batch.ends, left - values, 0)
  others = batch.total(jnp.ones_like(values), batch.ends) - 1  # the last one is chosen for sure
  choice = (batch.total(jnp.exp(-terms), batch.ends) - 1) / jnp.maximum(others, 1)
  return batch.total(terms, batch.ends), choice, {"choice_probability": choice}


def _judge_label(batch: _Packed, values: jax.Array, objective: RewardObjective) -> _Judged:
  """A value against its label, at the last token or at step marks."""
  at = batch.ends if objective.kind == "outcome" else batch.mask > 0
  value, label = (jnp.where(at, x, 0) for x in (values, batch.labels))
  right = _half_on_ties(value * jnp.where(label > 0.5, 1, -1))
  return soft_cross_entropy(value, label), value, {"accuracy": right, "value": value}


_JUDGES = {
  "pairwise": _judge_pair,
  "listwise": _judge_list,
  "outcome": _judge_label,
  "process": _judge_label,
}


def _half_on_ties(score: jax.Array) -> jax.Array:
  """1 for a score over 0, 0.5 at 0."""
  return 0.5 * (1 + jnp.sign(score))
