"""Reward-model losses against float64 with gradients by hand, at extremes, in every layout."""

import dataclasses
import math
import pathlib
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import bootstrap, reward, segments
from pt_jax.losses.reward import RewardObjective
from tests.losses import groups

TRL = dict(np.load(pathlib.Path(__file__).parents[1] / "oracles" / "trl_reward.npz"))
WIDTH = 18
OBJECTIVES = {
  "pairwise": RewardObjective(),
  "margins": RewardObjective(margins=True),
  "centered": RewardObjective(margins=True, center=0.3),
  "listwise": RewardObjective("listwise"),
  "outcome": RewardObjective("outcome"),
  "process": RewardObjective("process"),
}


def check(made, rows, objective, width=WIDTH, microbatches=1):
  batch = groups.lay_out(made, rows, width, junk=np.nan)
  drawn = groups.drawn_weights(made) if objective.bootstrap else None
  want, want_gradient = groups.truth(
    made, objective.kind, margins=objective.margins, center=objective.center, drawn=drawn
  )
  value, gradient, metrics = groups.value_and_gradient(batch, objective, microbatches)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  got = groups.take_back(gradient, made, rows)
  atol = 1e-7 if objective.kind == "listwise" else 1e-8  # a sum of probabilities, less 1
  for one, other in zip(chain.from_iterable(got), chain.from_iterable(want_gradient)):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)
  return metrics


