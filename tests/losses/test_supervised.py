"""Supervised losses against float64 written one token at a time, gradients by hand; layouts, limits
and bad options."""

import dataclasses
import functools
import inspect
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import reduce, supervised
from pt_jax.losses.supervised import ReferenceKl, SupervisedObjective
from pt_jax.models import divergence
from tests.losses import layouts

SAMPLED = {form: SupervisedObjective(kl=ReferenceKl(0.3, form)) for form in ("k1", "k2", "k3")}
OBJECTIVES = {
  "sft": supervised.sft(),
  "label_smoothed": supervised.label_smoothed(0.2),
  "dft": supervised.dft(),
  "psft": supervised.psft(0.3),
  **{f"psft {form}": objective for form, objective in SAMPLED.items()},
  "psft_clipped": supervised.psft_clipped(0.28),
  "all": SupervisedObjective(label_smoothing=0.1, kl=ReferenceKl(0.5), reduction="segment_mean"),
  "per sample": SupervisedObjective(
    "clipped",
    clip=0.1,
    kl=SAMPLED["k3"].kl,
    reduction="constant",
    constant_length=9,
  ),
}
WIDTH = 13


def token(objective, lp, ref, mean, kl) -> tuple[float, float, float, float]:
  """The loss of a token and its slopes by lp, by the mean log-prob and by the exact KL."""
  p, r, s = math.exp(lp), math.exp(lp - ref), objective.label_smoothing
  if objective.loss == "clipped":
    bound = 1 + objective.clip
    value, slope = (-r, -r) if r < bound else (-bound, 0.0)
  else:
    value, slope = {"nll": (-lp, -1.0), "dft": (-p * lp, -p)}[objective.loss]
  value, slope = (1 - s) * value - s * mean, (1 - s) * slope
  if objective.kl is None:
    return value, slope, -s, 0.0
  c, x = objective.kl.coefficient, math.exp(ref - lp)
  if objective.kl.form == "exact":
    return value + c * kl, slope, -s, c
  more, more_slope = {
    "k1": (lp - ref, 1.0),
    "k2": ((lp - ref) ** 2 / 2, lp - ref),
    "k3": (x - 1 - math.log(x), 1 - x),
  }[objective.kl.form]
  return value + c * more, slope + c * more_slope, -s, 0.0


INPUTS = ("logprobs", "mean_logprobs", "exact_kl")


def samples(spread=0.6):
  """Those of `layouts` with what else the vocabulary says, and a weight each."""
  rng = np.random.default_rng(7)
  made = layouts.samples(spread=spread)
  for sample in made:
    size = len(sample["mask"])
    sample["mean_logprobs"] = -rng.uniform(4, 9, size).astype(np.float32)
    sample["exact_kl"] = rng.uniform(0, 2, size).astype(np.float32)
    sample["weights"] = np.full(size, rng.uniform(0.3, 2), np.float32)
    sample["mask"] *= np.where(rng.random(size) < 0.3, np.float32(0.25), 1)  # kinds weigh otherwise
  return made


def expected(made, objective):
  """Loss over samples and its gradients [input][sample], float64."""
  weights = [float(sample["weights"][0]) for sample in made]
  everything = sum(w * float(sample["mask"].sum()) for w, sample in zip(weights, made))
  loss, gradients = 0.0, [[np.zeros(len(s["mask"])) for s in made] for _ in INPUTS]
  for index, (w, sample) in enumerate(zip(weights, made)):
    trained = float(sample["mask"].sum())
    share = {
      "token_mean": w / everything,
      "segment_mean": w / (sum(weights) * trained) if trained else 0.0,
      "constant": w / (sum(weights) * (objective.constant_length or math.inf)),
    }[objective.reduction]
    for t in np.flatnonzero(sample["mask"]):
      names = ("logprobs", "reference_logprobs", "mean_logprobs", "exact_kl")
      value, *slopes = token(objective, *(float(sample[name][t]) for name in names))
      factor = share * float(sample["mask"][t])
      loss += factor * value
      for gradient, slope in zip(gradients, slopes):
        gradient[index][t] = factor * slope
  return loss, gradients


