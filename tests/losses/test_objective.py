import dataclasses
import inspect

import numpy as np
import pytest

from pt_jax.losses import credit, kl, objective, options
from pt_jax.losses.objective import (
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
  Objective,
  Overlong,
  Process,
  Returns,
  Sapo,
)
from pt_jax.losses.options import KlController
from tests.losses import layouts

BASE = Objective(
  kl=Kl(0.3), reduction="segment_mean", overlong=Overlong(max_length=8, buffer=4, weight=0.5)
)


def _base(**changes) -> Objective:
  return dataclasses.replace(BASE, **changes)


REWARD_KL = _base(kl=Kl(0.3, "k1", where="reward"))
# An options class and a field of it -> the objective it starts from, another value.
OTHERS = {
  (Objective, "advantage"): (BASE, LeaveOneOut()),
  (Objective, "process"): (BASE, Process()),
  (Objective, "ratio"): (BASE, "sequence"),
  (Objective, "surrogate"): (BASE, Sapo()),
  (Objective, "kl"): (BASE, None),
  (Objective, "entropy"): (BASE, 0.1),
  (Objective, "positive_nll"): None,  # a term of the step: tests/steps/test_critic.py
  (Objective, "correction"): (BASE, Correction()),
  (Objective, "reduction"): (BASE, "token_mean"),
  (Objective, "constant_length"): (_base(reduction="constant", constant_length=8), 9),
  (Objective, "filters"): (BASE, Filters(zero_variance=True)),
  (Objective, "overlong"): (BASE, None),
  (GroupRelative, "scale"): (BASE, "none"),
  (GroupRelative, "epsilon"): (BASE, 0.1),
  (GroupRelative, "ddof"): (BASE, 0),
  (Returns, "gamma"): (_base(advantage=Returns()), 0.9),
  (Returns, "baseline"): (_base(advantage=Returns()), True),
  (Returns, "whiten"): (_base(advantage=Returns()), False),
  (Gae, "gamma"): (_base(advantage=Gae()), 0.9),
  (Gae, "lam"): (_base(advantage=Gae()), 0.5),
  (Gae, "critic_lam"): (_base(advantage=Gae()), 1.0),
  (Gae, "adaptive"): (_base(advantage=Gae()), 0.5),
  (Gae, "whiten"): (_base(advantage=Gae()), False),
  (MonteCarlo, "rollouts"): None,  # read by the loop, which samples: tests/loops/test_algorithms.py
  (Process, "weight"): (_base(process=Process()), 0.5),
  (Process, "outcome_weight"): (_base(process=Process()), 0.5),
  (Clip, "low"): (BASE, 0.1),
  (Clip, "high"): (BASE, 0.1),
  (Clip, "dual"): (BASE, 1.25),
  (Cispo, "low"): (_base(surrogate=Cispo()), 0.9),
  (Cispo, "high"): (_base(surrogate=Cispo()), 1.1),
  (Sapo, "positive"): (_base(surrogate=Sapo()), 2.0),
  (Sapo, "negative"): (_base(surrogate=Sapo()), 2.0),
  (Kl, "coefficient"): (BASE, 0.2),
  (Kl, "estimator"): (BASE, "exact"),
  (Kl, "importance_weighted"): (BASE, True),
  (Kl, "where"): (BASE, "reward"),
  (Kl, "controller"): (BASE, KlController(0.1)),
  (KlController, "target"): (_base(kl=Kl(controller=KlController(0.1))), 1.0),
  (KlController, "rule"): (_base(kl=Kl(controller=KlController(0.1))), "threshold"),
  (KlController, "gain"): (_base(kl=Kl(controller=KlController(0.1))), 0.2),
  (Correction, "level"): (_base(correction=Correction(high=1.2)), "sequence"),
  (Correction, "mode"): (_base(correction=Correction(high=1.2)), "mask"),
  (Correction, "low"): (_base(correction=Correction(high=1.2)), 0.9),
  (Correction, "high"): (_base(correction=Correction(high=1.2)), 1.1),
  (Filters, "zero_variance"): (BASE, True),
  (Filters, "truncated"): (BASE, True),
  (Overlong, "max_length"): (BASE, 9),
  (Overlong, "buffer"): (BASE, 3),
  (Overlong, "weight"): (BASE, 1.0),
}
CLASSES = [
  value
  for value in vars(options).values()
  if dataclasses.is_dataclass(value) and isinstance(value, type)
]


def _changed(value, kind: type, field: str, other):
  """`value` with a field of the options of this class, wherever they are in it, replaced."""
  if isinstance(value, kind):
    return dataclasses.replace(value, **{field: other})
  inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  replaced = {
    name: _changed(option, kind, field, other)
    for name, option in inner.items()
    if dataclasses.is_dataclass(option)
  }
  return dataclasses.replace(value, **replaced)