@pytest.mark.parametrize(
  "name, bootstrapped",
  [
    *((name, False) for name in OBJECTIVES),
    ("centered", True),
    ("listwise", True),
    ("process", True),
  ],
)
def test_loss_and_gradient_are_the_papers(name, bootstrapped):
  """Packed, apart, and in microbatches: one truth for all. Padding holds NaN."""
  objective = dataclasses.replace(OBJECTIVES[name], bootstrap=bootstrapped)
  made = groups.groups()
  packed = check(made, groups.PACKED, objective)
  for count in (2, 4)[: 1 if bootstrapped else 2]:
    again = check(made, groups.APART, objective, microbatches=count)
    for metric, value in packed.items():
      np.testing.assert_allclose(again[metric], value, rtol=1e-5, err_msg=metric)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_what_speaks_of_the_completion_is_read(name):
  """Values before the last token, or between the marks, may be anything."""
  made = groups.groups()
  _, gradient = groups.truth(made, OBJECTIVES[name].kind)
  batch = groups.lay_out(made, groups.PACKED, WIDTH)
  wanted = groups.value_and_gradient(batch, OBJECTIVES[name])[0]
  completions = chain.from_iterable(g["completions"] for g in made)
  for completion, slope in zip(completions, chain.from_iterable(gradient)):
    unread = (slope == 0).all(1)
    unread[-1] &= OBJECTIVES[name].kind == "process"
    completion["values"][unread] = np.nan
  batch = groups.lay_out(made, groups.PACKED, WIDTH)
  value, gradient, _ = groups.value_and_gradient(batch, OBJECTIVES[name])
  assert value == wanted and np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [30.0, 1000.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extremes(name, scale):
  made = groups.groups(seed=1, scale=scale)
  if scale < 1000:
    check(made, groups.PACKED, OBJECTIVES[name])
  batch = groups.lay_out(made, groups.PACKED, WIDTH)
  value, gradient, _ = groups.value_and_gradient(batch, OBJECTIVES[name])
  assert np.isfinite(value) and np.isfinite(gradient).all() and gradient.any()


def test_metrics_by_hand():
  """Of the mean over members; the pair of ties (weight 1 of 3.5) is half right."""
  made = groups.groups()
  batch = groups.lay_out(made, groups.PACKED, WIDTH)
  metrics = groups.value_and_gradient(batch, RewardObjective())[2]
  ends = lambda g: [c["values"][-1].astype(np.float64) for c in made[g]["completions"]]
  margins = {g: ends(g)[0] - ends(g)[1] for g in (0, 3, 5)}
  weight = {0: 1.0, 3: 1.0, 5: 1.5}
  mean = lambda f: sum(weight[g] * f(g) for g in weight) / 3.5
  want = {
    "margin": mean(lambda g: margins[g].mean()),
    "accuracy": mean(lambda g: (1 + np.sign(margins[g].mean())) / 2 if g != 3 else 0.5),
    "chosen": mean(lambda g: ends(g)[0].mean()),
    "rejected": mean(lambda g: ends(g)[1].mean()),
    "spread": mean(lambda g: margins[g].std()),
  }
  assert metrics.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  listed = groups.value_and_gradient(batch, RewardObjective("listwise"))[2]
  soft = lambda r: np.exp(r) / np.exp(r).sum()
  choice = lambda r: np.mean([soft(r[i:])[0] for i in range(len(r) - 1)])
  total = sum(
    made[g]["weight"] * choice(np.array([r.mean() for r in ends(g)])) for g in (0, 1, 3, 4, 5)
  )
  np.testing.assert_allclose(listed["choice_probability"], total / 4.25, rtol=1e-5)
  judged = groups.value_and_gradient(batch, RewardObjective("outcome"))[2]
  right = every = 0.0
  for g, group in enumerate(made):
    for c, value in zip(group["completions"], ends(g)):
      right += group["weight"] * ((value.mean() > 0) == (c["labels"][-1] > 0.5))
      every += group["weight"]
  np.testing.assert_allclose(judged["accuracy"], right / every, rtol=1e-5)


def test_two_in_a_list_are_a_pair():
  """Plackett-Luce of two equals Bradley-Terry, value and gradient."""
  made = [g for g in groups.groups() if len(g["completions"]) == 2]
  batch = groups.lay_out(made, ((0, 1), (2,), (), ()), WIDTH)
  pair, listed = (
    groups.value_and_gradient(batch, RewardObjective(k)) for k in ("pairwise", "listwise")
  )
  np.testing.assert_allclose(listed[0], pair[0], rtol=1e-6)
  np.testing.assert_allclose(listed[1], pair[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_a_group_of_one_compares_nothing(kind):
  """It adds to neither the loss nor the weight; alone it leaves a loss of 0 over a weight of 0."""
  made = groups.groups()
  with_it = groups.value_and_gradient(
    groups.lay_out(made, groups.PACKED, WIDTH), RewardObjective(kind)
  )
  without = ((5,), (1, 3), (4, 0), ())
  got = groups.value_and_gradient(groups.lay_out(made, without, WIDTH), RewardObjective(kind))
  np.testing.assert_allclose(got[0], with_it[0], rtol=1e-6)
  alone = groups.lay_out(made, ((2,), ()), WIDTH)
  _, counts, metrics = reward.reward_loss(
    alone["values"],
    *(alone[k] for k in ("segment_ids", "group_ids", *groups.FIELDS)),
    objective=RewardObjective(kind),
  )
  assert not counts.any() and not any(v.any() for v in metrics.values())


@pytest.mark.parametrize("source", ["prescribed", "model"])
@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("center", [0.0, 0.01, 0.3])
def test_trl(source, margin, center):
  golden = lambda what: TRL[f"{source}/margin={margin}/center={center}/{what}"]
  rewards = golden("rewards")
  count = len(rewards) // 2
  margins = TRL["margins" if source == "model" else "prescribed_margins"]
  if source == "model":  # the reward of a row is the head's value at its last token
    last = TRL["hidden"][np.arange(2 * count), TRL["lengths"] - 1]
    np.testing.assert_allclose(last @ TRL["head"][0], rewards, rtol=1e-5, atol=1e-6)
  completion = lambda i, best: {
    "tokens": np.zeros(2, np.int32),
    "values": np.repeat(rewards[i], 2 * groups.MEMBERS).reshape(2, -1).astype(np.float32),
    "labels": np.full(2, best, np.float32),
    "mask": np.zeros(2, np.float32),
  }
  made = [
    {
      "completions": [completion(i, 1), completion(count + i, 0)],
      "weight": 1.0,
      "margin": margins[i],
    }
    for i in range(count)
  ]
  rows = [tuple(range(i, min(i + 3, count))) for i in range(0, 12, 3)]
  objective = RewardObjective(margins=bool(margin), center=center)
  batch = groups.lay_out(made, rows, WIDTH)
  value, gradient, metrics = groups.value_and_gradient(batch, objective)
  np.testing.assert_allclose(value, golden("loss"), rtol=1e-5)
  got = groups.take_back(gradient, made, rows)
  per_pair = np.array([[c.sum() for c in pair] for pair in got])  # over the members
  np.testing.assert_allclose(per_pair.T.ravel(), golden("grad_rewards"), rtol=1e-5, atol=1e-8)
  np.testing.assert_allclose(metrics["margin"], golden("margin"), rtol=1e-5, atol=1e-6)
  ties = np.mean(rewards[:count] == rewards[count:])  # TRL counts a tie as wrong
  np.testing.assert_allclose(metrics["accuracy"], golden("accuracy") + ties / 2, rtol=1e-5)
  if source == "model":
    head = np.einsum("r,rd->d", per_pair.T.ravel(), last)
    np.testing.assert_allclose(head, golden("grad_head")[0], rtol=2e-5, atol=1e-5)


def test_suffix_logsumexp_and_its_gradient_against_loops():
  ids = np.int32([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, -1, 2, 2], [-1] * 8])
  rng = np.random.default_rng(0)
  values = rng.normal(scale=40, size=ids.shape).astype(np.float32)
  coefficients = rng.normal(size=ids.shape).astype(np.float32)
  held = (rng.random(ids.shape) < 0.7) & (ids >= 0)
  want, gradient = np.zeros(ids.shape), np.zeros(ids.shape)
  for row, column in np.argwhere(ids >= 0):
    inside = (ids[row] == ids[row, column]) & held[row] & (np.arange(8) >= column)
    if inside.any():
      v = values[row, inside].astype(np.float64)
      weights = np.exp(v - v.max())
      want[row, column] = v.max() + np.log(weights.sum())
      gradient[row, inside] += coefficients[row, column] * weights / weights.sum()
  assert (want == 0).sum() > (ids < 0).sum(), "somewhere nothing is held"
  values = np.where(held, values, np.nan).astype(np.float32)
  function = segments.segment_suffix_logsumexp
  np.testing.assert_allclose(function(values, held, ids), want, rtol=1e-6, atol=1e-6)
  weighted = lambda v: (function(v, held, ids) * coefficients).sum()
  np.testing.assert_allclose(jax.grad(weighted)(values), gradient, rtol=1e-5, atol=1e-6)


def test_segment_ends():
  ids = np.int32([[0, 0, 1, 2, 2, -1], [0, 0, 0, 0, 0, 0], [-1] * 6])
  want = [[1], [2], [4]], [[5]], []
  for row, columns in zip(np.asarray(segments.segment_ends(ids)), want):
    np.testing.assert_array_equal(np.flatnonzero(row), np.ravel(columns))


def test_bootstrap_weights_are_poisson_and_members_differ():
  """20000 hashes: mean and variance 1, members uncorrelated; equal groups weigh alike."""
  tokens = jnp.arange(20000, dtype=jnp.int32)[:, None]
  hashes = bootstrap.group_hashes(tokens, jnp.zeros_like(tokens), jnp.zeros_like(tokens))
  drawn = np.stack([np.asarray(bootstrap.poisson_weights(hashes, e))[:, 0] for e in range(4)])
  np.testing.assert_allclose(drawn.mean(1), 1, atol=0.03)
  np.testing.assert_allclose(drawn.var(1), 1, atol=0.06)
  assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.03
  np.testing.assert_allclose((drawn == 0).mean(), math.exp(-1), atol=0.01)
  made = groups.groups()
  by_hand = groups.drawn_weights(made)
  for rows in (groups.PACKED, groups.APART):
    batch = groups.lay_out(made, rows, WIDTH)
    hashes = bootstrap.group_hashes(batch["tokens"], batch["positions"], batch["group_ids"])
    for e in range(groups.MEMBERS):
      got = np.asarray(bootstrap.poisson_weights(hashes, e))
      for row, held in enumerate(rows):
        for number, index in enumerate(held):
          assert (got[row][batch["group_ids"][row] == number] == by_hand[index, e]).all()


def test_vote_margins():
  np.testing.assert_allclose(
    reward.vote_margin([1.0, 0.75, 0.51, 0.875, 0.63, 0.5, 0.505]),
    [1.0, 0.5, 0.1, 0.75, 0.3, 0.0, 0.05],
    rtol=1e-6,
  )
  with pytest.raises(ValueError, match=r"vote share: expected numbers in \[0.5, 1\], found 0.4"):
    reward.vote_margin(0.4)


# Path of a field -> what it starts from, another value.
OTHERS = {
  "kind": (RewardObjective(), "listwise"),
  "margins": (RewardObjective(), True),
  "center": (RewardObjective(), 0.2),
  "bootstrap": (RewardObjective(), True),
}


def test_every_field_is_read():
  assert {f.name for f in dataclasses.fields(RewardObjective)} == set(OTHERS)
  batch = groups.lay_out(groups.groups(), groups.PACKED, WIDTH)
  for name, (base, other) in OTHERS.items():
    before = groups.value_and_gradient(batch, base)[0]
    after = groups.value_and_gradient(batch, dataclasses.replace(base, **{name: other}))[0]
    assert abs(before - after) > 1e-4, name
  kinds = [groups.value_and_gradient(batch, RewardObjective(k))[0] for k in reward.KINDS]
  assert np.diff(np.sort(kinds)).min() > 1e-3


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda: RewardObjective("pair"),  # type: ignore[arg-type]
      "reward.kind: expected one of pairwise, listwise, outcome, process, found 'pair'",
    ),
    (lambda: RewardObjective(center=-1), "reward.center: expected a number >= 0, found -1"),
    (lambda: RewardObjective("listwise", center=0.1), "reward.center: 'listwise' does not read it"),
    (lambda: RewardObjective("outcome", margins=True), "reward.margins: 'outcome' does not read"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_bootstrap_without_hashes_is_named():
  batch = groups.lay_out(groups.groups(), groups.PACKED, WIDTH)
  fields = [batch[k] for k in ("values", "segment_ids", "group_ids", *groups.FIELDS)]
  with pytest.raises(ValueError, match=r"hashes: objective.bootstrap needs them, found None"):
    reward.reward_loss(*fields, objective=RewardObjective(bootstrap=True))
