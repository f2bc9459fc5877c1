"""Preference losses against the papers in float64, at extremes, and option by option.

Run as a module it prints the largest differences that docs/objectives.md lists.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import preference_objective as objectives
from pt_jax.losses.preference import Completions, pair_loss, unpaired_loss
from pt_jax.losses.preference_objective import (
  LOSSES,
  READ_BY,
  UNPAIRED,
  DynamicBeta,
  PreferenceObjective,
)
from tests.losses import paper_preference as paper

# Log-ratios of six pairs, in nats; far from every kink.
CHOSEN = np.array([0.7, -1.3, 2.4, -4.0, 30.0, -30.0])
REJECTED = np.array([-0.4, 0.9, 2.0, -7.0, -31.0, 33.0])
LENGTHS = np.array([[5, 1, 9, 3, 10, 4], [7, 10, 1, 3, 2, 6]])
LOGPROBS = np.array([[-9.5, -0.25, -20, -2, -33, -4], [-12, -18, -0.5, -8, -1, -45]])
LABELS = np.array([1, 0, 1, 0, 1, 0])
B = 0.3

# Objective, the paper's function of the two scores, and what the scores are.
RATIOS, RATIOS_PER_TOKEN, LOGPROBS_PER_TOKEN, SUMS = "ratio", "ratio/token", "logprob/token", "sum"
PAIRS = {
  "dpo": (objectives.dpo(B), paper.dpo, RATIOS),
  "cdpo": (objectives.cdpo(0.2, B), functools.partial(paper.dpo, smoothing=0.2), RATIOS),
  "rdpo": (objectives.rdpo(0.2, B), functools.partial(paper.rdpo, smoothing=0.2), RATIOS),
  "hinge": (objectives.hinge(B), paper.hinge, RATIOS),
  "ipo": (objectives.ipo(B), paper.ipo, RATIOS),
  "ipo_mean": (objectives.ipo_mean(B), paper.ipo, RATIOS_PER_TOKEN),
  "dpo_normalized": (objectives.dpo_normalized(B), paper.dpo, RATIOS_PER_TOKEN),
  "trajectory_dpo": (objectives.trajectory_dpo(B), paper.dpo, RATIOS_PER_TOKEN),
  "exo": (objectives.exo(B, 0.1), functools.partial(paper.exo, smoothing=0.1), RATIOS),
  "discopop": (objectives.discopop(B, 0.3), functools.partial(paper.discopop, tau=0.3), RATIOS),
  "nca": (objectives.nca(B), paper.nca, RATIOS),
  "bco_pair": (objectives.bco_pair(B), functools.partial(paper.bco, shift=0.4), RATIOS),
  "sppo": (objectives.sppo(B), paper.sppo, RATIOS),
  "apo_zero": (objectives.apo_zero(B), paper.apo_zero, RATIOS),
  "apo_down": (objectives.apo_down(B), paper.apo_down, RATIOS),
  "simpo": (objectives.simpo(B, 0.4), functools.partial(paper.dpo, gamma=0.4), LOGPROBS_PER_TOKEN),
  "cpo": (objectives.cpo(B, 0.7), paper.dpo, SUMS),
  "orpo": (objectives.orpo(B, 0.7), paper.odds_ratio, LOGPROBS_PER_TOKEN),
  "rpo": (objectives.rpo(B, 0.7), paper.dpo, RATIOS),
  "beta_dpo": (
    objectives.beta_dpo(B),
    functools.partial(paper.beta_dpo, alpha=0.6, mean_margin=0.25, minimum=1e-3),
    RATIOS,
  ),
  "epsilon_dpo": (
    objectives.epsilon_dpo(0.5, B),
    functools.partial(paper.epsilon_dpo, limit=0.5),
    RATIOS,
  ),
  "wpo": (objectives.wpo(B), paper.dpo, RATIOS),
}
SINGLES = {
  "kto": (objectives.kto(B, 1.5, 0.8), paper.kto),
  "bco": (objectives.bco(B), paper.bco_single),
  "apo_zero_unpaired": (PreferenceObjective("apo_zero_unpaired", B), paper.kto),
}


def _paper_pair(name, i) -> tuple[float, float, float]:
  """Loss and derivatives by the two summed log-probs of pair i, in float64."""
  objective, function, scores = PAIRS[name]
  sums = (CHOSEN[i], REJECTED[i]) if "ratio" in scores else LOGPROBS[:, i]
  lengths = LENGTHS[:, i] if "token" in scores else (1, 1)
  loss, by_c, by_j = function(sums[0] / lengths[0], sums[1] / lengths[1], B)
  by_c, by_j = by_c / lengths[0], by_j / lengths[1]
  if name == "wpo":
    weight = np.exp((LOGPROBS[:, i] / LENGTHS[:, i]).sum())
    loss, by_c, by_j = loss * weight, by_c * weight, by_j * weight
  loss += objective.sft * -LOGPROBS[0, i] / LENGTHS[0, i]
  return loss, by_c - objective.sft / LENGTHS[0, i], by_j


def _sides(logprobs=LOGPROBS, ratios=(CHOSEN, REJECTED), lengths=LENGTHS):
  return [
    Completions(*(jnp.asarray(x, jnp.float32) for x in (lp, n, np.asarray(lp) - np.asarray(r))))
    for lp, r, n in zip(logprobs, ratios, lengths)
  ]


def _run_pairs(chosen, rejected, objective, **given):
  """Losses, metrics, and gradients by the two summed log-probs, [2, N]."""

  def total(both):
    sides = [side.replace(logprobs=x) for side, x in zip((chosen, rejected), both)]
    losses, metrics = pair_loss(*sides, objective=objective, **given)
    return losses.sum(), (losses, metrics)

  gradient, out = jax.grad(total, has_aux=True)((chosen.logprobs, rejected.logprobs))
  return *out, jnp.stack(gradient)


def _run_singles(completions, labels, objective, baseline):
  def total(lp):
    side = completions.replace(logprobs=lp)
    losses, metrics = unpaired_loss(side, labels, objective=objective, baseline=baseline)
    return losses.sum(), (losses, metrics)

  gradient, out = jax.grad(total, has_aux=True)(completions.logprobs)
  return *out, gradient


GIVEN = {"beta_dpo": {"mean_margin": 0.25}, "bco_pair": {"reward_shift": 0.4}}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_equal_the_paper(name):
  losses, _, gradient = _run_pairs(*_sides(), PAIRS[name][0], **GIVEN.get(name, {}))
  wanted = np.array([_paper_pair(name, i) for i in range(len(CHOSEN))]).T
  np.testing.assert_allclose(losses, wanted[0], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(gradient, wanted[1:], rtol=1e-5, atol=3e-7)


def _paper_single(name, i, c) -> tuple[float, float]:
  if name == "kto":
    return paper.kto(c, LABELS[i], B, 2.0, 1.5 if LABELS[i] else 0.8)
  if name == "bco":
    return paper.bco_single(c, LABELS[i], B, 2.0, 1.0)
  return paper.kto(c, LABELS[i], B, 0.0, 1.0)


@pytest.mark.parametrize("name", SINGLES)
def test_singles_equal_the_paper(name):
  losses, metrics, gradient = _run_singles(
    _sides()[0], jnp.float32(LABELS), SINGLES[name][0], jnp.float32(2.0)
  )
  wanted = np.array([_paper_single(name, i, c) for i, c in enumerate(CHOSEN)]).T
  np.testing.assert_allclose(losses, wanted[0], rtol=1e-5)
  np.testing.assert_allclose(gradient, wanted[1], rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(metrics["reward"], B * CHOSEN, rtol=1e-5)
  lead = B * CHOSEN - {"kto": 2 * B, "bco": 2.0}.get(name, 0.0)
  np.testing.assert_array_equal(metrics["accuracy"], (lead > 0) == LABELS)


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("beta_dpo", "wpo")])
def test_the_hand_gradients_are_those_of_the_paper_losses(name):
  """Central differences in float64. beta_dpo and wpo hold a factor constant on purpose."""
  step, at = 1e-5, 1  # the second pair is small in every score
  _, function, scores = PAIRS[name]
  c, j = (-0.4, -1.9) if scores == LOGPROBS_PER_TOKEN else (CHOSEN[at], REJECTED[at])
  _, by_c, by_j = function(c, j, B)
  numeric = [
    (function(c + step, j, B)[0] - function(c - step, j, B)[0]) / (2 * step),
    (function(c, j + step, B)[0] - function(c, j - step, B)[0]) / (2 * step),
  ]
  np.testing.assert_allclose([by_c, by_j], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SINGLES)
def test_the_hand_gradients_of_singles(name):
  step = 1e-5
  for i, c in enumerate((0.7, -1.3)):
    numeric = (_paper_single(name, i, c + step)[0] - _paper_single(name, i, c - step)[0]) / 2e-5
    np.testing.assert_allclose(_paper_single(name, i, c)[1], numeric, rtol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_extremes_are_finite(name):
  """Log-ratios of +-30 to +-3000 nats, lengths 0 and 1, probabilities of 0 and of 1."""
  ratios = np.array([0, 30, -30, 300, -300, 3000, -3000, 30], float)
  logprobs = np.array([0.0, 0, -1e-8, -1e-3, -4000, -1, 0, -30])
  lengths = np.array([0, 1, 1, 0, 7, 1, 900, 1])
  sides = [
    _sides([logprobs], [ratios], [lengths])[0],
    _sides([logprobs[::-1]], [-ratios], [lengths[::-1]])[0],
  ]
  for chosen, rejected in (sides, sides[::-1], (sides[0], sides[0])):
    losses, metrics, gradient = _run_pairs(chosen, rejected, PAIRS[name][0])
    for values in (losses, gradient, *metrics.values()):
      assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SINGLES)
def test_single_extremes_are_finite(name):
  side = _sides([[0.0, -5, -90, -90]], [[30, -30, 3000, -3000]], [[0, 1, 3, 3]])[0]
  for label in (0.0, 1.0):
    losses, metrics, gradient = _run_singles(side, jnp.full(4, label), SINGLES[name][0], 50.0)
    for values in (losses, gradient, *metrics.values()):
      assert np.isfinite(values).all()


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("apo_down", "ipo", "ipo_mean")])
def test_the_chosen_goes_up_and_the_rejected_down(name):
  """At small scores. IPO and SPPO aim at a margin, so they turn beyond it; apo_down lowers both."""
  sides = _sides([[-4.0], [-6.0]], [[0.1], [-0.2]], [[4], [5]])
  _, _, gradient = _run_pairs(*sides, PAIRS[name][0])
  assert gradient[0, 0] < 0 < gradient[1, 0]


def test_apo_down_lowers_both():
  """Where the chosen already leads: close to even, raising it is part of the contrast."""
  _, _, gradient = _run_pairs(
    *_sides([[-4.0], [-6.0]], [[1.0], [-9.0]], [[4], [5]]), PAIRS["apo_down"][0]
  )
  assert gradient.min() > 0


@pytest.mark.parametrize("name", ["ipo", "ipo_mean"])
def test_ipo_turns_at_its_margin(name):
  target = 1 / (2 * B)
  for margin, sign in ((target - 0.1, -1), (target + 0.1, 1)):
    sides = _sides([[-4.0], [-4.0]], [[margin], [0]], [[1], [1]])
    _, _, gradient = _run_pairs(*sides, PAIRS[name][0])
    np.testing.assert_array_equal(np.sign(gradient[:, 0]), [sign, -sign])


def test_beyond_epsilon_nothing_pulls():
  for margin, pulls in ((0.49, True), (0.51, False), (20.0, False)):
    sides = _sides([[-4.0], [-4.0]], [[margin / B], [0]], [[4], [5]])
    losses, metrics, gradient = _run_pairs(*sides, PAIRS["epsilon_dpo"][0])
    assert (np.asarray(gradient) != 0).all() if pulls else not np.asarray(gradient).any()
    assert metrics["beyond_limit"][0] == (not pulls)
    wanted = -paper.log_sigma(min(margin, 0.5))
    np.testing.assert_allclose(losses[0], wanted, rtol=1e-5)


def test_weights_and_states_have_no_gradient():
  """beta_i, the confidence, the baseline and the shift are constants to the gradient."""
  chosen, rejected = _sides()
  run = lambda x, name, key: pair_loss(chosen, rejected, objective=PAIRS[name][0], **{key: x})[
    0
  ].sum()
  assert jax.grad(run)(0.3, "beta_dpo", "mean_margin") == 0
  assert jax.grad(run)(0.3, "bco_pair", "reward_shift") == 0
  single = lambda x, name: unpaired_loss(
    chosen, jnp.float32(LABELS), objective=SINGLES[name][0], baseline=x
  )[0].sum()
  for name in ("kto", "bco"):
    assert jax.grad(single)(0.3, name) == 0
    assert abs(single(0.3, name) - single(3.0, name)) > 0.01
  aligned = lambda x: pair_loss(
    chosen.replace(expected_logprobs=x), rejected, objective=objectives.wpo(B)
  )[0].sum()
  assert not jax.grad(aligned)(chosen.logprobs / 2).any()
  assert aligned(chosen.logprobs / 2) > aligned(chosen.logprobs / 4) + 0.01


def test_the_elements_do_not_see_each_other_and_any_rank_will_do():
  """[2, 3] equals [6]; another fifth pair leaves the others bitwise unchanged."""
  for name, (objective, _, _) in PAIRS.items():
    chosen, rejected = _sides()
    losses, metrics, gradient = _run_pairs(chosen, rejected, objective)
    square = lambda tree: jax.tree.map(lambda x: x.reshape(2, 3), tree)
    folded, _, folded_gradient = _run_pairs(square(chosen), square(rejected), objective)
    np.testing.assert_allclose(folded.ravel(), losses, rtol=1e-6)
    np.testing.assert_allclose(folded_gradient.reshape(2, 6), gradient, rtol=1e-6)
    assert all(v.shape == losses.shape for v in metrics.values()), name
    moved = chosen.replace(logprobs=chosen.logprobs.at[4].add(-5.0))
    others = np.arange(6) != 4
    changed, _, _ = _run_pairs(moved, rejected, objective)
    np.testing.assert_array_equal(np.asarray(changed)[others], np.asarray(losses)[others])


def test_metrics():
  chosen, rejected = _sides()
  _, metrics, _ = _run_pairs(chosen, rejected, objectives.rpo(B))
  assert set(metrics) == {
    *("chosen_reward", "rejected_reward", "margin", "accuracy", "sft"),
    *("chosen_logprob_change", "rejected_logprob_change"),
  }
  np.testing.assert_allclose(metrics["chosen_reward"], B * CHOSEN, rtol=1e-5)
  np.testing.assert_allclose(metrics["rejected_reward"], B * REJECTED, rtol=1e-5)
  np.testing.assert_allclose(metrics["margin"], B * (CHOSEN - REJECTED), rtol=1e-5)
  np.testing.assert_array_equal(metrics["accuracy"], CHOSEN > REJECTED)
  np.testing.assert_allclose(metrics["chosen_logprob_change"], CHOSEN, rtol=1e-5)
  np.testing.assert_allclose(metrics["rejected_logprob_change"], REJECTED, rtol=1e-5)
  np.testing.assert_allclose(metrics["sft"], -LOGPROBS[0] / LENGTHS[0], rtol=1e-6)
  free = [side.replace(reference_logprobs=None) for side in (chosen, rejected)]
  _, metrics, _ = _run_pairs(*free, objectives.simpo(B))
  assert set(metrics) == {"chosen_reward", "rejected_reward", "margin", "accuracy"}
  np.testing.assert_allclose(metrics["chosen_reward"], B * LOGPROBS[0] / LENGTHS[0], rtol=1e-6)


def test_a_draw_is_not_accurate_and_pulls():
  """Equal completions: the loss is log 2 and the gradient half of beta."""
  side = _sides()[0]
  losses, metrics, gradient = _run_pairs(side, side, objectives.dpo(B))
  np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [[-B / 2] * 6, [B / 2] * 6], rtol=1e-6)
  assert not metrics["accuracy"].any()


# Field -> the objective it is changed in, another value.
OTHERS = {
  "loss": (objectives.dpo(B), "hinge"),
  "beta": (objectives.dpo(B), 0.1),
  "reference": (objectives.dpo(B), False),
  "length_normalized": (objectives.dpo(B), True),
  "label_smoothing": (objectives.dpo(B), 0.1),
  "gamma": (objectives.dpo(B), 0.1),
  "margin_limit": (objectives.dpo(B), 0.2),
  "dynamic_beta": (objectives.dpo(B), DynamicBeta()),
  "tau": (objectives.discopop(B), 0.1),
  "sft": (objectives.dpo(B), 0.1),
  "confidence_weighted": (objectives.dpo(B), True),
  "desirable_weight": (objectives.kto(B), 2.0),
  "undesirable_weight": (objectives.kto(B), 2.0),
}
DYNAMIC = {"alpha": DynamicBeta(alpha=0.2), "minimum": DynamicBeta(minimum=0.25)}


def _behaviour(objective: PreferenceObjective) -> np.ndarray:
  if objective.unpaired:
    losses, _, gradient = _run_singles(_sides()[0], jnp.float32(LABELS), objective, 0.5)
  else:
    losses, _, gradient = _run_pairs(*_sides(), objective, mean_margin=0.1, reward_shift=0.1)
  return np.concatenate([losses, np.ravel(gradient)])


def test_every_field_is_listed():
  assert {f.name for f in dataclasses.fields(PreferenceObjective)} == set(OTHERS)
  assert {f.name for f in dataclasses.fields(DynamicBeta)} == set(DYNAMIC)
  assert set(READ_BY) <= set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_is_read(name):
  base, other = OTHERS[name]
  changed = _behaviour(dataclasses.replace(base, **{name: other}))
  assert not np.allclose(_behaviour(base), changed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_every_field_of_dynamic_beta_is_read(name):
  chosen = dataclasses.replace(objectives.beta_dpo(B), dynamic_beta=DYNAMIC[name])
  assert not np.allclose(_behaviour(objectives.beta_dpo(B)), _behaviour(chosen), rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_reads_what_it_is_said_to(loss):
  """Each option that READ_BY allows changes the loss; each other one is refused."""
  least = {"label_smoothing": 0.01} if loss == "exo_pair" else {}
  base = PreferenceObjective(loss=loss, beta=B, **least)
  for name in READ_BY:
    other = OTHERS[name][1]
    if loss in READ_BY[name]:
      changed = _behaviour(dataclasses.replace(base, **{name: other}))
      assert not np.allclose(_behaviour(base), changed, rtol=1e-4, atol=1e-6), name
    else:
      with pytest.raises(ValueError, match=f"{name}: '{loss}' does not read it"):
        PreferenceObjective(loss=loss, **least | {name: other})


def test_presets_are_what_the_table_says():
  """Field by field what each changes in plain DPO."""
  differs = lambda chosen: {
    f.name: getattr(chosen, f.name)
    for f in dataclasses.fields(chosen)
    if getattr(chosen, f.name) != getattr(PreferenceObjective(), f.name)
  }
  assert differs(objectives.dpo()) == {}
  assert differs(objectives.cdpo(0.1)) == {"label_smoothing": 0.1}
  assert differs(objectives.rdpo(0.1)) == {"loss": "robust", "label_smoothing": 0.1}
  assert differs(objectives.ipo()) == {"loss": "ipo"}
  assert differs(objectives.ipo_mean()) == {"loss": "ipo", "length_normalized": True}
  assert differs(objectives.trajectory_dpo()) == {"length_normalized": True}
  assert differs(objectives.simpo()) == {
    "beta": 2.0, "reference": False, "length_normalized": True, "gamma": 1.0
  }  # fmt: skip
  assert differs(objectives.cpo()) == {"reference": False, "sft": 1.0}
  assert differs(objectives.orpo()) == {
    "loss": "odds_ratio", "reference": False, "length_normalized": True, "sft": 1.0
  }  # fmt: skip
  assert differs(objectives.rpo()) == {"sft": 1.0}
  assert differs(objectives.kto()) == {"loss": "kto"} and objectives.kto().unpaired
  assert differs(objectives.epsilon_dpo(2.0)) == {"margin_limit": 2.0}
  assert differs(objectives.beta_dpo()) == {"dynamic_beta": DynamicBeta(0.6)}
  assert differs(objectives.wpo()) == {"confidence_weighted": True}
  presets = [
    f for _, f in inspect.getmembers(objectives, inspect.isfunction) if f.__name__[0] != "_"
  ]
  presets = [f for f in presets if f.__module__ == objectives.__name__]
  assert all(inspect.getdoc(preset) for preset in presets) and len(presets) == 24
  assert len({objectives.dpo(), objectives.dpo(), objectives.rpo()}) == 2  # static arguments


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: PreferenceObjective("bt"), "loss: expected one of sigmoid, .*kto.*, found 'bt'"),
    (lambda: objectives.dpo(0.0), "beta: expected a number > 0, found 0.0"),
    (lambda: objectives.cdpo(0.5), r"label_smoothing: expected a number in \[0, 0.5\), found 0.5"),
    (lambda: objectives.exo(0.1, 0), r"label_smoothing: expected a number in \(0, 0.5\), found 0"),
    (lambda: objectives.simpo(gamma=-1), "gamma: expected a number >= 0, found -1"),
    (lambda: objectives.epsilon_dpo(0), "margin_limit: expected None or a number > 0, found 0"),
    (lambda: objectives.discopop(tau=1.0), r"tau: expected a number in \(0, 1\), found 1.0"),
    (lambda: objectives.rpo(sft=-1), "sft: expected a number >= 0, found -1"),
    (lambda: objectives.kto(0.1, -1), "desirable_weight: expected a number >= 0, found -1"),
    (lambda: objectives.kto(0.1, 1, -1), "undesirable_weight: expected a number >= 0, found -1"),
    (lambda: DynamicBeta(0), "dynamic_beta.alpha: expected a number > 0, found 0"),
    (lambda: DynamicBeta(minimum=0), "dynamic_beta.minimum: expected a number > 0, found 0"),
    (
      lambda: dataclasses.replace(objectives.kto(), reference=False),
      "reference: 'kto' needs one, found False",
    ),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_bad_arguments_are_named():
  chosen, rejected = _sides()
  labels = jnp.float32(LABELS)
  with pytest.raises(ValueError, match="loss: expected one of pairs, found 'kto'"):
    pair_loss(chosen, rejected, objective=objectives.kto())
  with pytest.raises(ValueError, match="loss: expected one of single completions, found 'sigmoid'"):
    unpaired_loss(chosen, labels, objective=objectives.dpo())
  bare = chosen.replace(reference_logprobs=None)
  with pytest.raises(ValueError, match="reference_logprobs: the objective needs a"):
    pair_loss(bare, rejected, objective=objectives.dpo())
  with pytest.raises(ValueError, match="reference_logprobs: the objective needs a"):
    unpaired_loss(bare, labels, objective=objectives.kto())
  with pytest.raises(AssertionError):
    pair_loss(
      chosen,
      _sides(LOGPROBS[:, :5], (CHOSEN[:5], REJECTED[:5]), LENGTHS[:, :5])[1],
      objective=objectives.dpo(),
    )
  assert set(SINGLES) == set(UNPAIRED)


def measured() -> dict[str, tuple[float, float]]:
  """Name -> largest difference of losses and gradients, relative to the largest of the case."""
  apart = lambda got, wanted: float(np.abs(got - wanted).max() / np.abs(wanted).max())
  found = {}
  for name, (objective, _, _) in PAIRS.items():
    losses, _, gradient = _run_pairs(*_sides(), objective, **GIVEN.get(name, {}))
    wanted = np.array([_paper_pair(name, i) for i in range(len(CHOSEN))]).T
    found[name] = (apart(losses, wanted[0]), apart(gradient, wanted[1:]))
  for name, (objective, _) in SINGLES.items():
    losses, _, gradient = _run_singles(_sides()[0], jnp.float32(LABELS), objective, 2.0)
    wanted = np.array([_paper_single(name, i, c) for i, c in enumerate(CHOSEN)]).T
    found[name] = (apart(losses, wanted[0]), apart(gradient, wanted[1]))
  return found


if __name__ == "__main__":
  for name, (loss, gradient) in measured().items():
    print(f"{name:24s} loss {loss:.1e} gradient {gradient:.1e}")
