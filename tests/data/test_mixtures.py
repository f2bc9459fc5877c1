import collections
import math

import numpy as np
import pytest

from pt_jax.data import mixtures, sources
from pt_jax.data.mixtures import Mixture

SIZES = {"big": 600, "middle": 90, "small": 10}


def make(sizes=SIZES, **options):
  data = {
    name: sources.MemorySource([{"from": name, "i": i} for i in range(n)], name)
    for name, n in sizes.items()
  }
  return Mixture(data, **options)


def names(mixture, count, start=0):
  return [mixture.locate(i).source for i in range(start, start + count)]


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, [600 / 700, 90 / 700, 10 / 700]),
    # square roots of 600, 90 and 10: 24.4949 + 9.4868 + 3.1623 = 37.1440
    ({"temperature": 2.0}, [0.659457, 0.255407, 0.085136]),
    ({"temperature": math.inf}, [1 / 3, 1 / 3, 1 / 3]),
    ({"weights": {"small": 1.0, "big": 2.0, "middle": 5.0}}, [0.25, 0.625, 0.125]),
    # square roots of 4, 9 and 25: 2 + 3 + 5
    ({"weights": {"big": 4, "middle": 9, "small": 25}, "temperature": 2}, [0.2, 0.3, 0.5]),
  ],
)
def test_shares_are_realised(options, expected):
  mixture = make(**options)
  np.testing.assert_allclose(list(mixture.shares.values()), expected, atol=1e-6)
  drawn = np.array([list(SIZES).index(name) for name in names(mixture, 5000)])
  for count in (1, 10, 333, 5000):  # the first `count`, not just in the long run
    realised = np.bincount(drawn[:count], minlength=3)
    assert np.abs(realised - np.array(expected) * count).max() <= 1.5


def test_temperature_moves_from_proportional_to_uniform():
  shares = [make(temperature=t).shares["small"] for t in (0.01, 0.5, 1, 2, 5, 1e9)]
  assert shares == sorted(shares)
  assert shares[0] < 1e-100 and shares[-1] == pytest.approx(1 / 3)


def test_proportional_epoch_reads_every_row_once():
  mixture = make()
  assert len(mixture) == 700
  orders = []
  for epoch in range(3):
    places = [mixture.locate(i) for i in range(700 * epoch, 700 * (epoch + 1))]
    assert {place.epoch for place in places} == {epoch}
    assert len({(place.source, place.row) for place in places}) == 700
    orders.append([place.row for place in places if place.source == "big"])
  assert orders[0] != orders[1] != orders[2] != sorted(orders[2])  # shuffled, and anew


def test_no_source_starves_and_each_goes_round_in_full():
  mixture = make(weights={"big": 1e9, "middle": 1, "small": 1})
  drawn = collections.Counter(names(mixture, 2 * mixtures.PERIOD))
  assert set(drawn) == set(SIZES)
  uniform = make(temperature=math.inf)
  rows = [uniform.locate(i) for i in range(600)]
  small = [place for place in rows if place.source == "small"]
  assert [place.epoch for place in small] == sorted(place.epoch for place in small)
  reads = collections.Counter(place.row for place in small)
  assert set(reads) == set(range(10)) and set(reads.values()) == {20}  # 200 reads of 10 rows


def test_large_sources_are_shuffled_without_a_table(monkeypatch):
  monkeypatch.setattr(mixtures, "SMALL", 500)
  mixture = make({"a": 1200})
  orders = [[mixture.locate(i).row for i in range(at, at + 1200)] for at in (0, 1200)]
  for order in orders:
    assert sorted(order) == list(range(1200))
    # Uniform permutations keep a position in place once on average, and move it by n / 3.
    assert np.sum(np.equal(order, np.arange(1200))) < 12
    assert np.abs(np.subtract(order, np.arange(1200))).mean() == pytest.approx(400, rel=0.15)
  assert orders[0] != orders[1]


def test_large_sources_keep_their_shares(monkeypatch):
  monkeypatch.setattr(mixtures, "MAX_EXACT", 100)  # 700 rows: as if there were more than a million
  mixture = make()
  assert collections.Counter(names(mixture, 7000)) == {"big": 6000, "middle": 900, "small": 100}


def test_same_seed_same_stream_and_any_start():
  one, two, other = make(seed=5), make(seed=5), make(seed=6)
  stream = [one.locate(i) for i in range(900)]
  assert [two.locate(i) for i in reversed(range(900))][::-1] == stream
  assert [two.locate(i) for i in range(450, 900)] == stream[450:]
  assert [other.locate(i) for i in range(900)] != stream
  assert [other.locate(i).source for i in range(900)] == [place.source for place in stream]
  for i in (0, 17, 899):
    place = stream[i]
    assert one[i] == {"from": place.source, "i": place.row}
    assert one.where(i) == f"{place.source}[{place.row}]"


def test_without_a_seed_sources_keep_their_order():
  mixture = make(seed=None)
  rows = [mixture.locate(i) for i in range(1400)]
  middle = [place.row for place in rows if place.source == "middle"]
  assert middle == [*range(90), *range(90)]


def test_sources_shuffle_apart():
  mixture = make({"a": 50, "b": 50})
  places = [mixture.locate(i) for i in range(100)]
  a, b = ([place.row for place in places if place.source == name] for name in "ab")
  assert sorted(a) == sorted(b) == list(range(50)) and a != b


@pytest.mark.parametrize(
  ("sizes", "options", "message"),
  [
    ({}, {}, "at least one source"),
    ({"a": 3, "b": 0}, {}, "source 'b' has no rows"),
    ({"a": 3}, {"temperature": 0}, "temperature must be more than 0, got 0"),
    ({"a": 3}, {"temperature": math.nan}, "temperature must be more than 0, got nan"),
    ({"a": 3}, {"weights": {"b": 1}}, r"weights are for \['b'\], the sources are \['a'\]"),
    ({"a": 3}, {"weights": {"a": 0}}, "weight of source 'a' must be more than 0, got 0"),
    ({"a": 3}, {"weights": {"a": math.inf}}, "weight of source 'a'"),
  ],
)
def test_bad_input(sizes, options, message):
  with pytest.raises(ValueError, match=message):
    make(sizes, **options)
