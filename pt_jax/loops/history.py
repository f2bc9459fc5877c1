"""What a run remembers of a metric to judge it by: its beginning, its latest values, its best.

A level is the median of a few neighbouring loggings: one value that stands out does not move it.
"""

import statistics
from collections.abc import Sequence

WINDOW = 5  # loggings that a level is the median of: two bad ones among them change nothing
RARE_WINDOW = 2  # of metrics that are logged a few times in a run
RARE = ("samples/", "eval/")
KEPT = 20  # latest values, which the noise is estimated from
NOISE_FACTOR = 5.0  # std of a value: best and worst of 400 medians of 5 are 3 apart by chance

Point = tuple[int, float]  # step, value


class Series:
  """One metric, value by value."""

  def __init__(self, name: str):
    self.name = name
    self.count = 0
    self.best: Point | None = None  # the highest level so far, and the step that ended it
    self._best_margin = 0.0  # at that step
    self._bent = 0.0  # sum of |a - 2 b + c| over all neighbours
    self._window = RARE_WINDOW if name.startswith(RARE) else WINDOW
    self._first: list[Point] = []
    self._last: list[Point] = []

  def add(self, step: int, value: float) -> None:
    """Takes the next value, which must be finite."""
    self.count += 1
    if len(self._first) < self._window:
      self._first.append((step, value))
    self._last = [*self._last[1 - KEPT :], (step, value)]
    self._bent += sum(_bends(self.values[-3:]))
    if self.full and (self.best is None or self.recent > self.best[1]):
      self.best, self._best_margin = (step, self.recent), self.margin

  @property
  def full(self) -> bool:
    """Whether there are enough values for a level."""
    return self.count >= self._window

  @property
  def has_past(self) -> bool:
    """Whether the latest level shares no value with the beginning."""
    return self.count >= 2 * self._window

  @property
  def begin(self) -> float:
    """The level that the run began with."""
    return statistics.median(value for _, value in self._first)

  @property
  def first(self) -> float:
    """The very first value."""
    return self._first[0][1]

  @property
  def recent(self) -> float:
    """The level now."""
    return statistics.median(self.values[-self._window :])

  @property
  def values(self) -> list[float]:
    """The latest values, up to 20."""
    return [value for _, value in self._last]

  @property
  def margin(self) -> float:
    """What two levels may differ by chance: 5 std of a value, lately or ever, the larger.

    From the mean of |a - 2 b + c| over three neighbours, which is 1.954 std for normal noise and
    0 for a straight trend.
    """
    if self.count < 3:
      return 0.0
    lately = statistics.fmean(_bends(self.values))
    return NOISE_FACTOR * max(lately, self._bent / (self.count - 2)) / 1.954

  @property
  def fall(self) -> float:
    """How far the level is below the best one, beyond noise (now, and when it was best); else 0."""
    if self.best is None:
      return 0.0
    fall = self.best[1] - self.recent
    return fall if fall > max(self.margin, self._best_margin) else 0.0

  def moved(self) -> str:
    """In words: from the beginning to now."""
    now = f"{self.recent:.3g} ({_steps(self._last[-self._window :])})"
    if not self.has_past:
      return f"{self.name} {now}"
    return f"{self.name} {self.begin:.3g} ({_steps(self._first)}) -> {now}"

  def fell(self) -> str:
    """In words: from the best level to now."""
    assert self.best is not None
    step, best = self.best
    return f"{self.name} {best:.3g} (step {step}) -> {self.recent:.3g} ({self.steps()})"

  def steps(self) -> str:
    """Which steps the latest level is of."""
    return _steps(self._last[-self._window :])


def _bends(values: Sequence[float]) -> list[float]:
  return [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:])]


def _steps(points: Sequence[Point]) -> str:
  first, last = points[0][0], points[-1][0]
  return f"step {first}" if first == last else f"steps {first}-{last}"
