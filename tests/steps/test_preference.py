"""The preference step: objective, gradient and metrics against the papers, through a real model.

The truth takes each completion in a row of its own, sums its log-probs in float64, and puts them
into the formulas of tests/losses/paper_preference.py, which know the slopes too; ours has the
groups packed side by side.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data import packing
from pt_jax.data.batch import Batch
from pt_jax.data.groups import MISMATCHED, Group, group_length, pack_groups
from pt_jax.data.packing import Example
from pt_jax.losses import preference_objective as objectives
from pt_jax.models import decoder
from pt_jax.models.logprobs import next_token_statistics
from pt_jax.steps import preference
from pt_jax.steps.preference import PreferenceState, PreferenceUpdater
from tests.losses import paper_preference as paper
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")

PAIRS, LENGTH = 8, 32
RUNNING = 0.25  # the running mean that the state has
OFFSETS = (0, 0, 30, 0, -30, 0, 0, 0)  # nats that the reference of the chosen one is off by
B = 0.3


def example(rng, index) -> Example:
  """3 to 9 tokens, of which the first one or two are the prompt; now and then two turns."""
  size = 3 + (5 * index) % 7
  mask = (np.arange(size) >= 1 + index % 2).astype(np.float32)
  if size > 6:
    mask[4] = 0  # what a tool answered
  return Example(rng.integers(0, tiny.MODEL.vocab_size, size, dtype=np.int32), mask)


@functools.cache
def pairs() -> tuple[Group, ...]:
  """Pairs of completions with unequal lengths and weights, and log-probs of a reference."""
  rng, made = np.random.default_rng(0), []
  for i in range(PAIRS):
    both = example(rng, 2 * i), example(rng, 2 * i + 1)
    references = []
    for j, completion in enumerate(both):
      size = len(completion.tokens)
      off = (OFFSETS[i] if j == 0 else 0) / completion.mask.sum()
      references.append((rng.normal(-3.5, 0.7, size) + off).astype(np.float32))
    made.append(Group(both, (1.0, 0.0), 0.5 + 0.25 * i, references=tuple(references)))
  return tuple(made)


@functools.cache
def singles() -> tuple[Group, ...]:
  """One completion of each pair, and the other one as if of another prompt; one without."""
  made = []
  for i, pair in enumerate(pairs()):
    keep = slice(0, 1 if i == 3 else 2)
    labels = (float(i % 2), MISMATCHED)[keep]
    made.append(
      pair._replace(
        completions=pair.completions[keep], labels=labels, references=pair.references[keep]
      )
    )
  return tuple(made)


def batch(groups, *, packed=True, microbatches: int | None = None):
  """The groups as rows [B, S], or as [A, B, S], on the mesh in context."""
  place = packing.pack if packed else packing.one_per_row
  plan = place([group_length(group) for group in groups], LENGTH, rows_multiple=8)
  rows = pack_groups(groups, plan)
  if packed:
    assert (rows.group_ids.max(1) > 0).any()
  if microbatches is None:
    return jax.device_put(rows, sharding.batch_spec())
  rows = jax.tree.map(lambda x: x.reshape(microbatches, -1, LENGTH), rows)
  return jax.device_put(rows, sharding.batch_spec(1))


def one_a_row(groups):
  """(tokens, positions, segment ids, mask) [N, S] of every completion of all groups."""
  completions = [c for group in groups for c in group.completions]
  plan = packing.one_per_row([len(c.tokens) for c in completions], LENGTH)
  return packing.pack_rows(completions, plan)


@jax.jit
def _logprobs(params, rows: Batch):
  hidden = decoder.forward(params, tiny.MODEL, rows.tokens, rows.positions, rows.segment_ids)
  return next_token_statistics(
    hidden, decoder.unembedding(params, tiny.MODEL), rows.tokens
  ).logprobs


@jax.jit
def _pulled(params, rows: Batch, slopes):
  """Gradient of the sum of slope * log-prob over all tokens."""
  return jax.grad(lambda p: jnp.sum(_logprobs(p, rows) * slopes))(params)


class Truth:
  """Sums of every completion, float64, and from slopes by them to gradients of parameters."""

  def __init__(self, groups):
    self.rows = one_a_row(groups)
    forward = jax.jit(lambda params, *rows: decoder.forward(params, tiny.MODEL, *rows))
    rows = (self.rows.tokens, self.rows.positions, self.rows.segment_ids)
    hidden = np.asarray(forward(tiny.params(), *rows), np.float64)
    z = hidden @ np.asarray(tiny.params()["unembed"], np.float64).T
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p[:, :-1], self.rows.tokens[:, 1:, None], -1)[..., 0]
    self.mask = np.asarray(self.rows.mask, np.float64)
    self.sums = (np.pad(picked, ((0, 0), (1, 0))) * self.mask).sum(-1)
    self.tokens = self.mask.sum(-1)
    known = [r for group in groups for r in group.references]
    self.reference = np.array(
      [(np.float64(r) * self.mask[i, : len(r)]).sum() for i, r in enumerate(known)]
    )

  def gradient(self, slopes):
    """Of sum slope * (summed log-prob), by the parameters."""
    per_token = (np.asarray(slopes)[:, None] * self.mask).astype(np.float32)
    return _pulled(tiny.params(), self.rows, per_token)


@functools.cache
def truth_of_pairs() -> Truth:
  return Truth(pairs())


@functools.cache
def truth_of_singles() -> Truth:
  return Truth(singles())


# name -> (objective, the paper's loss and slopes by the scores c, j; index of the pair)
CASES = {
  "cdpo": (objectives.cdpo(0.1, B), lambda c, j: paper.dpo(c, j, B, 0.1)),
  "ipo": (objectives.ipo(B), lambda c, j: paper.ipo(c, j, B)),
  "orpo": (objectives.orpo(B, sft=0.0), lambda c, j: paper.odds_ratio(c, j, B)),
  "simpo": (objectives.simpo(2.0, 0.6), lambda c, j: paper.dpo(c, j, 2.0, gamma=0.6)),
  "trajectory": (objectives.trajectory_dpo(B), lambda c, j: paper.dpo(c, j, B)),
  "bco_pair": (objectives.bco_pair(B), lambda c, j: paper.bco(c, j, B, RUNNING)),
  "beta_dpo": (
    objectives.beta_dpo(B, alpha=0.4),
    lambda c, j: paper.beta_dpo(c, j, B, 0.4, RUNNING, 1e-3),
  ),
  "rpo": (objectives.rpo(B, sft=0.7), lambda c, j: paper.dpo(c, j, B)),
}


KTO = objectives.kto(B, desirable_weight=1.5, undesirable_weight=0.8)
THROUGH_THE_MODEL = (CASES["cdpo"][0], KTO)  # the others share what follows the log-probs


@functools.cache
def by_logprobs(objective):
  """(log-probs [B, S], batch, baseline) -> gradients of the total, (Sum, metrics)."""

  def total(logprobs, rows, baseline):
    value, metrics = preference.comparison_loss(
      logprobs, rows, objective=objective, baseline=baseline
    )
    return value.total, (value, metrics)

  return jax.jit(jax.grad(total, has_aux=True))


@functools.cache
def by_params(objective):
  """(params, batch [B, S], baseline) -> gradients of the total, (Sum, metrics)."""

  def total(params, rows, baseline):
    value, metrics = preference.preference_objective(
      params, rows, config=tiny.MODEL, objective=objective, baseline=baseline
    )
    return value.total, (value, metrics)

  return jax.jit(jax.grad(total, has_aux=True))


def own_logprobs(groups):
  """[B, S] what the model says of the packed groups."""
  return scored(tiny.params(), batch(groups))


scored = jax.jit(functools.partial(preference.completion_logprobs, config=tiny.MODEL))


def check_gradients(groups, truth, objective, baseline, slopes):
  """Of every log-prob, and for some objectives of every parameter; returns (Sum, metrics)."""
  rows = batch(groups)
  grads, (value, metrics) = by_logprobs(objective)(own_logprobs(groups), rows, baseline)
  # The completions of the packed rows in their order, as those of the truth are in theirs.
  tokens = [c.tokens.tobytes() for group in groups for c in group.completions]
  seen = 0
  for b, ids in enumerate(np.asarray(rows.segment_ids)):
    for segment in range(ids.max() + 1):
      at = ids == segment
      i = tokens.index(np.asarray(rows.tokens)[b, at].tobytes())
      want = slopes[i] * truth.mask[i, : at.sum()]
      scale = np.abs(slopes).max()
      np.testing.assert_allclose(np.asarray(grads)[b, at], want, rtol=2e-5, atol=1e-6 * scale)
      seen += 1
  assert seen == len(tokens) and not np.asarray(grads)[np.asarray(rows.segment_ids) < 0].any()
  if objective in THROUGH_THE_MODEL:
    through, _ = by_params(objective)(tiny.params(), rows, baseline)
    assert_close(through, truth.gradient(slopes))
  return value, metrics


def assert_close(got, want):
  """Every leaf, relative to its largest value."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(want):
    found = functools.reduce(lambda tree, key: tree[key.key], path, got)
    scale = np.abs(leaf).max()
    np.testing.assert_allclose(found, leaf, rtol=0, atol=3e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_the_papers(name):
  objective, of_paper = CASES[name]
  truth = truth_of_pairs()
  score = truth.sums - (truth.reference if objective.reference else 0)
  per = truth.tokens if objective.length_normalized else np.ones_like(score)
  weights = np.array([pair.weight for pair in pairs()])
  want, slopes = 0.0, np.zeros_like(score)
  for i, weight in enumerate(weights):
    c, j = 2 * i, 2 * i + 1
    loss, slope_c, slope_j = of_paper(score[c] / per[c], score[j] / per[j])
    if objective.sft:
      loss -= objective.sft * truth.sums[c] / truth.tokens[c]
      slope_c -= objective.sft / truth.tokens[c] * per[c]
    want += weight * loss
    slopes[c], slopes[j] = weight * slope_c / per[c], weight * slope_j / per[j]
  value, metrics = check_gradients(pairs(), truth, objective, RUNNING, slopes)
  assert float(value.weight) == weights.sum()
  np.testing.assert_allclose(value.total, want, rtol=2e-5)
  if objective.reference and not objective.length_normalized and name != "beta_dpo":
    margins = B * (score[::2] - score[1::2])
    mean = lambda values: (weights * values).sum() / weights.sum()
    named = {k.removeprefix("preference/"): float(v.mean()) for k, v in metrics.items()}
    np.testing.assert_allclose(named["margin"], mean(margins), rtol=1e-5)
    np.testing.assert_allclose(named["accuracy"], mean(margins > 0), rtol=1e-5)
    assert 0 < named["accuracy"] < 1
    np.testing.assert_allclose(named["chosen_reward"], mean(B * score[::2]), rtol=1e-5)
    np.testing.assert_allclose(named["rejected_reward"], mean(B * score[1::2]), rtol=1e-5)
    np.testing.assert_allclose(named["chosen_logprob_change"], mean(score[::2]), rtol=1e-5)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_single_completions_are_the_papers(name):
  objective, of_paper, baseline = {
    "kto": (KTO, paper.kto, 1.7),
    "bco": (objectives.bco(B), paper.bco_single, RUNNING),
  }[name]
  groups, truth = singles(), truth_of_singles()
  score, slopes = truth.sums - truth.reference, np.zeros_like(truth.sums)
  want, at = 0.0, 0
  rewards: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
  for group in groups:
    right = int(group.labels[0])
    share = (objective.desirable_weight if right else objective.undesirable_weight) * group.weight
    loss, slopes[at] = of_paper(score[at], bool(right), B, baseline, share)
    rewards[right].append((group.weight, B * score[at]))
    want, at = want + loss, at + len(group.completions)
  # No gradient goes through the mismatched completions, whose slopes are 0.
  value, metrics = check_gradients(groups, truth, objective, baseline, slopes)
  np.testing.assert_allclose(value.total, want, rtol=2e-5)
  for side, right in (("chosen", 1), ("rejected", 0)):
    mean = np.average([r for _, r in rewards[right]], weights=[w for w, _ in rewards[right]])
    np.testing.assert_allclose(metrics[f"preference/{side}_reward"].mean(), mean, rtol=1e-5)


STATE = PreferenceUpdater(tiny.UPDATER)


@functools.cache
def step(objective):
  return jax.jit(
    functools.partial(
      preference.preference_step, config=tiny.MODEL, updater=tiny.UPDATER, objective=objective
    )
  )


def start(running=0.0):
  return PreferenceState(tiny.state(), jnp.float32(running))


def test_the_baseline_is_that_of_all_mismatched_completions():
  truth, groups = truth_of_singles(), singles()
  moved, at = [], 0
  for group in groups:
    if len(group.completions) == 2:
      moved.append((truth.sums - truth.reference)[at + 1])
    at += len(group.completions)
  assert len(moved) == PAIRS - 1
  _, metrics = step(KTO)(start(), batch(groups, microbatches=2))
  np.testing.assert_allclose(metrics["preference/baseline"], np.mean(moved), rtol=1e-5)


def test_the_baseline_is_per_token_where_the_scores_are():
  truth, groups = truth_of_singles(), singles()
  normal = jax.jit(
    functools.partial(
      preference.kl_baseline,
      config=tiny.MODEL,
      objective=dataclasses.replace(KTO, length_normalized=True),
    )
  )
  per_token, at = [], 0
  for group in groups:
    if len(group.completions) == 2:
      per_token.append((truth.sums - truth.reference)[at + 1] / truth.tokens[at + 1])
    at += len(group.completions)
  got = normal(tiny.params(), batch(groups, microbatches=1))
  np.testing.assert_allclose(got, np.mean(per_token), rtol=1e-5)


@pytest.mark.parametrize(("packed", "microbatches"), [(True, 4), (False, 2)])
def test_the_update_depends_on_neither_microbatches_nor_packing(packed, microbatches):
  """KTO: it has a pass before the gradients, and weights of groups."""
  want, wanted = step(KTO)(start(), batch(singles(), microbatches=1))
  got, found = step(KTO)(start(), batch(singles(), packed=packed, microbatches=microbatches))
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
  assert_close(got.train.optimizer[0].mu, want.train.optimizer[0].mu)
  assert_close(got.params, want.params)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), want.params, tiny.params())
  assert min(jax.tree.leaves(moved)) > 1e-4