def lay_out(made, rows, junk=0.0):
  """Field -> [B, WIDTH]: fields of `layouts` and those of `samples`."""
  batch = layouts.lay_out(made, rows, WIDTH, junk)
  for name in ("mean_logprobs", "exact_kl", "weights"):
    swapped = [sample | {"advantages": sample[name]} for sample in made]
    batch[name] = layouts.lay_out(swapped, rows, WIDTH, junk)["advantages"]
  batch["weights"] = np.where(batch["segment_ids"] < 0, 0, batch["weights"])
  return batch


@functools.partial(jax.jit, static_argnums=2)
def sums_and_gradients(inputs, batch, objective):
  """What a step does with one microbatch."""

  def total(inputs):
    loss, metrics = supervised.supervised_loss(
      inputs["logprobs"],
      batch["mask"],
      objective=objective,
      mean_logprobs=inputs["mean_logprobs"],
      reference_logprobs=batch["reference_logprobs"],
      exact_kl=inputs["exact_kl"],
    )
    whole = reduce.reduce(
      objective.reduction,
      loss,
      batch["mask"],
      batch["segment_ids"],
      constant_length=objective.constant_length,
      weights=batch["weights"],
    )
    return whole.total, (whole.weight, metrics)

  return jax.value_and_grad(total, has_aux=True)(inputs)


def value_and_gradients(batch, objective, microbatches=1):
  """Summed over microbatches and divided once."""
  value = weight = 0.0
  gradients = []
  for part in np.split(np.arange(len(batch["mask"])), microbatches):
    micro = {k: v[part] for k, v in batch.items()}
    inputs = {name: micro[name] for name in INPUTS}
    (more, (count, _)), gradient = sums_and_gradients(inputs, micro, objective)
    value, weight = value + float(more), weight + float(count)
    gradients.append(gradient)
  whole = {name: np.concatenate([g[name] for g in gradients]) / weight for name in INPUTS}
  return value / weight, whole


LAYOUTS = {  # rows, what stands on padding, microbatches
  "apart": (layouts.APART, 0.0, 1),
  "2 microbatches": (layouts.APART, 0.0, 2),
  "4 microbatches": (layouts.APART, 0.0, 4),
  "packed, junk on padding": ((*layouts.PACKED, (), (), (), ()), np.inf, 1),
  "packed, 4 microbatches, two of them empty": ((*layouts.PACKED, (), (), (), ()), np.nan, 4),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_in_every_layout(name):
  """Prompts hold junk of their own; one sample is masked whole, one has a single target."""
  made, objective = samples(), OBJECTIVES[name]
  want, want_gradients = expected(made, objective)
  for rows, junk, microbatches in LAYOUTS.values():
    value, gradients = value_and_gradients(lay_out(made, rows, junk), objective, microbatches)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for field, right in zip(INPUTS, want_gradients):
      for got, wanted in zip(layouts.take_back(gradients[field], made, rows), right):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8, err_msg=field)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_log_probs_thirty_nats_apart(name):
  made, objective = samples(spread=0.0), OBJECTIVES[name]
  for i, sample in enumerate(made):
    sample["reference_logprobs"] = sample["logprobs"] + np.float32(30 if i % 2 else -30)
  want, _ = expected(made, objective)
  value, gradients = value_and_gradients(lay_out(made, layouts.APART), objective)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert all(np.isfinite(g).all() for g in gradients.values())
  assert np.abs(gradients["logprobs"]).max() > 0


@pytest.mark.parametrize("lp", [-np.inf, -3e4])
def test_a_target_without_probability(lp):
  """The NLL is what it is; the others stay finite in their gradient."""
  one = np.ones((1, 1), np.float32)
  for name in ("dft", "psft_clipped", "psft k2"):
    gradient = jax.grad(
      lambda x, name=name: supervised.supervised_loss(
        x, one, objective=OBJECTIVES[name], reference_logprobs=-one
      )[0].sum()
    )(np.float32(lp) * one)
    assert np.isfinite(gradient).all(), name


