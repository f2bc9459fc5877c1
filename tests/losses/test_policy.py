import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import objective, policy
from tests.losses import layouts, paper

KL = objective.Kl(0.3)
OPTIONS = {  # what each changes in Objective(), and the same in the words of the paper
  "ppo": ({}, {}),
  "grpo": ({"reduction": "segment_mean", "kl": objective.Kl(0.04)}, {"beta": 0.04}),
  "clip-higher, k2": (
    {"surrogate": objective.Clip(0.2, 0.28), "kl": objective.Kl(0.3, "k2")},
    {"surrogate": ("clip", {"low": 0.2, "high": 0.28}), "beta": 0.3, "estimator": "k2"},
  ),
  "k1, weighted": (
    {"kl": objective.Kl(0.3, "k1", True)},
    {"beta": 0.3, "estimator": "k1", "weighted": True},
  ),
  "constant, k3 weighted": (
    {"reduction": "constant", "constant_length": 9, "kl": objective.Kl(0.3, "k3", True)},
    {"beta": 0.3, "weighted": True},
  ),
  "exact kl": ({"kl": objective.Kl(0.3, "exact")}, {"beta": 0.3, "estimator": "exact"}),
  "kl in the reward": ({"kl": objective.Kl(0.3, where="reward")}, {}),
  "dual clip": (
    {"surrogate": objective.Clip(0.1, 0.2, dual=1.3)},
    {"surrogate": ("clip", {"low": 0.1, "high": 0.2, "dual": 1.3})},
  ),
  "cispo": (
    {"surrogate": objective.Cispo(0.8, 1.3)},
    {"surrogate": ("cispo", {"low": 0.8, "high": 1.3})},
  ),
  "sapo": (
    {"surrogate": objective.Sapo(), "reduction": "segment_mean"},
    {"surrogate": ("sapo", {"positive": 1.0, "negative": 1.05})},
  ),
  "gspo": (
    {"ratio": "sequence", "surrogate": objective.Clip(0.1, 0.1), "reduction": "segment_mean"},
    {"ratio": "sequence", "surrogate": ("clip", {"low": 0.1, "high": 0.1})},
  ),
  "gspo, weighted kl": (
    {"ratio": "sequence", "kl": objective.Kl(0.3, "k3", True)},
    {"ratio": "sequence", "beta": 0.3, "weighted": True},
  ),
  "gspo-token": (
    {"ratio": "sequence_token", "surrogate": objective.Clip(0.1, 0.1)},
    {"ratio": "sequence_token", "surrogate": ("clip", {"low": 0.1, "high": 0.1})},
  ),
  "rloo": ({"ratio": "product", "reduction": "segment_mean"}, {"ratio": "product"}),
  "entropy bonus": ({"entropy": 0.2}, {"entropy": 0.2}),
  **{
    f"correction: {level}, {mode}": (
      {"correction": objective.Correction(level, mode, 0.7, 1.2), "kl": KL},
      {"corrected": {"level": level, "mode": mode, "low": 0.7, "high": 1.2}, "beta": 0.3},
    )
    for level in ("token", "sequence")
    for mode in ("truncate", "mask")
  },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_paper_in_packed_rows(name):
  changes, options = OPTIONS[name]
  made = layouts.samples()
  chosen = dataclasses.replace(objective.Objective(), **changes)
  batch = layouts.lay_out(made, layouts.PACKED, 12)
  value, gradient = layouts.value_and_gradient(batch, chosen)
  reduced = {"reduction": chosen.reduction, "constant_length": chosen.constant_length}
  expected, expected_gradients = paper.objective(made, **reduced, **options)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, wanted in zip(layouts.take_back(gradient, made, layouts.PACKED), expected_gradients):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)