def test_the_running_mean_is_of_the_updates_before():
  """Margins at the objective's own beta, here; what the loss read is what it was before."""
  objective, truth = objectives.beta_dpo(B, alpha=0.4), truth_of_pairs()
  weights, score = np.array([g.weight for g in pairs()]), B * (truth.sums - truth.reference)
  seen = np.average(score[::2] - score[1::2], weights=weights)
  state, metrics = step(objective)(start(RUNNING), batch(pairs(), microbatches=1))
  np.testing.assert_allclose(state.running, 0.9 * RUNNING + 0.1 * seen, rtol=1e-5)
  np.testing.assert_allclose(metrics["preference/margin_at_beta"], seen, rtol=1e-5)
  _, other = step(objective)(start(-0.5), batch(pairs(), microbatches=1))
  assert float(other["loss"]) != float(metrics["loss"])


def test_what_the_running_mean_is_of():
  metrics = {f"preference/{k}": v for k, v in {"chosen_reward": 3, "rejected_reward": 1}.items()}
  assert preference.tracked(metrics, objectives.bco_pair()) == 2
  assert preference.tracked({"preference/reward": 5}, objectives.bco()) == 5
  for objective in (objectives.dpo(), KTO, objectives.ipo()):
    assert preference.tracked(metrics, objective) is None