def _episodes(made) -> credit.Episodes:
  """Six completions with everything that an objective may want to know of them."""
  rng = np.random.default_rng(7)
  width = max(len(sample["mask"]) for sample in made)
  places = np.arange(width)
  drawn = lambda p, c: (places >= p) & (places < p + c)
  mask = np.array([drawn(*pair) for pair in zip(layouts.PROMPTS, layouts.COMPLETIONS)])
  ends = mask & ((places % 3 == 2) | (places == mask.cumsum(1).argmax(1)[:, None]))
  noise = lambda: rng.normal(size=mask.shape)
  return credit.Episodes(
    rewards=np.array([1.0, 0, 0.5, 1, 0, 0.2]),
    truncated=np.arange(6) == 1,
    groups=np.array([0, 0, 0, 1, 1, 1]),
    mask=mask,
    right=np.array([1, 0, 0, 1, 0, 0], bool),
    kl=noise(),
    values=noise(),
    greedy=rng.normal(size=6),
    step_ends=ends,
    step_rewards=noise(),
    step_values=noise(),
    prompt_values=rng.normal(size=6),
  )


def _behaviour(chosen: Objective) -> np.ndarray:
  """All that an objective decides on six fixed samples: groups, credit, loss, gradients."""
  made = layouts.samples()
  episodes = _episodes(made)
  same = np.where(episodes.groups == 1, 1.0, episodes.rewards)
  kept = credit.kept_groups(same, episodes.groups, objective=chosen)
  given = credit.assign_credit(episodes, objective=chosen)
  for i, sample in enumerate(made):
    sample["advantages"] = given.advantages[i, : len(sample["mask"])]
    sample["mask"] = sample["mask"] * given.trained[i]
  batch = layouts.lay_out(made, layouts.PACKED, 12)
  value, gradient = layouts.value_and_gradient(batch, chosen)
  controller = chosen.kl.controller if chosen.kl else None
  coefficient = kl.adapted(0.3, 0.11, controller) if controller else 0.3
  parts = (kept, given.advantages, given.returns, [value, coefficient], gradient)
  return np.concatenate([np.ravel(x).astype(np.float64) for x in parts])


def test_every_field_is_listed():
  fields = {(kind, f.name) for kind in (Objective, *CLASSES) for f in dataclasses.fields(kind)}
  assert fields == set(OTHERS)


@pytest.mark.parametrize("kind, field", [place for place, case in OTHERS.items() if case])
def test_every_field_is_read(kind, field):
  base, other = OTHERS[kind, field]
  before, after = _behaviour(base), _behaviour(_changed(base, kind, field, other))
  assert np.abs(before - after).max() > 1e-4 * np.abs(before).max()


def test_presets_are_what_the_papers_say():
  """Field by field what each changes in the plain objective."""
  differs = lambda chosen: {
    f.name: getattr(chosen, f.name)
    for f in dataclasses.fields(chosen)
    if getattr(chosen, f.name) != getattr(Objective(), f.name)
  }
  assert Objective().surrogate == Clip(0.2, 0.2, None) and Objective().kl is None
  assert Objective().advantage == GroupRelative("group", 1e-4, 1)
  assert differs(objective.grpo()) == {"kl": Kl(0.04, "k3"), "reduction": "segment_mean"}
  assert differs(objective.bnpo()) == {"kl": Kl(0.04, "k3")}
  assert differs(objective.dr_grpo(512)) == {
    "advantage": GroupRelative("none"),
    "reduction": "constant",
    "constant_length": 512,
  }
  assert differs(objective.dapo(20480, 4096)) == {
    "surrogate": Clip(0.2, 0.28),
    "filters": Filters(zero_variance=True),
    "overlong": Overlong(20480, 4096, 1.0),
  }
  reward_kl = lambda coefficient: Kl(coefficient, "k1", where="reward")
  assert differs(objective.ppo()) == {"advantage": Gae(1.0, 0.95), "kl": reward_kl(0.02)}
  assert differs(objective.vapo()) == {
    "advantage": Gae(1.0, critic_lam=1.0, adaptive=0.05),
    "surrogate": Clip(0.2, 0.28),
    "positive_nll": 0.1,
  }
  assert differs(objective.gspo()) == {
    "ratio": "sequence",
    "surrogate": Clip(3e-4, 4e-4),
    "reduction": "segment_mean",
  }
  assert differs(objective.cispo()) == {"surrogate": Cispo(0.0, 5.0)}
  assert differs(objective.sapo()) == {"surrogate": Sapo(1.0, 1.05), "reduction": "segment_mean"}
  completions = {"kl": reward_kl(0.05), "reduction": "segment_mean"}
  assert differs(objective.rloo()) == completions | {"advantage": LeaveOneOut(), "ratio": "product"}
  assert differs(objective.remax()) == completions | {"advantage": Greedy()}
  assert differs(objective.reinforce_plus_plus()) == {
    "advantage": Returns(1.0),
    "kl": reward_kl(0.01),
  }
  assert differs(objective.reinforce_plus_plus(baseline=True)) == {
    "advantage": Returns(1.0, baseline=True),
    "kl": Kl(0.01, "k2"),
  }
  assert differs(objective.vine_ppo(9)) == {"advantage": MonteCarlo(9), "kl": Kl(1e-4)}


