"""Attention in XLA blocks against the reference, and the reference against NumPy."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kernels.flash_attention import flash_attention, reference
from tests.kernels.attention_cases import Case, data, half, numpy_attention, run

FEATURES = [
  Case(),
  Case(window=7),
  Case(soft_cap=2.0),
  Case(sinks=True),
  Case(heads=6, groups=1, window=5, soft_cap=2.0, sinks=True, value_width=12),
  Case(queries=15, offset=20, window=9, sinks=True),
  Case(causal=False, sinks=True),
  Case(queries=30, keys=12, window=4),  # the last rows see nothing
  Case(shared=True),
  Case(queries=25, offset=15, window=6, sinks=True, shared=True),
]


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_reference_is_the_textbook_formula(case):
  x = data(case)
  for got, want in zip(run(reference.attention, case, x), numpy_attention(case, x)):
    np.testing.assert_allclose(got, want, atol=1e-5)


# 200: blocks of 64 and a last one of 8. 600: eight blocks of 75. 64 and 30: a single block.
@pytest.mark.parametrize(
  "case",
  [
    *(Case(queries=n, keys=n) for n in (200, 600, 64, 30)),
    *(case._replace(queries=5 * case.queries, keys=5 * case.keys) for case in FEATURES[1:]),
  ],
  ids=str,
)
def test_values_and_gradients_are_the_references(case):
  x = data(case)
  names = ("out", "lse", "dq", "dk", "dv", "dsinks")
  got, want = run(flash_attention, case, x), run(reference.attention, case, x)
  for name, a, b in zip(names, got, want):
    assert np.abs(b).max() > 0.1  # a gradient that is nothing would be equal to nothing
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5, err_msg=name)


def test_a_traced_offset_is_the_static_one():
  """Half of the queries against all keys, as one shard of a context axis has them."""
  case = Case(queries=100, keys=200, offset=100, window=30, sinks=True)
  x = data(case)
  for a, b in zip(run(flash_attention, case, x, offset=case.offset), run(flash_attention, case, x)):
    np.testing.assert_allclose(a, b, atol=2e-5)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_shape_and_feature_is_numpys(draw):
  pick = lambda low, high: draw.draw(st.integers(low, high))
  groups, offset = pick(1, 3), pick(0, 9)
  case = Case(
    batch=pick(1, 2),
    queries=pick(1, 90),
    keys=pick(2, 90),
    heads=groups * pick(1, 3),
    groups=groups,
    width=pick(1, 5),
    value_width=pick(1, 5),
    offset=offset,
    window=draw.draw(st.none() | st.integers(1, 60)),
    soft_cap=draw.draw(st.none() | st.floats(0.5, 5)),
    sinks=draw.draw(st.booleans()),
  )
  x = data(case, pick(0, 99))
  for got, want in zip(run(flash_attention, case, x, gradients=False), numpy_attention(case, x)):
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


def test_continuations_of_a_prefix_do_not_see_each_other():
  """The first of three changes: the others do not, to the last bit; the prefix changes: all do."""
  case = Case(batch=1, queries=200, keys=200, shared=True)
  x = data(case)
  out = lambda y: np.asarray(run(flash_attention, case, y, gradients=False)[0][0])
  moved = {}
  for name, segment in (("first", 1), ("prefix", 0)):
    change = (x.k_segments == segment)[..., None, None].astype(np.float32)
    different = (out(x) != out(x._replace(k=x.k + change, v=x.v + change))).any((1, 2))
    moved[name] = set(x.k_segments[0][different])
  assert moved == {"first": {1}, "prefix": {0, 1, 2, 3}}


def test_bfloat16_is_near_float32():
  """Each gradient within a few roundings (2^-8) of its largest entry, in its input's dtype."""
  case = Case(queries=200, keys=200)
  x = data(case)
  want = run(flash_attention, case, x)
  for i, (a, b) in enumerate(zip(run(flash_attention, case, half(x)), want)):
    assert a.dtype == ("float32" if i == 1 else "bfloat16")
    some = b > -1e29
    error = np.abs(np.asarray(a, np.float32) - b)[some].max() / np.abs(b[some]).max()
    assert 1e-4 < error < 3 * 2**-8


@pytest.mark.parametrize("attend", [reference.attention, flash_attention])
def test_padding_is_zero_and_has_no_gradient(attend):
  case = Case(queries=200, keys=200)
  x = data(case)
  padding = x.q_segments < 0
  assert padding[1].all() and padding[0].any() and not padding[0].all()
  out, lse, *gradients = run(attend, case, x)
  assert not np.asarray(out)[padding].any()
  assert (np.asarray(lse)[padding] == reference.MASKED).all()
  for g in (out, *gradients):
    assert np.isfinite(g).all()
    assert not np.asarray(g)[padding].any()
    assert np.asarray(g)[~padding].any()


def test_what_a_query_may_not_see_is_not_read():
  """The last segment changes: nothing before it does, to the last bit, across blocks too."""
  case = Case(queries=200, keys=200)
  x = data(case)
  last = x.q_segments[0] == x.q_segments[0].max()
  change = last[None, :, None, None].astype(np.float32)
  other = x._replace(q=x.q + change, k=x.k + change, v=x.v + change)
  before, after = (np.asarray(run(flash_attention, case, y)[0][0]) for y in (x, other))
  np.testing.assert_array_equal(before[~last], after[~last])
  assert np.abs(before[last] - after[last]).max() > 1e-2


ZEROS = np.zeros((2, 40), np.int32)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"window": 4, "q_prefixes": ZEROS}, "expected positions with window=4 and q_prefixes"),
    ({"positions": (ZEROS, ZEROS)}, "positions are read by a window only"),
    ({"window": 0}, "expected window >= 1, found 0"),
    ({"window": 4, "causal": False}, "expected causal=True"),
    ({"soft_cap": -1.0}, "expected soft_cap > 0, found -1.0"),
  ],
)
def test_features_that_mean_nothing_are_refused(change, said):
  case = Case()
  x = data(case)
  rows = {"q_segments": x.q_segments, "k_segments": x.k_segments, "scale": 1.0}
  with pytest.raises(ValueError, match=said):
    flash_attention(x.q, x.k, x.v, **rows, **change)


def test_shapes_that_do_not_fit_are_refused():
  x = data(Case())
  three = np.zeros((2, 40, 3, 8), np.float32)
  rows = {"q_segments": x.q_segments, "k_segments": x.k_segments, "scale": 1.0}
  with pytest.raises(ValueError, match="4 query heads do not divide by 3 key heads"):
    flash_attention(x.q, three, three, **rows)