def test_metrics():
  batch = lay_out(samples(), layouts.PACKED)
  inputs, mask = {name: batch[name] for name in INPUTS}, batch["mask"] > 0
  found = {}
  for name, objective in OBJECTIVES.items():
    _, (_, metrics) = sums_and_gradients(inputs, batch, objective)[0]
    assert set(metrics) == set(objective.metrics)
    assert all(not np.asarray(value)[~mask].any() for value in metrics.values())
    found[name] = {k: np.asarray(v)[mask] for k, v in metrics.items()}
  lp, ref = batch["logprobs"][mask], batch["reference_logprobs"][mask]
  want = {
    ("sft", "nats_per_token"): -lp,
    ("label_smoothed", "uniform_nats"): -batch["mean_logprobs"][mask],
    ("dft", "probability"): np.exp(lp),
    ("psft", "kl"): batch["exact_kl"][mask],
    ("psft k1", "kl"): lp - ref,
    ("psft_clipped", "ratio"): np.exp(lp - ref),
    ("psft_clipped", "clip_fraction"): np.exp(lp - ref) > 1.28,
  }
  for (name, metric), value in want.items():
    np.testing.assert_allclose(found[name][metric], value, rtol=1e-5, err_msg=metric)
  assert 0 < found["psft_clipped"]["clip_fraction"].mean() < 1


def test_sign_and_size_of_the_gradient_of_a_token():
  """At ratio 1, below it, inside and outside the clip."""
  lp = np.log(np.float32([[0.3, 0.3, 0.3, 0.3]]))
  ref = lp - np.log(np.float32([[1, 0.2, 1.25, 1.3]]))
  slope = lambda objective: jax.grad(
    lambda x: supervised.supervised_loss(
      x, np.ones_like(lp), objective=objective, reference_logprobs=ref
    )[0].sum()
  )(lp)
  np.testing.assert_allclose(
    slope(supervised.psft_clipped(0.28)), [[-1, -0.2, -1.25, 0]], rtol=1e-5
  )
  np.testing.assert_allclose(slope(supervised.dft()), -np.exp(lp), rtol=1e-6)
  np.testing.assert_allclose(slope(supervised.sft()), -np.ones_like(lp))
  # A sampled k1 is no proximal term: it only makes the loss smaller.
  np.testing.assert_allclose(slope(SAMPLED["k1"]), np.full_like(lp, -0.7), rtol=1e-6)
  np.testing.assert_allclose(slope(SAMPLED["k2"]), -1 + 0.3 * (lp - ref), rtol=1e-5)


def test_a_coefficient_of_0_measures_and_trains_nothing():
  measured = SupervisedObjective(kl=ReferenceKl(0.0))
  batch = lay_out(samples(), layouts.APART)
  plain, gradients = value_and_gradients(batch, supervised.sft())
  value, with_kl = value_and_gradients(batch, measured)
  assert value == plain
  np.testing.assert_array_equal(with_kl["logprobs"], gradients["logprobs"])
  assert not with_kl["exact_kl"].any()


KL = SupervisedObjective(kl=ReferenceKl(0.3))
OTHERS = {  # path of a field -> what it starts from, another value
  "loss": (supervised.sft(), "dft"),
  "label_smoothing": (supervised.sft(), 0.2),
  "clip": (supervised.psft_clipped(0.28), 0.1),
  "kl.coefficient": (KL, 0.6),
  "kl.form": (KL, "k2"),
  "reduction": (supervised.sft(), "segment_mean"),
  "constant_length": (OBJECTIVES["per sample"], 11),
}
IN_THE_STEP = {"kl.direction", "refresh_every"}  # see tests/steps/test_supervised_objectives.py


