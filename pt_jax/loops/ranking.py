"""Figures of merit of a reward model on held-out data. NumPy, on the host.

Letters: N pairs or completions, E members of an ensemble, K bins.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Z95 = 1.959963984540054  # two-sided 95 %
BINS = 10


class Share(NamedTuple):
  """A share of N trials and its 95 % interval."""

  value: float
  low: float
  high: float
  count: int


class Calibration(NamedTuple):
  """Predicted probabilities against what happened, in K bins of equal width."""

  edges: np.ndarray  # [K + 1]
  counts: np.ndarray  # [K] int
  confidence: np.ndarray  # [K] mean prediction, NaN in an empty bin
  frequency: np.ndarray  # [K] mean outcome, NaN in an empty bin
  error: float  # ECE: sum over bins of count / N * |confidence - frequency|


class Agreement(NamedTuple):
  """How alike the members of an ensemble rank; means over their pairs, except `spread`."""

  alike: float  # share of pairs that two members rank alike
  correlation: float  # Pearson's, of two members' margins; NaN when a member is constant
  spread: float  # mean over pairs of the std over members of the margin


def share(right: ArrayLike) -> Share:
  """The mean of numbers in 0..1 (1 right, 0.5 a tie) with Wilson's score interval.

  (p + z^2 / 2N -+ z sqrt(p (1 - p) / N + z^2 / 4N^2)) / (1 + z^2 / N) with z = 1.96 (Wilson, 1927).

  Raises ValueError without any.
  """
  right = np.asarray(right, np.float64)
  if not right.size:
    raise ValueError("share: expected at least one trial, found none")
  n, p = right.size, float(right.mean())
  middle = p + Z95**2 / (2 * n)
  half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
  scale = 1 + Z95**2 / n
  return Share(p, max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0), n)


def sigmoid(x: ArrayLike) -> np.ndarray:
  """1 / (1 + exp(-x)), float64, without overflow."""
  return np.exp(-np.logaddexp(0, -np.asarray(x, np.float64)))


def right_order(margins: ArrayLike) -> np.ndarray:
  """[N] margins, chosen - rejected, to 1 where they are over 0, 0.5 at 0 and 0 below."""
  return 0.5 * (1 + np.sign(np.asarray(margins, np.float64)))


def by_slice(right: ArrayLike, slices: Sequence[str]) -> dict[str, Share]:
  """`share` of the trials [N] of each slice, named by the trial; slices in alphabetical order."""
  right, names = np.asarray(right, np.float64), np.asarray(slices)
  if right.shape != names.shape:
    raise ValueError(f"slices: expected one name for each of {right.size}, found {names.size}")
  return {str(name): share(right[names == name]) for name in np.unique(names)}


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
  """Probability that a positive scores over a negative, ties counted half; NaN without both.

  The Mann-Whitney statistic over all pairs of a positive and a negative, in O(N log N).
  """
  positive, negative = (np.asarray(x, np.float64).ravel() for x in (positive, negative))
  if not positive.size or not negative.size:
    return math.nan
  ordered = np.sort(negative)
  below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
  return float(below.sum() / 2 / positive.size / negative.size)


def calibration(
  probabilities: ArrayLike, outcomes: ArrayLike, *, low: float = 0.0, bins: int = BINS
) -> Calibration:
  """Expected calibration error and the reliability diagram's data (arXiv 1706.04599, eq. 3).

  Args:
    probabilities: [N] in [low, 1].
    outcomes: [N] in 0..1, what came of them.
    low: where the first bin begins.
    bins: K; a probability on an inner edge belongs to the bin above it, 1 to the last.

  Raises ValueError without any, and for a probability outside.
  """
  p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
  if not p.size or p.shape != y.shape:
    raise ValueError(f"calibration: expected as many outcomes as probabilities, found {y.shape}")
  if not ((p >= low) & (p <= 1)).all():
    raise ValueError(f"calibration: expected probabilities in [{low}, 1], found {p.min():g}")
  edges = np.linspace(low, 1, bins + 1)
  place = np.clip(np.searchsorted(edges, p, "right") - 1, 0, bins - 1)
  counts = np.bincount(place, minlength=bins)
  with np.errstate(invalid="ignore"):
    confidence, frequency = (np.bincount(place, x, minlength=bins) / counts for x in (p, y))
  gaps = np.where(counts > 0, np.abs(confidence - frequency), 0)
  return Calibration(edges, counts, confidence, frequency, float((counts * gaps).sum() / p.size))


def pair_calibration(margins: ArrayLike, *, bins: int = BINS) -> Calibration:
  """Is the better-scored of two chosen as often as sigmoid(|margin|) says? Bins of [0.5, 1].

  Which of the two stands first is arbitrary, so the prediction is that of the higher reward.
  """
  margins = np.asarray(margins, np.float64)
  return calibration(sigmoid(np.abs(margins)), right_order(margins), low=0.5, bins=bins)


def agreement(margins: np.ndarray) -> Agreement:
  """Of margins [N, E] of E > 1 members. Raises ValueError for one member."""
  margins = np.asarray(margins, np.float64)
  if margins.ndim != 2 or margins.shape[1] < 2 or not len(margins):
    raise ValueError(f"agreement: expected margins [N, E > 1], found {margins.shape}")
  signs, centered = np.sign(margins), margins - margins.mean(0)
  norms = np.sqrt((centered**2).sum(0))
  alike, correlation = [], []
  for a, b in itertools.combinations(range(margins.shape[1]), 2):
    alike.append((signs[:, a] == signs[:, b]).mean())
    product = norms[a] * norms[b]
    correlation.append((centered[:, a] @ centered[:, b]) / product if product else math.nan)
  spread = margins.std(axis=1).mean()
  return Agreement(float(np.mean(alike)), float(np.mean(correlation)), float(spread))
