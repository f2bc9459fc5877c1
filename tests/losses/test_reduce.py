import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import objective, reduce
from tests.losses import layouts

REDUCTIONS = {
  "token_mean": objective.Objective(kl=objective.Kl(0.1)),
  "segment_mean": objective.Objective(kl=objective.Kl(0.1), reduction="segment_mean"),
  "constant": objective.Objective(kl=objective.Kl(0.1), reduction="constant", constant_length=11),
}
OTHERS = {  # what sums over a segment, and every surrogate
  "gspo": objective.gspo(),
  "gspo-token": objective.Objective(ratio="sequence_token", surrogate=objective.Clip(0.1, 0.1)),
  "rloo": objective.rloo(),
  "sapo": objective.sapo(),
  "cispo": objective.cispo(),
  "corrected": objective.Objective(
    surrogate=objective.Clip(dual=1.5),
    kl=objective.Kl(0.1, "exact"),
    entropy=0.1,
    correction=objective.Correction("sequence", "mask", 0.5, 1.5),
  ),
}
EVERY = REDUCTIONS | OTHERS
WIDTH = 13  # columns; the longest pair of samples that is packed has 12 tokens
MASK = np.float32([[0, 1, 1, 0, 0.5, 0], [0, 0, 1, 1, 1, 0]])
IDS = np.int32([[0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 1, 2]])  # 5 segments, 2 of them masked whole
VALUES = np.float32([[9, 2, 4, 9, 10, 9], [9, 9, 3, 6, 9, 9]])


def test_worked_by_hand():
  got = {
    name: reduce.reduce(name, VALUES, MASK, IDS, constant_length=7 if name == "constant" else None)
    for name in reduce.REDUCTIONS
  }
  # 2 + 4 + 0.5 * 10 + 3 + 6 + 9 = 29 over 5.5 tokens; segment means 3, 10, none, 6, none.
  np.testing.assert_allclose([got["token_mean"].total, got["token_mean"].weight], [29, 5.5])
  np.testing.assert_allclose([got["segment_mean"].total, got["segment_mean"].weight], [19, 5])
  np.testing.assert_allclose([got["constant"].total, got["constant"].weight], [29, 35])
  np.testing.assert_allclose(got["segment_mean"].mean(), 3.8, rtol=1e-6)


def test_weights_of_segments_worked_by_hand():
  weights = np.float32([[2, 2, 2, 3, 3, 0], [5, 5, 0.5, 0.5, 0.5, 7]])
  got = {
    name: reduce.reduce(
      name, VALUES, MASK, IDS, constant_length=7 if name == "constant" else None, weights=weights
    )
    for name in reduce.REDUCTIONS
  }
  # (2 + 4) 2 + 0.5 * 10 * 3 + (3 + 6 + 9) 0.5 = 36 over 2 * 2 + 0.5 * 3 + 3 * 0.5 = 7;
  # 3 * 2 + 10 * 3 + 6 * 0.5 = 39 over 2 + 3 + 5 + 0.5 + 7 = 17.5.
  np.testing.assert_allclose([got["token_mean"].total, got["token_mean"].weight], [36, 7])
  np.testing.assert_allclose([got["segment_mean"].total, got["segment_mean"].weight], [39, 17.5])
  np.testing.assert_allclose([got["constant"].total, got["constant"].weight], [36, 17.5 * 7])


def test_equal_weights_are_none():
  for name in ("token_mean", "segment_mean"):
    plain = reduce.reduce(name, VALUES, MASK, IDS).mean()
    weighed = reduce.reduce(name, VALUES, MASK, IDS, weights=np.where(IDS >= 0, np.float32(4), 0))
    np.testing.assert_allclose(weighed.mean(), plain, rtol=1e-6)


@pytest.mark.parametrize("junk", [np.inf, np.nan])
def test_values_outside_the_mask_are_not_read(junk):
  for name in ("token_mean", "segment_mean"):
    total = lambda values, name=name: reduce.reduce(name, values, MASK, IDS).total
    clean, slope = jax.value_and_grad(total)(VALUES)
    dirty, dirty_slope = jax.value_and_grad(total)(np.where(MASK > 0, VALUES, junk))
    assert clean == dirty
    np.testing.assert_array_equal(slope, dirty_slope)


@pytest.fixture(scope="module")
def whole():
  """Value and gradient per sample of each reduction: one sample a row, one microbatch."""
  made = layouts.samples()
  batch = layouts.lay_out(made, layouts.APART, WIDTH)
  found = {}
  for name, chosen in EVERY.items():
    value, gradient = layouts.value_and_gradient(batch, chosen)
    found[name] = value, layouts.take_back(gradient, made, layouts.APART)
  return made, found


