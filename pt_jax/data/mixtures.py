"""Mixtures: an endless, seeded, random-access stream of the rows of one source or several.

Example i of the stream is a function of i and the seed alone, so the state of whoever reads it is
one integer, and every host can name any example without reading the ones before it.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import grain
import numpy as np

from pt_jax.data.sources import Row, Source

# The order of sources repeats with this period. Shares of the sources are rounded to its inverse,
# except those in proportion to the sizes, which are exact for data sets of up to MAX_EXACT rows.
PERIOD = 2**16
MAX_EXACT = 2**20

# Up to this many rows a source's permutation is held in memory (0.5 MB). Grain's index shuffle
# needs no memory, but it takes 4 us a row for 2^16 rows, 30 us for 1000 and 8 ms for two.
SMALL = 2**16


class Place(NamedTuple):
  """Where an example of the mixture comes from."""

  source: str
  row: int  # of that source
  epoch: int  # of that source: how often it has been gone through before


class Mixture:
  """Sources mixed with shares p_i proportional to w_i^(1/T).

  w_i is the weight given, or the number of rows n_i. T = 1 without weights is proportional to size:
  every row once an epoch. T -> infinity is uniform over sources (Devlin et al., 2019; Xue et al.,
  2021). The sources are spread evenly, not drawn: the first m examples hold p_i m of source i, give
  or take half the number of sources. Each source is gone through in an order of its own, shuffled
  anew each time, so no row is read k + 1 times before all rows of its source are read k times.
  """

  def __init__(
    self,
    sources: Mapping[str, Source],
    *,
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    seed: int | None = 0,
  ):
    """Raises ValueError for a source without rows, and weights or a temperature that make no sense.

    Args:
      sources: by name.
      weights: by the same names, more than 0; the sizes if not given.
      temperature: T, more than 0; `math.inf` is uniform.
      seed: of the shuffles; None reads every source in its own order.
    """
    self.sources, self.seed = dict(sources), seed
    self.shares = _shares(self.sources, weights, temperature)  # name -> p_i
    self._names = list(self.sources)
    self._sizes = [len(source) for source in self.sources.values()]
    exact = weights is None and temperature == 1 and len(self) <= MAX_EXACT
    counts = np.asarray(self._sizes) if exact else _rounded(list(self.shares.values()), PERIOD)
    self._counts = counts.tolist()  # examples of each source in a period
    self._order, self._rank = _interleaved(counts)

  def __len__(self) -> int:
    """Examples in an epoch: as many as the sources have rows."""
    return sum(self._sizes)

  def locate(self, index: int) -> Place:
    """Where example `index` (0, 1, 2... without end) comes from."""
    period, at = divmod(index, len(self._order))
    number = int(self._order[at])
    nth = period * self._counts[number] + int(self._rank[at])  # of this source, from 0
    epoch, position = divmod(nth, self._sizes[number])
    if self.seed is not None:
      position = _shuffled(position, self._sizes[number], (self.seed, number, epoch))
    return Place(self._names[number], position, epoch)

  def __getitem__(self, index: int) -> Row:
    place = self.locate(index)
    return self.sources[place.source][place.row]

  def where(self, index: int) -> str:
    """Names the row behind example `index`: file and line or index."""
    place = self.locate(index)
    return self.sources[place.source].where(place.row)

  def signature(self) -> dict[str, object]:
    """What the stream depends on besides the content of the rows, as JSON values."""
    sizes = dict(zip(self._names, self._sizes))
    return {"sources": sizes, "shares": self.shares, "seed": self.seed}


def _shares(
  sources: Mapping[str, Source], weights: Mapping[str, float] | None, temperature: float
) -> dict[str, float]:
  """Name -> p_i, computed from logarithms so that a small T does not overflow."""
  if not sources:
    raise ValueError("a mixture needs at least one source")
  for name, source in sources.items():
    if not len(source):
      raise ValueError(f"source {name!r} has no rows")
  if not temperature > 0:
    raise ValueError(f"temperature must be more than 0, got {temperature}")
  if weights is None:
    weights = {name: len(source) for name, source in sources.items()}
  if set(weights) != set(sources):
    raise ValueError(f"weights are for {sorted(weights)}, the sources are {sorted(sources)}")
  for name, weight in weights.items():
    if not 0 < weight < math.inf:
      raise ValueError(f"the weight of source {name!r} must be more than 0, got {weight}")
  logits = np.asarray([math.log(weights[name]) / temperature for name in sources])
  shares = np.exp(logits - logits.max())
  return dict(zip(sources, (shares / shares.sum()).tolist()))


def _rounded(shares: list[float], total: int) -> np.ndarray:
  """[K] int, parts of `total`: largest remainders, and at least 1 so that no source starves."""
  ideal = np.asarray(shares) * total
  counts = np.floor(ideal).astype(np.int64)
  left_over = total - int(counts.sum())
  counts[np.argsort(counts - ideal, kind="stable")[:left_over]] += 1
  return np.maximum(counts, 1)


def _interleaved(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The order of a period: which source comes, and the how-manieth of that source it is: [P], [P].

  The k-th of c examples stands at (k + 1/2) / c of the period.
  """
  number = np.repeat(np.arange(len(counts)), counts)
  rank = np.concatenate([np.arange(c) for c in counts])
  order = np.argsort((rank + 0.5) / counts[number], kind="stable")
  return number[order].astype(np.int32), rank[order].astype(np.int32)


def _shuffled(position: int, size: int, seed: tuple[int, int, int]) -> int:
  """Where a permutation of `size` rows, chosen by the seed, puts a position."""
  if size <= SMALL:
    return int(_permutation(size, seed)[position])
  return grain.experimental.index_shuffle(
    position, max_index=size - 1, seed=_permutation_seed(seed), rounds=4
  )


@functools.lru_cache(maxsize=64)
def _permutation(size: int, seed: tuple[int, int, int]) -> np.ndarray:
  return np.random.default_rng(seed).permutation(size)


@functools.lru_cache(maxsize=64)
def _permutation_seed(seed: tuple[int, int, int]) -> int:
  return int(np.random.SeedSequence(seed).generate_state(1)[0])