def test_the_options_differ():
  """Equal truths would let a wrong option pass; what acts outside the loss is the exception."""
  made = layouts.samples()
  losses = {}
  for name, (changes, options) in OPTIONS.items():
    reduced = {k: changes[k] for k in ("reduction", "constant_length") if k in changes}
    losses[name] = paper.objective(made, **{"reduction": "token_mean"} | reduced, **options)[0]
  assert losses.pop("kl in the reward") == losses["ppo"]
  assert np.diff(np.sort([*losses.values()])).min() > 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_the_papers_gradients_are_slopes(name):
  """The truth itself against central differences, where nothing is held constant in it."""
  options = OPTIONS[name][1]
  if options.get("ratio") == "sequence_token" or options.get("surrogate", [""])[0] == "cispo":
    return  # stop-gradients: checked by sign and size below
  made = [{k: v.astype(np.float64) for k, v in sample.items()} for sample in layouts.samples()]
  loss = lambda: paper.objective(made, "token_mean", **options)[0]
  gradients = paper.objective(made, "token_mean", **options)[1]
  for sample, gradient in zip(made, gradients):
    for place in range(len(gradient)):
      center, slopes = sample["logprobs"][place], []
      for step in (1e-6, -1e-6):
        sample["logprobs"][place] = center + step
        slopes.append(loss() / (2 * step))
      sample["logprobs"][place] = center
      np.testing.assert_allclose(sum(slopes), gradient[place], rtol=1e-5, atol=1e-8)


def _losses(log_ratios, advantages, chosen, reference=None, mask=None):
  """Loss, d loss / d logprob and metrics of a row of tokens whose old log-prob is -40."""
  ids = np.zeros((1, len(log_ratios)), np.int32)
  log_ratios, advantages = np.float32([log_ratios]), np.float32([advantages])
  old = np.full_like(log_ratios, -40.0)
  mask = np.ones_like(old) if mask is None else np.float32([mask])
  reference = None if reference is None else old + np.float32([reference])

  def summed(logprobs):
    loss, metrics = policy.policy_loss(
      logprobs, old, advantages, mask, ids, objective=chosen, reference_logprobs=reference
    )
    return loss.sum(), (loss, metrics)

  gradient, (loss, metrics) = jax.grad(summed, has_aux=True)(jnp.asarray(old + log_ratios))
  return np.array(loss[0]), np.array(gradient[0]), jax.tree.map(lambda x: np.array(x[0]), metrics)