def test_score_is_the_log_prob_of_the_trained_tokens():
  rows = batch(pairs(), microbatches=2)
  both = functools.partial(preference.score, config=tiny.MODEL)
  got = np.asarray(jax.jit(both)(tiny.params(), rows))
  mask = np.asarray(rows.mask)
  assert not got[mask == 0].any()
  np.testing.assert_allclose(got.sum(), truth_of_pairs().sums.sum(), rtol=1e-5)


def test_evaluation_of_pairs():
  """Outputs stand at the first position of each pair; KTO is evaluated on pairs too."""
  truth, rows = truth_of_pairs(), batch(pairs())
  run = jax.jit(functools.partial(preference.preference_evaluate, config=tiny.MODEL, objective=KTO))
  sums, at, outputs = run(start(), rows)
  weights = np.array([pair.weight for pair in pairs()])
  score = truth.sums - truth.reference
  want = np.sort(B * (score[::2] - score[1::2]))
  np.testing.assert_allclose(np.sort(np.asarray(outputs["margin"])[at]), want, rtol=1e-5)
  rate = truth.sums / truth.tokens
  ranking = np.average(rate[::2] > rate[1::2], weights=weights)
  np.testing.assert_allclose(sums["ranking_accuracy"].mean(), ranking, rtol=1e-6)
  losses = [paper.dpo(c, j, B)[0] for c, j in zip(score[::2], score[1::2])]
  np.testing.assert_allclose(sums["loss"].mean(), np.average(losses, weights=weights), rtol=1e-5)


def test_what_is_outside_the_mask_is_not_read():
  """Junk in the reference's log-probs there reaches nothing."""
  rows = batch(pairs())
  objective = objectives.dpo(B)
  logprobs = own_logprobs(pairs())
  clean, _ = by_logprobs(objective)(logprobs, rows, 0.0)
  junk = np.where(np.asarray(rows.mask) > 0, rows.reference_logprobs, np.nan)
  dirty = rows.replace(reference_logprobs=jax.device_put(junk, sharding.batch_spec()))
  got, _ = by_logprobs(objective)(logprobs, dirty, 0.0)
  np.testing.assert_array_equal(got, clean)
  assert np.asarray(clean).any()
