import dataclasses
import inspect

import numpy as np
import pytest

from pt_jax.losses import credit, objective
from pt_jax.losses.objective import Advantage, Clip, Filters, Kl, Objective, Overlong
from tests.losses import layouts

BASE = Objective(
  kl=Kl(0.3), reduction="segment_mean", overlong=Overlong(max_length=8, buffer=4, weight=0.5)
)
CONSTANT = dataclasses.replace(BASE, reduction="constant", constant_length=8)
# Path of a field -> what it starts from, another value.
OTHERS = {
  "advantage.scale": (BASE, "none"),
  "advantage.epsilon": (BASE, 0.1),
  "clip.low": (BASE, 0.1),
  "clip.high": (BASE, 0.1),
  "kl.coefficient": (BASE, 0.2),
  "kl.estimator": (BASE, "k2"),
  "kl.importance_weighted": (BASE, True),
  "reduction": (BASE, "token_mean"),
  "constant_length": (CONSTANT, 9),
  "filters.zero_variance": (BASE, True),
  "filters.truncated": (BASE, True),
  "overlong.max_length": (BASE, 9),
  "overlong.buffer": (BASE, 3),
  "overlong.weight": (BASE, 1.0),
}


def _paths(value, prefix=""):
  for field in dataclasses.fields(value):
    inner = getattr(value, field.name)
    if dataclasses.is_dataclass(inner):
      yield from _paths(inner, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name


def _changed(value, path, other):
  head, _, rest = path.partition(".")
  if rest:
    other = _changed(getattr(value, head), rest, other)
  return dataclasses.replace(value, **{head: other})


def _behaviour(chosen: Objective) -> np.ndarray:
  """All that an objective decides on six fixed samples: groups, rewards, loss, gradients."""
  made = layouts.samples()
  rewards, groups = np.array([1.0, 0, 0.5, 1, 0, 0.2]), np.array([0, 0, 0, 1, 1, 1])
  kept = credit.kept_groups(np.where(groups == 1, 1.0, rewards), groups, objective=chosen)
  truncated = np.arange(6) == 1
  given = credit.assign_credit(
    rewards, np.array(layouts.COMPLETIONS), truncated, groups, objective=chosen
  )
  for sample, advantage, trained in zip(made, given.advantages, given.trained):
    sample["advantages"][:] = advantage
    sample["mask"] *= trained
  batch = layouts.lay_out(made, layouts.PACKED, 12)
  value, gradient = layouts.value_and_gradient(batch, chosen)
  return np.concatenate([kept, given.rewards, [value], gradient.ravel()])


def test_every_field_is_listed():
  assert set(_paths(CONSTANT)) == set(OTHERS)


@pytest.mark.parametrize("path", OTHERS)
def test_every_field_is_read(path):
  base, other = OTHERS[path]
  before, after = _behaviour(base), _behaviour(_changed(base, path, other))
  assert not np.allclose(before, after, rtol=1e-4)


def test_kl_and_overlong_may_be_absent():
  for path in ("kl", "overlong"):
    assert not np.allclose(_behaviour(BASE), _behaviour(_changed(BASE, path, None)), rtol=1e-4)


def test_presets_are_what_the_papers_say():
  """Field by field what each changes in the plain objective."""
  differs = lambda chosen: {
    f.name: getattr(chosen, f.name)
    for f in dataclasses.fields(chosen)
    if getattr(chosen, f.name) != getattr(Objective(), f.name)
  }
  assert Objective().clip == Clip(0.2, 0.2) and Objective().kl is None
  assert Objective().advantage == Advantage("group", 1e-4)
  assert differs(objective.grpo()) == {"kl": Kl(0.04, "k3"), "reduction": "segment_mean"}
  assert differs(objective.bnpo()) == {"kl": Kl(0.04, "k3")}
  assert differs(objective.dr_grpo(512)) == {
    "advantage": Advantage("none"),
    "reduction": "constant",
    "constant_length": 512,
  }
  assert differs(objective.dapo(20480, 4096)) == {
    "clip": Clip(0.2, 0.28),
    "filters": Filters(zero_variance=True),
    "overlong": Overlong(20480, 4096, 1.0),
  }


def test_objectives_can_be_static_arguments():
  options = [Objective, Advantage, Clip, Kl, Filters, Overlong]
  assert len({objective.grpo(), objective.grpo(), objective.bnpo()}) == 2
  assert all(inspect.getdoc(option) for option in options)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Advantage("std"), "advantage.scale: expected one of group, batch, none, found 'std'"),
    (lambda: Advantage(epsilon=-1), "advantage.epsilon: expected a number >= 0, found -1"),
    (lambda: Clip(low=0), r"clip.low: expected a number in \(0, 1\], found 0"),
    (lambda: Clip(low=1.28), r"clip.low: expected a number in \(0, 1\], found 1.28"),
    (lambda: Clip(high=-0.2), "clip.high: expected a number > 0, found -0.2"),
    (lambda: Kl(-0.1), "kl.coefficient: expected a number >= 0, found -0.1"),
    (lambda: Kl(estimator="k4"), "kl.estimator: expected one of k1, k2, k3, found 'k4'"),
    (lambda: Overlong(8, 9), "overlong.buffer: expected 1 to max_length = 8, found 9"),
    (lambda: objective.dapo(8, 0), "overlong.buffer: expected 1 to max_length = 8, found 0"),
    (lambda: Overlong(8, 4, 0.0), "overlong.weight: expected a number > 0, found 0.0"),
    (lambda: objective.dr_grpo(0), "constant_length: 'constant' needs a length >= 1, found 0"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