def test_gradient_of_each_branch():
  """-A r wherever the ratio may still move, 0 where the clip has silenced the token."""
  chosen = objective.Objective(surrogate=objective.Clip(low=0.2, high=0.28))
  ratio = np.array([1.0, 1.0, 1.27, 1.29, 0.81, 0.79, 1.29, 0.79, 1.0])
  advantage = np.array([2.0, -3.0, 2.0, 2.0, -3.0, -3.0, -3.0, 2.0, 0.0])
  silenced = np.array([0, 0, 0, 1, 0, 1, 0, 0, 0])  # r > 1.28 with A > 0; r < 0.8 with A < 0
  loss, gradient, metrics = _losses(np.log(ratio), advantage, chosen)
  np.testing.assert_allclose(gradient, -advantage * ratio * (1 - silenced), rtol=1e-5)
  np.testing.assert_allclose(loss[[0, 3, 5]], [-2.0, -2.0 * 1.28, 3.0 * 0.8], rtol=1e-5)
  np.testing.assert_array_equal(metrics["clip_fraction"], silenced)
  np.testing.assert_array_equal(metrics["clip_fraction_high"], [0, 0, 0, 1, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(metrics["clip_fraction_low"], [0, 0, 0, 0, 0, 1, 0, 0, 0])
  np.testing.assert_allclose(metrics["ratio"], ratio, rtol=1e-5)
  np.testing.assert_allclose(metrics["approx_kl"], ratio - 1 - np.log(ratio), atol=1e-5)


def test_dual_clip_bounds_what_a_wrong_token_can_cost():
  """A < 0: beyond the ratio of 3 the loss is 3 |A| and there is no gradient; A > 0 is untouched."""
  chosen = objective.Objective(surrogate=objective.Clip(0.2, 0.28, dual=3.0))
  ratio = np.array([2.9, 3.1, 3.1, 1.0, 1.0])
  advantage = np.array([-2.0, -2.0, 2.0, -2.0, 2.0])
  loss, gradient, metrics = _losses(np.log(ratio), advantage, chosen)
  np.testing.assert_allclose(gradient, [5.8, 0, 0, 2.0, -2.0], rtol=1e-5)
  np.testing.assert_allclose(loss[:3], [5.8, 6.0, -2.56], rtol=1e-5)
  np.testing.assert_array_equal(metrics["clip_fraction_dual"], [0, 1, 0, 0, 0])
  np.testing.assert_array_equal(metrics["clip_fraction_high"], [0, 0, 1, 0, 0])


def test_cispo_keeps_the_gradient_of_capped_tokens():
  """-min(r, high) A for every token, whatever its log-prob (here -40: without the stop-gradient it
  would be -r A (1 + log p), of the other sign)."""
  chosen = objective.Objective(surrogate=objective.Cispo(low=0.5, high=2.0))
  ratio = np.array([1.0, 1.0, 3.0, 3.0, 0.2, 1.5])
  advantage = np.array([2.0, -2.0, 2.0, -2.0, 2.0, -1.0])
  _, gradient, metrics = _losses(np.log(ratio), advantage, chosen)
  np.testing.assert_allclose(gradient, -np.clip(ratio, 0.5, 2.0) * advantage, rtol=1e-5)
  np.testing.assert_array_equal(metrics["clip_fraction_high"], [0, 0, 1, 1, 0, 0])
  np.testing.assert_array_equal(metrics["clip_fraction_low"], [0, 0, 0, 0, 1, 0])


def test_sapo_fades_the_gradient_on_both_sides():
  """-A r at ratio 1; 4 sigma (1 - sigma) of it elsewhere, with a tau for each sign."""
  chosen = objective.Objective(surrogate=objective.Sapo(2.0, 3.0))
  ratio, advantage = np.array([1.0, 1.0, 2.0, 2.0, 0.3]), np.array([1.5, -1.5, 1.0, -1.0, 1.0])
  _, gradient, metrics = _losses(np.log(ratio), advantage, chosen)
  gate = 1 / (1 + np.exp(-np.where(advantage > 0, 2.0, 3.0) * (ratio - 1)))
  np.testing.assert_allclose(gradient, -4 * gate * (1 - gate) * ratio * advantage, rtol=1e-5)
  np.testing.assert_allclose(gradient[:2], [-1.5, 1.5], rtol=1e-5)
  assert not metrics["clip_fraction"].any()


def test_gspo_moves_all_tokens_of_a_sequence_or_none():
  """Ratios 1.3, 1.0, 1.3: s = 1.19 is past 1.1, so a sequence with A > 0 has no gradient although
  its second token is at ratio 1; with A < 0 each token has -A s / |o|."""
  ratio = np.array([1.3, 1.0, 1.3])
  s = np.exp(np.log(ratio).mean())
  chosen = objective.Objective(ratio="sequence", surrogate=objective.Clip(0.1, 0.1))
  _, gradient, metrics = _losses(np.log(ratio), np.full(3, 2.0), chosen)
  assert not gradient.any() and metrics["clip_fraction_high"].all()
  _, gradient, _ = _losses(np.log(ratio), np.full(3, -2.0), chosen)
  np.testing.assert_allclose(gradient, 2 * s, rtol=1e-5)  # the sum of three losses
  np.testing.assert_allclose(metrics["ratio"], s, rtol=1e-5)


def test_gspo_token_has_the_value_of_the_sequence_and_the_gradient_of_the_token():
  """Advantages that differ within a sequence reach their own token only: -A_t s."""
  ratio, advantage = np.array([1.3, 1.0, 0.8]), np.array([-1.0, -2.0, 0.5])
  s = np.exp(np.log(ratio).mean())
  chosen = objective.Objective(ratio="sequence_token", surrogate=objective.Clip(0.1, 0.1))
  loss, gradient, _ = _losses(np.log(ratio), advantage, chosen)
  np.testing.assert_allclose(loss, -s * advantage, rtol=1e-5)
  np.testing.assert_allclose(gradient, -s * advantage, rtol=1e-5)
  whole = dataclasses.replace(chosen, ratio="sequence")
  _, gradient, _ = _losses(np.log(ratio), advantage, whole)
  np.testing.assert_allclose(gradient, -s * advantage.mean(), rtol=1e-5)


def test_at_ratio_1_every_surrogate_has_the_same_gradient():
  """-A by the log-prob; a sequence's ratio spreads the mean of A over its tokens."""
  advantage = np.array([2.0, -3.0, 0.5])
  for surrogate in (
    objective.Clip(),
    objective.Clip(dual=3.0),
    objective.Cispo(),
    objective.Sapo(),
  ):
    chosen = objective.Objective(surrogate=surrogate)
    np.testing.assert_allclose(_losses([0] * 3, advantage, chosen)[1], -advantage, rtol=1e-5)
  for ratio, factor in (("sequence_token", 1), ("sequence", 1 / 3), ("product", 1)):
    chosen = objective.Objective(ratio=ratio)
    wanted = -advantage if ratio == "sequence_token" else np.full(3, -advantage.sum() * factor)
    np.testing.assert_allclose(_losses([0] * 3, advantage, chosen)[1], wanted, rtol=1e-5)


def test_kl_pulls_to_the_reference():
  """A = 0: only the KL is left. p above the reference must come down, below it must come up."""
  chosen = objective.Objective(kl=objective.Kl(0.5))
  reference = np.array([-0.7, 0.7])
  loss, gradient, metrics = _losses([0, 0], [0, 0], chosen, reference)
  k3 = np.exp(reference) - reference - 1
  np.testing.assert_allclose(gradient, 0.5 * (1 - np.exp(reference)), rtol=1e-5)
  np.testing.assert_allclose(loss, 0.5 * k3, rtol=1e-5)
  np.testing.assert_allclose(metrics["kl"], k3, rtol=1e-5)
  np.testing.assert_array_equal(metrics["surrogate"], 0)
  measured = dataclasses.replace(chosen, kl=objective.Kl(0.0))
  loss, gradient, metrics = _losses([0, 0], [0, 0], measured, reference)
  assert not loss.any() and not gradient.any()
  np.testing.assert_allclose(metrics["kl"], k3, rtol=1e-5)


FAR = {
  **{
    f"{estimator}, weighted {weighted}": {"kl": objective.Kl(0.1, estimator, weighted)}
    for estimator in ("k1", "k2", "k3")
    for weighted in (False, True)
  },
  "dual": {"surrogate": objective.Clip(dual=3.0)},
  "cispo": {"surrogate": objective.Cispo()},
  "sapo": {"surrogate": objective.Sapo()},
  **{ratio: {"ratio": ratio} for ratio in ("sequence", "sequence_token", "product")},
}


@pytest.mark.parametrize("name", FAR)
def test_far_apart_policies_stay_finite(name):
  """+-30 nats between any two of the three policies; +-90 overflows float32 if not guarded."""
  chosen = objective.Objective(**{"kl": objective.Kl(0.1), **FAR[name]})
  for far in (30.0, 90.0):
    grid = [(r, a, k) for r in (-far, 0, far) for a in (-1, 1) for k in (-far, 0, far)]
    ratios, advantages, references = zip(*grid)
    loss, gradient, metrics = _losses(ratios, advantages, chosen, references)
    for values in (loss, gradient, *metrics.values()):
      assert np.isfinite(values).all()
  assert jnp.isinf(jnp.exp(90.0))


def test_30_nats_are_exact():
  """The guard against overflow must not touch them: A < 0 and r = e^30 is not clipped by PPO."""
  loss, gradient, _ = _losses([30.0, -30.0], [-1.0, 1.0], objective.Objective())
  np.testing.assert_allclose(loss, [np.exp(30.0), -np.exp(-30.0)], rtol=1e-5)
  np.testing.assert_allclose(gradient, [np.exp(30.0), -np.exp(-30.0)], rtol=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_nothing_outside_the_mask_is_read(junk):
  chosen = objective.Objective(kl=objective.Kl(0.1, importance_weighted=True))
  clean = _losses([0.1, 0.0], [1.0, 0.0], chosen, [0.2, 0.0], [1, 0])
  dirty = _losses([0.1, junk], [1.0, junk], chosen, [0.2, junk], [1, 0])
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
    np.testing.assert_array_equal(a, b)
    assert b[1] == 0
  in_mask = _losses([0.1, np.nan], [1.0, 1.0], chosen, [0.2, 0.0], [1, 1])
  assert np.isnan(in_mask[0][1])  # what IS trained must not be hushed up


def test_a_kl_without_reference_is_an_error():
  with pytest.raises(ValueError, match=r"reference_logprobs: objective\.kl needs them, found None"):
    _losses([0.0], [1.0], objective.grpo())


def test_shapes_and_types_are_checked():
  row, ids = np.zeros((1, 3), np.float32), np.zeros((1, 3), np.int32)
  with pytest.raises(AssertionError):
    policy.policy_loss(row, row, row[0], row, ids, objective=objective.Objective())
  with pytest.raises(AssertionError):
    half = row.astype(jnp.bfloat16)
    policy.policy_loss(half, row, row, row, ids, objective=objective.Objective())
