"""Figures of merit against hand-worked numbers and brute force."""

import itertools
import math

import numpy as np
import pytest

from pt_jax.loops import ranking


def test_share_and_its_interval_by_hand():
  """Wilson for 8 of 10: (0.8 + 0.19207 -+ 1.95996 sqrt(0.016 + 0.0096036)) / 1.384146."""
  got = ranking.share([1] * 8 + [0] * 2)
  assert got.count == 10 and got.value == 0.8
  np.testing.assert_allclose([got.low, got.high], [0.4901625, 0.9433178], atol=1e-6)
  every, none = ranking.share([1] * 4), ranking.share([0] * 4)
  assert every.high == 1 and none.low == 0
  np.testing.assert_allclose(every.low, 4 / (4 + ranking.Z95**2))
  np.testing.assert_allclose(none.high, 1 - every.low)


def test_the_interval_covers():
  """Of samples of 200 with p = 0.55, 95 % of the intervals hold p."""
  rng = np.random.default_rng(0)
  shares = [ranking.share(rng.random(200) < 0.55) for _ in range(2000)]
  assert 0.93 < np.mean([s.low <= 0.55 <= s.high for s in shares]) < 0.97


def test_ties_are_half_right():
  np.testing.assert_array_equal(ranking.right_order([-2, 0, 1e-9]), [0, 0.5, 1])


def test_by_slice():
  got = ranking.by_slice([1, 0, 1, 0.5], ["b", "a", "b", "a"])
  assert list(got) == ["a", "b"]
  assert got["a"].value == 0.25 and got["a"].count == 2 and got["b"].value == 1
  with pytest.raises(ValueError, match="slices: expected one name for each of 2, found 1"):
    ranking.by_slice([1, 0], ["a"])


def test_auc_against_every_pair():
  rng = np.random.default_rng(1)
  positive, negative = rng.integers(0, 9, 37) + 1.0, rng.integers(0, 9, 23) + 0.0  # many ties
  wins = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)]
  np.testing.assert_allclose(ranking.auc(positive, negative), np.mean(wins), rtol=1e-12)
  assert (
    ranking.auc([1], [1]) == 0.5 and ranking.auc([2, 3], [1]) == 1 and ranking.auc([0], [1]) == 0
  )
  assert math.isnan(ranking.auc([], [1]))


def test_calibration_by_hand():
  """Bins [0, .5), [.5, 1]: means 0.2 against 0.5, 0.8 against 2/3; ECE 0.4 * 0.3 + 0.6 * 0.133."""
  got = ranking.calibration([0.1, 0.3, 0.5, 0.9, 1.0], [0, 1, 1, 1, 0], bins=2)
  np.testing.assert_array_equal(got.counts, [2, 3])
  np.testing.assert_allclose(got.confidence, [0.2, 0.8])
  np.testing.assert_allclose(got.frequency, [0.5, 2 / 3])
  np.testing.assert_allclose(got.error, 0.2)
  empty = ranking.calibration([0.9], [1.0], bins=2)
  assert math.isnan(empty.confidence[0])
  np.testing.assert_allclose(empty.error, 0.1)


def test_pair_calibration_does_not_ask_which_is_first():
  """Margins ln 3 (0.75), right twice of three times, and one tie at 0.5."""
  got = ranking.pair_calibration([math.log(3), math.log(3), -math.log(3), 0.0], bins=2)
  np.testing.assert_array_equal(got.counts, [1, 3])
  np.testing.assert_allclose(got.confidence, [0.5, 0.75])
  np.testing.assert_allclose(got.frequency, [0.5, 2 / 3])
  np.testing.assert_allclose(got.error, 0.75 * (0.75 - 2 / 3))
  assert np.isfinite(ranking.pair_calibration([1e4, -1e4]).error)


def test_calibrated_margins_have_a_small_error():
  """And margins three times as large, the same ranking, a large one."""
  rng = np.random.default_rng(2)
  margins = rng.normal(size=20000)
  chosen = np.where(rng.random(20000) < 1 / (1 + np.exp(-margins)), margins, -margins)
  assert ranking.pair_calibration(chosen).error < 0.01
  assert ranking.pair_calibration(3 * chosen).error > 0.15


def test_agreement():
  margins = np.array([[1.0, 2, -1], [-1, -2, -3], [3, 6, 1], [0.5, 1, 2]])
  got = ranking.agreement(margins)
  correlation = np.corrcoef(margins.T)
  np.testing.assert_allclose(got.alike, (1 + 0.75 + 0.75) / 3)
  np.testing.assert_allclose(
    got.correlation, (correlation[0, 1] + correlation[0, 2] + correlation[1, 2]) / 3
  )
  by_hand = [math.sqrt(np.mean((row - row.mean()) ** 2)) for row in margins]
  np.testing.assert_allclose(got.spread, np.mean(by_hand))
  assert math.isnan(ranking.agreement(np.array([[1.0, 2], [1, 3]])).correlation)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: ranking.share([]), "share: expected at least one trial, found none"),
    (lambda: ranking.calibration([1.5], [1]), r"expected probabilities in \[0.0, 1\], found 1.5"),
    (lambda: ranking.calibration([0.5], []), "expected as many outcomes as probabilities"),
    (lambda: ranking.agreement(np.ones((3, 1))), r"expected margins \[N, E > 1\], found \(3, 1\)"),
  ],
)
def test_what_cannot_be_measured_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
