"""Losses on compared completions: pairs, and single completions with a label.

Every formula is written in implicit rewards, r = beta * score (see `PreferenceObjective`): a pair
has r_c and r_j and their difference h = r_c - r_j - gamma.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from pt_jax.losses.preference_objective import DIFFERENCE, PreferenceObjective

Metrics = dict[str, jax.Array]

# exp(lp / tokens) that float32 can tell from 1: beyond it the odds of ORPO are held (about 2^20).
MOST_CERTAIN = -1e-6


@flax.struct.dataclass
class Completions:
  """One completion per element. Every field has ONE shape, of any rank."""

  logprobs: jax.Array  # float32, nats, summed over the trained tokens, under the policy
  lengths: jax.Array  # float32, how many tokens that is; 0 counts as 1
  reference_logprobs: jax.Array | None = None  # float32, the same sum under the reference
  # float32, sum over the same tokens of log(sum over the vocabulary of p^2), the log-prob expected
  # of a token that the policy samples. WPO's "sampled alignment"; None: not aligned.
  expected_logprobs: jax.Array | None = None

  def given(self) -> list[jax.Array]:
    """The fields that are not None."""
    return [x for x in vars(self).values() if x is not None]

  def per_token(self, sums: jax.Array) -> jax.Array:
    """`sums` over the tokens of the completion."""
    return sums / jnp.maximum(self.lengths, 1)


def pair_loss(
  chosen: Completions,
  rejected: Completions,
  *,
  objective: PreferenceObjective,
  mean_margin: jax.Array | float = 0.0,
  reward_shift: jax.Array | float = 0.0,
) -> tuple[jax.Array, Metrics]:
  """The loss of each pair. With h = r_c - r_j - gamma and s = label_smoothing:

  sigmoid     -(1-s) log sigma(h) - s log sigma(-h)
  robust      [-(1-s) log sigma(h) + s log sigma(-h)] / (1 - 2s)
  hinge       max(0, 1 - h)
  ipo         ((h - 1/2) / beta)^2
  exo_pair    sigma(h) log[sigma(h) / (1-s)] + sigma(-h) log[sigma(-h) / s]
  discopop    -sigma(-h/tau) log sigma(h) + sigma(h/tau) exp(-h)
  nca_pair    -log sigma(r_c) - log sigma(-r_c) / 2 - log sigma(-r_j) / 2
  bco_pair    -log sigma(r_c - reward_shift) - log sigma(reward_shift - r_j)
  sppo_hard   ((r_c - 1/2) / beta)^2 + ((r_j + 1/2) / beta)^2
  apo_zero    1 - sigma(r_c) + sigma(r_j)
  apo_down    sigma(r_c) + 1 - sigma(r_c - r_j)
  odds_ratio  -beta log sigma(log odds(c) - log odds(j)), odds(x) = e^x / (1 - e^x)

  then, in this order: times the confidence weight (no gradient through it), plus sft times the
  NLL per token of the chosen completion. From h = margin_limit - gamma on, h is a constant.

  Args:
    chosen, rejected: sums over completions; `reference_logprobs` only if `objective.reference`.
    objective: any whose loss is not `unpaired`.
    mean_margin: [] or the shape of the pairs, M_0 of `DynamicBeta`; no gradient.
    reward_shift: [] or the shape of the pairs, BCO's delta in units of reward; no gradient. It is
      not taken from this batch, whose content would then change the loss of its pairs: the caller
      keeps a running mean of (chosen_reward + rejected_reward) / 2, or leaves TRL's 0.

  Returns:
    loss of the shape given, unweighted and unreduced; and metrics of that shape, to be averaged
    over pairs: `chosen_reward`, `rejected_reward`, `margin` (their difference), `accuracy` (1 where
    it is > 0), with reference log-probs `chosen_logprob_change` and `rejected_logprob_change` (nats
    away from the reference), and where the objective has it `sft` (nats per token), `beta`,
    `confidence` (the weight) and `beyond_limit` (1 where the pair has stopped pulling).

  Raises:
    ValueError: for an unpaired objective, or a reference that is missing.
  """
  given = chosen.given() + rejected.given()
  chex.assert_equal_shape(given)
  chex.assert_type(given, jnp.float32)
  if objective.unpaired:
    raise ValueError(f"loss: expected one of pairs, found {objective.loss!r}")
  c, j = _scores(chosen, objective), _scores(rejected, objective)
  beta, metrics = _beta(c - j, objective, mean_margin)
  r_c, r_j = beta * c, beta * j
  if objective.loss in DIFFERENCE:
    h, stopped = _limited(r_c - r_j, objective)
    metrics |= stopped
    loss = _difference_loss(h, beta, objective)
  else:
    loss = _sides_loss(r_c, r_j, jax.lax.stop_gradient(reward_shift), objective)
  if objective.confidence_weighted:
    metrics["confidence"] = weight = _confidence(chosen) * _confidence(rejected)
    loss *= jax.lax.stop_gradient(weight)
  if objective.sft:
    metrics["sft"] = nll = -chosen.per_token(chosen.logprobs)
    loss += objective.sft * nll
  metrics |= {"chosen_reward": r_c, "rejected_reward": r_j, "margin": r_c - r_j}
  metrics["accuracy"] = (r_c > r_j).astype(jnp.float32)
  for name, side in (("chosen", chosen), ("rejected", rejected)):
    if side.reference_logprobs is not None:
      metrics[f"{name}_logprob_change"] = _change(side)
  return loss, jax.lax.stop_gradient(metrics)


def unpaired_loss(
  completions: Completions,
  labels: jax.Array,
  *,
  objective: PreferenceObjective,
  baseline: jax.Array | float = 0.0,
) -> tuple[jax.Array, Metrics]:
  """The loss of each completion, desirable_weight * right or undesirable_weight * wrong:

                     right                            wrong
  kto                1 - sigma(r - beta z)            1 - sigma(beta z - r), z = max(0, baseline)
  bco                -log sigma(r - baseline)         -log sigma(baseline - r)
  apo_zero_unpaired  1 - sigma(r)                     sigma(r)

  Args:
    completions: sums over completions, with `reference_logprobs`.
    labels: the same shape, float32, 1 right, 0 wrong; between them both losses are mixed.
    objective: one that is `unpaired`.
    baseline: [] or the shape of the completions; no gradient. For `kto` the KL to the reference in
      nats: the mean over the global batch of lp - reference lp (per token if `length_normalized`)
      of mismatched completions, each after the prompt of another. For `bco` its shift in units of
      reward, a running mean that the caller keeps. `apo_zero_unpaired` does not read it.

  Returns:
    loss of the shape given, unweighted and unreduced; and metrics of that shape: `reward`,
    `label`, `accuracy` (1 where the reward is on the right side of the baseline, which counts as
    0 for apo_zero_unpaired), `logprob_change` (nats away from the reference), and for
    `kto` and `bco` `baseline`. A mean of `reward * label` over that of `label` is the reward of
    right completions.

  Raises:
    ValueError: for an objective of pairs, or a reference that is missing.

  Source: arXiv 2402.01306 eq. 8 (KTO); arXiv 2404.04656 eq. 9 (BCO); arXiv 2408.06266 (APO).
  """
  given = [*completions.given(), labels]
  chex.assert_equal_shape(given)
  chex.assert_type(given, jnp.float32)
  if not objective.unpaired:
    raise ValueError(f"loss: expected one of single completions, found {objective.loss!r}")
  score = _scores(completions, objective)
  reward = objective.beta * score
  baseline = jnp.broadcast_to(jax.lax.stop_gradient(baseline), labels.shape).astype(jnp.float32)
  shift = {
    "kto": objective.beta * jnp.maximum(baseline, 0),
    "bco": baseline,
    "apo_zero_unpaired": jnp.zeros_like(baseline),
  }[objective.loss]
  h = reward - shift
  falls = jax.nn.softplus if objective.loss == "bco" else jax.nn.sigmoid
  loss = objective.desirable_weight * labels * falls(-h)
  loss += objective.undesirable_weight * (1 - labels) * falls(h)
  metrics = {
    "reward": reward,
    "label": labels,
    "accuracy": ((h > 0) == (labels > 0.5)).astype(jnp.float32),
    "logprob_change": _change(completions),
  }
  if objective.loss != "apo_zero_unpaired":
    metrics["baseline"] = baseline
  return loss, jax.lax.stop_gradient(metrics)


def _change(completions: Completions) -> jax.Array:
  """Nats away from the reference."""
  if completions.reference_logprobs is None:
    raise ValueError("reference_logprobs: the objective needs a reference, found None")
  return completions.logprobs - completions.reference_logprobs


def _scores(completions: Completions, objective: PreferenceObjective) -> jax.Array:
  """lp - reference lp or lp, per token if asked; in nats."""
  score = _change(completions) if objective.reference else completions.logprobs
  return completions.per_token(score) if objective.length_normalized else score


def _beta(
  difference: jax.Array, objective: PreferenceObjective, mean_margin: jax.Array | float
) -> tuple[jax.Array | float, Metrics]:
  """The beta of each pair."""
  if (dynamic := objective.dynamic_beta) is None:
    return objective.beta, {}
  excess = objective.beta * difference - mean_margin
  beta = jnp.maximum(objective.beta * (1 + dynamic.alpha * excess), dynamic.minimum)
  beta = jax.lax.stop_gradient(beta)
  return beta, {"beta": beta}


def _limited(margin: jax.Array, objective: PreferenceObjective) -> tuple[jax.Array, Metrics]:
  """h, which does not move any more from the limit on."""
  limit = objective.margin_limit
  if limit is None:
    return margin - objective.gamma, {}
  beyond = margin >= limit
  held = jnp.where(beyond, limit, margin)
  return held - objective.gamma, {"beyond_limit": beyond.astype(jnp.float32)}


def _difference_loss(
  h: jax.Array, beta: jax.Array | float, objective: PreferenceObjective
) -> jax.Array:
  name, smoothing = objective.loss, objective.label_smoothing
  if name == "hinge":
    return jax.nn.relu(1 - h)
  if name == "ipo":
    return jnp.square((h - 0.5) / beta)
  if name == "discopop":  # exp(-h) sigma(h / tau) in one exponential, which cannot overflow
    mixed = jnp.exp(jax.nn.log_sigmoid(h / objective.tau) - h)
    return jax.nn.sigmoid(-h / objective.tau) * jax.nn.softplus(-h) + mixed
  right, wrong = jax.nn.softplus(-h), jax.nn.softplus(h)
  if name == "exo_pair":
    certain, flipped = jnp.log1p(-smoothing), jnp.log(smoothing)
    return -jax.nn.sigmoid(h) * (right + certain) - jax.nn.sigmoid(-h) * (wrong + flipped)
  if name == "robust":
    return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
  return (1 - smoothing) * right + smoothing * wrong


def _sides_loss(
  r_c: jax.Array, r_j: jax.Array, shift: jax.Array | float, objective: PreferenceObjective
) -> jax.Array:
  sigmoid, softplus, beta = jax.nn.sigmoid, jax.nn.softplus, objective.beta
  match objective.loss:
    case "nca_pair":
      return softplus(-r_c) + 0.5 * softplus(r_c) + 0.5 * softplus(r_j)
    case "bco_pair":
      return softplus(shift - r_c) + softplus(r_j - shift)
    case "sppo_hard":
      return jnp.square((r_c - 0.5) / beta) + jnp.square((r_j + 0.5) / beta)
    case "apo_zero":
      return sigmoid(-r_c) + sigmoid(r_j)
    case "apo_down":
      return sigmoid(r_c) + sigmoid(r_j - r_c)
    case _:  # odds_ratio
      return beta * softplus(_log_odds(r_j / beta) - _log_odds(r_c / beta))


def _log_odds(logprob: jax.Array) -> jax.Array:
  """x - log(1 - e^x), held from `MOST_CERTAIN` on. Both branches are finite, so is the gradient."""
  x = jnp.minimum(logprob, MOST_CERTAIN)
  near = x > -0.7  # about log(1/2): either form loses digits on the other side
  log1mexp = jnp.where(
    near,
    jnp.log(-jnp.expm1(jnp.where(near, x, -0.7))),
    jnp.log1p(-jnp.exp(jnp.where(near, -0.7, x))),
  )
  return x - log1mexp


def _confidence(completions: Completions) -> jax.Array:
  """exp of the mean log-prob per token, over that expected of a sample if it is given."""
  sums = completions.logprobs
  if completions.expected_logprobs is not None:
    sums = sums - completions.expected_logprobs
  return jnp.exp(completions.per_token(sums))