def test_objectives_can_be_static_arguments():
  assert len({objective.grpo(), objective.grpo(), objective.bnpo()}) == 2
  assert len(CLASSES) == 15 and all(inspect.getdoc(option) for option in CLASSES)


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda: GroupRelative("std"),
      "advantage.scale: expected one of group, batch, none, found 'std'",
    ),
    (lambda: GroupRelative(epsilon=-1), "advantage.epsilon: expected a number >= 0, found -1"),
    (lambda: Clip(low=0), r"clip.low: expected a number in \(0, 1\], found 0"),
    (lambda: Clip(low=1.28), r"clip.low: expected a number in \(0, 1\], found 1.28"),
    (lambda: Clip(high=-0.2), "clip.high: expected a number > 0, found -0.2"),
    (lambda: Kl(-0.1), "kl.coefficient: expected a number >= 0, found -0.1"),
    (lambda: Kl(estimator="k4"), "kl.estimator: expected one of k1, k2, k3, exact, found 'k4'"),
    (lambda: Kl(where="loss", controller=KlController(-1)), "target: expected a number > 0, found"),
    (lambda: KlController(1, rule="x"), "rule: expected one of proportional, threshold, found 'x'"),
    (lambda: Kl(0.0, controller=KlController(1)), "kl.coefficient: expected a number > 0 to be"),
    (lambda: Kl(estimator="exact", where="reward"), "kl.estimator: expected k1, k2 or k3 in the"),
    (lambda: Kl(importance_weighted=True, where="reward"), "importance_weighted: expected False"),
    (lambda: Kl(where="x"), "kl.where: expected one of loss, reward, found 'x'"),
    (lambda: Clip(dual=1.1), "clip.dual: expected a number > 1 \\+ high = 1.2, found 1.1"),
    (lambda: KlController(1, "threshold", 0.2), "gain: expected the default: the threshold rule"),
    (lambda: Objective(advantage=MonteCarlo(), overlong=Overlong(8, 4)), "overlong: expected None"),
    (
      lambda: Objective(advantage=MonteCarlo(), kl=Kl(0.1, where="reward")),
      "kl.where: expected loss: values of steps have no KL",
    ),
    (lambda: Cispo(low=1.0), r"cispo.low: expected a number in \[0, 1\), found 1.0"),
    (lambda: Cispo(high=0.9), "cispo.high: expected a number > 1, found 0.9"),
    (lambda: Sapo(positive=0), "sapo.positive: expected a number > 0, found 0"),
    (lambda: GroupRelative(ddof=2), "advantage.ddof: expected 0 or 1, found 2"),
    (lambda: Gae(lam=1.1), r"advantage.lam: expected a number in \[0, 1\], found 1.1"),
    (lambda: Gae(gamma=0), r"advantage.gamma: expected a number in \(0, 1\], found 0"),
    (lambda: Gae(adaptive=0), "advantage.adaptive: expected a number > 0, found 0"),
    (lambda: Returns(gamma=2), r"advantage.gamma: expected a number in \(0, 1\], found 2"),
    (lambda: MonteCarlo(0), "advantage.rollouts: expected a number >= 1, found 0"),
    (lambda: Process(weight=0), "process.weight: expected a number > 0, found 0"),
    (lambda: Correction("x"), "correction.level: expected one of token, sequence, found 'x'"),
    (lambda: Correction(high=0.5), "correction.high: expected a number >= 1, found 0.5"),
    (lambda: Objective(ratio="x"), "ratio: expected one of token, sequence, sequence_token, prod"),
    (lambda: Objective(positive_nll=-1), "positive_nll: expected a number >= 0, found -1"),
    (
      lambda: Objective(advantage=MonteCarlo(), process=Process()),
      "process: expected None beside MonteCarlo's own steps",
    ),
    (lambda: Overlong(8, 9), "overlong.buffer: expected 1 to max_length = 8, found 9"),
    (lambda: objective.dapo(8, 0), "overlong.buffer: expected 1 to max_length = 8, found 0"),
    (lambda: Overlong(8, 4, 0.0), "overlong.weight: expected a number > 0, found 0.0"),
    (lambda: objective.dr_grpo(0), "constant_length: 'constant' needs a length >= 1, found 0"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