def paths(value, prefix=""):
  for field in dataclasses.fields(value):
    inner = getattr(value, field.name)
    if dataclasses.is_dataclass(inner):
      yield from paths(inner, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name


def changed(value, path, other):
  head, _, rest = path.partition(".")
  if rest:
    other = changed(getattr(value, head), rest, other)
  return dataclasses.replace(value, **{head: other})


def test_every_field_is_listed():
  assert set(paths(KL)) == set(OTHERS) | IN_THE_STEP


@pytest.mark.parametrize("path", OTHERS)
def test_every_field_is_read(path):
  base, other = OTHERS[path]
  batch = lay_out(samples(), layouts.APART)
  before, after = (
    value_and_gradients(batch, chosen) for chosen in (base, changed(base, path, other))
  )
  assert abs(before[0] - after[0]) > 1e-3
  assert any(
    not np.allclose(a, b, atol=1e-6) for a, b in zip(before[1].values(), after[1].values())
  )


def test_perplexity_of_a_fair_die():
  logprobs = np.full((2, 4), -np.log(6), np.float32)
  mask = np.float32([[0, 1, 1, 0], [0, 1, 0, 0]])
  loss = supervised.nll(logprobs, mask)
  np.testing.assert_array_equal(loss != 0, mask)
  mean = reduce.reduce("token_mean", loss, mask, np.zeros((2, 4), np.int32)).mean()
  np.testing.assert_allclose(np.exp(mean), 6, rtol=1e-5)


def test_gradient_is_minus_one_on_targets_and_nothing_else_is_read():
  logprobs = np.float32([[-np.inf, -2.0, np.nan, -30.0]])
  mask = np.float32([[0, 1, 0, 0.5]])  # a weight is applied by the reduction, not here
  gradient = jax.grad(lambda lp: supervised.nll(lp, mask).sum())(logprobs)
  np.testing.assert_array_equal(gradient, [[0, -1, 0, -1]])


def test_shapes_are_checked():
  with pytest.raises(AssertionError):
    supervised.nll(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))


def test_presets_are_what_they_say():
  differs = lambda chosen: {
    f.name: getattr(chosen, f.name)
    for f in dataclasses.fields(chosen)
    if getattr(chosen, f.name) != getattr(SupervisedObjective(), f.name)
  }
  assert differs(supervised.sft()) == {}
  assert differs(supervised.label_smoothed()) == {"label_smoothing": 0.1}
  assert differs(supervised.dft()) == {"loss": "dft"}
  assert differs(supervised.psft()) == {"kl": ReferenceKl(0.1, "exact", "policy_reference")}
  assert differs(supervised.psft(0.2, "k2")) == {"kl": ReferenceKl(0.2, "k2")}
  assert differs(supervised.psft_clipped()) == {"loss": "clipped", "clip": 0.28, "refresh_every": 8}
  assert len({supervised.sft(), supervised.sft(), supervised.dft()}) == 2  # static arguments
  assert all(inspect.getdoc(option) for option in (SupervisedObjective, ReferenceKl))
  assert typing.get_args(supervised.Direction) == typing.get_args(divergence.Direction)


BAD = [
  ({"loss": "mse"}, "loss: expected one of nll, dft, clipped, found 'mse'"),
  ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), found 1.0"),
  ({"loss": "dft", "label_smoothing": 0.1}, "label_smoothing: 'dft' does not read it, found 0.1"),
  ({"loss": "clipped"}, "clip: expected a number > 0, found None"),
  ({"loss": "clipped", "clip": 0.0}, "clip: expected a number > 0, found 0.0"),
  ({"clip": 0.2}, "clip: 'nll' does not read it, found 0.2"),
  ({"refresh_every": 4}, "refresh_every: expected an objective with a reference, found 4"),
  ({"kl": ReferenceKl(), "refresh_every": 0}, "refresh_every: expected a number of updates > 0"),
  ({"reduction": "constant"}, "constant_length: 'constant' needs a length >= 1, found None"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    SupervisedObjective(**options)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"coefficient": -0.1}, "kl.coefficient: expected a number >= 0, found -0.1"),
    ({"form": "k4"}, "kl.form: expected one of exact, k1, k2, k3, found 'k4'"),
    ({"direction": "both"}, "kl.direction: expected one of policy_reference, reference_policy"),
    ({"form": "k2", "direction": "reference_policy"}, "kl.direction: 'k2' does not read it"),
  ],
)
def test_bad_kl_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    ReferenceKl(**options)


@pytest.mark.parametrize(
  "objective, missing",
  [
    (supervised.label_smoothed(), "mean_logprobs"),
    (supervised.psft(), "exact_kl"),
    (supervised.psft(form="k3"), "reference_logprobs"),
    (supervised.psft_clipped(), "reference_logprobs"),
  ],
)
def test_what_is_missing_is_named(objective, missing):
  with pytest.raises(ValueError, match=f"^{missing}: the objective needs them, found None"):
    supervised.supervised_loss(jnp.zeros((1, 2)), jnp.ones((1, 2)), objective=objective)