PACKED = (*layouts.PACKED, (), (), (), ())
LAYOUTS = {  # rows, columns, what stands on padding, microbatches; few shapes, to compile little
  "2 microbatches": (layouts.APART, WIDTH, 0.0, 2),
  "4 microbatches": (layouts.APART, WIDTH, 0.0, 4),
  "rows in another order": (layouts.APART[::-1], WIDTH, 0.0, 1),
  "padding of rows and columns, with junk": ((*layouts.APART, (), ()), 17, np.inf, 1),
  "packed": (PACKED, WIDTH, 0.0, 1),
  "packed otherwise, 2 microbatches": (((5, 0), (2, 4), (3,), (), (1,), (), (), ()), WIDTH, 0.0, 2),
  "packed, 4 microbatches, two of them empty": (PACKED, WIDTH, 0.0, 4),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_neither_loss_nor_gradient(whole, name, layout):
  made, found = whole
  rows, width, junk, microbatches = LAYOUTS[layout]
  batch = layouts.lay_out(made, rows, width, junk)
  value, gradient = layouts.value_and_gradient(batch, EVERY[name], microbatches)
  expected, expected_gradients = found[name]
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, wanted in zip(layouts.take_back(gradient, made, rows), expected_gradients):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_dividing_each_microbatch_is_seen(whole, name):
  """The bug that shipped elsewhere must not pass: means of unequal microbatches, averaged."""
  made, found = whole
  batch = layouts.lay_out(made, PACKED[::2] + PACKED[1::2], WIDTH)
  halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 4), slice(4, 8))]
  chosen = REDUCTIONS[name]
  means = [float(layouts.total(half["logprobs"], half, chosen).mean()) for half in halves]
  assert abs(np.mean(means) / found[name][0] - 1) > 1e-3  # 100 times the tolerance above


def test_reductions_differ(whole):
  values = [whole[1][name][0] for name in REDUCTIONS]
  assert min(np.abs(np.diff(np.sort(values)))) > 1e-3


def test_segments_do_not_touch_each_other():
  """Change the mask and values of one segment: the weights of the others stay bitwise the same."""
  weights, _ = reduce.token_weights("segment_mean", MASK, IDS)
  mask = MASK.copy()
  mask[1, 2:5] = [0.25, 0, 1]
  changed, _ = reduce.token_weights("segment_mean", mask, IDS)
  same = np.ones_like(MASK, bool)
  same[1, 2:5] = False
  np.testing.assert_array_equal(np.array(weights)[same], np.array(changed)[same])
  assert (np.array(weights) != np.array(changed))[1, 2:5].all()


def test_small_segments_of_a_long_row_keep_their_precision():
  """128 tokens of weight 1e5, then a segment of weight 1e-3: cumulative sums would lose it."""
  mask = np.full((1, 130), 1e5, np.float32)
  mask[0, -2:] = 1e-3
  ids = np.int32(np.arange(130) >= 128)[None]
  weights, count = reduce.token_weights("segment_mean", mask, ids)
  np.testing.assert_allclose(weights[0, -2:], 0.5, rtol=1e-6)
  np.testing.assert_allclose(weights[0, 0], 1 / 128, rtol=1e-5)
  assert count == 2


def test_nothing_to_train_gives_zero_and_no_nan():
  nothing = jnp.zeros((2, 4)), jnp.full((2, 4), -1, jnp.int32)
  for name in reduce.REDUCTIONS:
    length = 3 if name == "constant" else None
    mean = lambda v, name=name, length=length: reduce.reduce(
      name, v, *nothing, constant_length=length
    ).mean()
    value, gradient = jax.value_and_grad(mean)(jnp.full((2, 4), 5.0))
    assert value == 0 and not gradient.any()


def test_sums_are_carried_through_a_jitted_scan():
  made = layouts.samples()
  batch = layouts.lay_out(made, layouts.APART, WIDTH)
  micro = jax.tree.map(lambda x: jnp.asarray(x).reshape(4, 2, *x.shape[1:]), batch)

  @jax.jit
  def accumulate(micro):
    add = lambda carry, part: (
      carry + layouts.total(part["logprobs"], part, REDUCTIONS["segment_mean"]),
      None,
    )
    return jax.lax.scan(add, reduce.Sum(jnp.zeros(()), jnp.zeros(())), micro)[0]

  expected = layouts.value_and_gradient(batch, REDUCTIONS["segment_mean"])[0]
  np.testing.assert_allclose(accumulate(micro).mean(), expected, rtol=1e-5)


@pytest.mark.parametrize(
  "reduction, length, message",
  [
    ("mean", None, "reduction: expected one of token_mean, segment_mean, constant, found 'mean'"),
    ("constant", None, "constant_length: 'constant' needs a length >= 1, found None"),
    ("constant", 0, "constant_length: 'constant' needs a length >= 1, found 0"),
    ("token_mean", 8, "constant_length: 'token_mean' does not read it, found 8"),
  ],
)
def test_bad_reductions_are_named(reduction, length, message):
  with pytest.raises(ValueError, match=message):
    reduce.reduce(reduction, VALUES, MASK, IDS, constant_length=length)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(objective.Objective(), reduction=reduction, constant_length=length)
