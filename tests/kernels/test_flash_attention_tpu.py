"""The Pallas kernels in TPU interpret mode against the reference: races detected, memory NaN."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import blocks, flash_attention, reference
from kernels.flash_attention.blocks import DIAGONAL, FIRST, FULL, LAST, live_blocks
from kernels.flash_attention.reference import Features
from kernels.flash_attention.tiles import Tiles
from tests.kernels.attention_cases import Case, data, half, run

SMALL = Tiles(256, 256, 128, 128)
OBLONG = Tiles(256, 128, 256, 128)  # no block is cut from corner to corner
PARTS = Tiles(128, 128, 128, 128, parts=2)
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


@pytest.fixture(autouse=True)
def tpu():
  options = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(options):
    yield
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found


def on_tpu(case, x, tiles=SMALL, **options):
  return run(flash_attention, case, x, tiles=(tiles, tiles), chip="v5e", **options)


@pytest.mark.parametrize(
  ("case", "tiles"),
  [
    # Query heads of a key head: 1 to 8. Two blocks of queries and keys, the last of 44 rows;
    # segments begin and end inside of tiles.
    (Case(queries=300, keys=300, heads=4, groups=1, width=64, value_width=64), SMALL),
    (Case(1, 520, 520, 8, 1, 16, 16, window=100, soft_cap=2.0, sinks=True), SMALL),
    # One shard of a context axis whose rows begin inside of a block; values wider than keys.
    (Case(2, 200, 500, 3, 3, 16, 48, offset=230, sinks=True, window=300), OBLONG),
    (Case(1, 130, 300, 6, 2, 192, 128, causal=False, soft_cap=3.0), OBLONG),
    (Case(2, 600, 600, 2, 2, 16, 16), PARTS),
    (Case(1, 300, 500, 5, 1, 128, 128, window=150, offset=200), PARTS),
    # Continuations of two prefixes; the window reaches over some but not all of each.
    (Case(1, 300, 300, 6, 1, 256, 256, window=40, soft_cap=2.0, sinks=True, shared=True), SMALL),
    (Case(1, 200, 500, 7, 1, 16, 16, offset=230, shared=True), OBLONG),
  ],
  ids=str,
)
def test_values_and_gradients_are_the_references(case, tiles):
  x = data(case)
  for name, a, b in zip(NAMES, on_tpu(case, x, tiles), run(reference.attention, case, x)):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5, err_msg=name)


def test_bfloat16_is_as_near_to_float32_as_the_xla_form():
  """Errors relative to the largest entry, of the kernel at most 1.5 times XLA's."""
  case = Case(queries=300, keys=300, width=32, value_width=32, sinks=True)
  x = data(case)
  want = run(reference.attention, case, x)
  kernel, plain = on_tpu(case, half(x)), run(flash_attention, case, half(x))
  for name, a, b, c in zip(NAMES, kernel, plain, want):
    assert a.dtype == b.dtype
    error = lambda z, c=c: np.abs(np.asarray(z, np.float32) - c).max() / np.abs(c).max()
    assert 0 < error(a) < 1.5 * error(b) + 1e-6, name
    assert error(a) < 2e-2


# With two query heads a key head, what a turn needs may be on its way out; with one, a turn may go
# on with the sums of the turn before.
@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_live_blocks_and_a_traced_offset(groups):
  """One compilation, segments and offsets of all kinds: the number of turns of the grid is data."""
  case = Case(2, 300, 384, 2, groups, 16, 16, window=200)

  @hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
  @hypothesis.given(st.lists(st.integers(-2, 4), min_size=8, max_size=8), st.integers(0, 300))
  def check(ids, offset):
    x = data(case, offset)
    k_segments = np.repeat(np.asarray([ids[:5], ids[3:]], np.int32), (100, 7, 127, 60, 90), axis=1)
    q_segments = np.concatenate([k_segments, k_segments[:, ::-1]], 1)[:, offset : offset + 300]
    x = x._replace(q_segments=q_segments, k_segments=k_segments)
    near(on_tpu(case, x, PARTS, offset=offset), run(reference.attention, case, x, offset=offset))

  check()


def near(got, want, most: float = 3e-5) -> None:
  """Of values and gradients, all within `most` of the largest entry, or of 1."""
  for name, a, b in zip(NAMES, got, want, strict=False):
    largest = max(1.0, np.abs(np.where(b > -1e29, b, 0)).max())
    np.testing.assert_allclose(a, b, atol=most * largest, rtol=most, err_msg=name)


@pytest.mark.parametrize("examples", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_any_shape_and_feature_is_the_references(examples):
  """Rows of any length, any number of segments and of heads, in float32 and bfloat16."""

  @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True)
  @hypothesis.given(st.data())
  def check(draw):
    pick = lambda low, high: draw.draw(st.integers(low, high))
    of = lambda *choices: draw.draw(st.sampled_from(choices))
    groups, causal = pick(1, 2), of(True, True, False)
    case = Case(
      batch=pick(1, 2),
      queries=pick(1, 300),
      keys=pick(8, 400),
      heads=groups * pick(1, 8),
      groups=groups,
      width=of(8, 64, 128, 192, 256),
      value_width=of(8, 64, 128, 256),
      offset=pick(0, 200),
      causal=causal,
      window=of(None, pick(1, 250)) if causal else None,
      soft_cap=of(None, 2.0),
      sinks=of(False, True),
      shared=of(False, True),
    )
    x = data(case, pick(0, 99))
    if of(False, True):
      x = x._replace(q_segments=x.q_segments // 2, k_segments=x.k_segments // 2)  # longer ones
    rounded = of(False, True)
    x = half(x) if rounded else x
    as_float = lambda found: [np.asarray(each, np.float32) for each in found]
    got, want = (
      as_float(on_tpu(case, x, of(SMALL, OBLONG, PARTS))),
      as_float(run(reference.attention, case, x)),
    )
    near(got, want, 2e-2 if rounded else 3e-5)

  check()


def test_rows_of_padding_alone():
  case = Case(1, 140, 140, 2, 1, 16, 16)
  x = data(case)._replace(
    q_segments=np.full((1, 140), -1, np.int32), k_segments=np.full((1, 140), -2, np.int32)
  )
  out, lse, *gradients = on_tpu(case, x, Tiles(128, 128, 128, 128))
  assert (np.asarray(lse) == reference.MASKED).all()
  for z in (out, *gradients):
    assert not np.asarray(z).any()


def test_live_blocks_are_those_that_hold_something():
  """Against the dense mask, block by block; a row of many segments has blocks in proportion."""
  block, length = 128, 1024
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(0, 12, (2, length))).astype(np.int32)
  segments[1, 300:] = -1
  prefixes = np.where(segments < 0, -1, segments // 6 * 6)
  for window, shared in ((None, False), (200, False), (None, True)):
    features = Features(1.0, window=window)
    ago = np.arange(length)[:, None] - np.arange(length)
    mask = segments[:, :, None] == segments[:, None]
    if shared:
      mask |= prefixes[:, :, None] == segments[:, None]
    mask &= (segments >= 0)[:, :, None] & (ago >= 0) & (ago < (window or length))
    q_ids = np.stack([segments, prefixes] if shared else [segments], 1)
    cut = mask.reshape(2, 8, block, 8, block)
    some, every = cut.any((2, 4)), cut.all((2, 4))
    for by_keys in (False, True):
      for parts in (1, 2):
        ids, sizes = (q_ids, segments[:, None]), (block, block)
        found = live_blocks(*ids, jnp.int32(0), features, *sizes, by_keys=by_keys, parts=parts)
        kinds = np.zeros((2, 8, 8), np.int32)
        ends = []
        for row, other, flags in list(zip(*map(np.asarray, found[:3])))[: int(found.count)]:
          batch, own = int(blocks.batch_of(row)), int(blocks.block_of(row))
          for part in range(parts):
            place = parts * int(other) + part
            kind = blocks.kind_of(flags, part)
            kinds[(batch, place, own) if by_keys else (batch, own, place)] = kind
          ends.append((8 * batch + own, bool(flags & FIRST), bool(flags & LAST)))
        assert ((kinds > 0) == some).all()
        assert (every[kinds == FULL]).all()
        assert ((kinds == DIAGONAL) == (some & np.eye(8, dtype=bool))).all()
        rows = [row for row, first, _ in ends if first]
        assert rows == sorted({row for row, *_ in ends}) == list(range(16))
        assert rows == [row for row, _, last in ends if last]
        others = some.swapaxes(1, 2) if by_keys else some
        entries = others.reshape(2, 8, 8 // parts, parts).any(-1)
        empty = 16 - np.count_nonzero(entries.any(2))
        assert int(found.count) == entries.sum() + empty < 40


@pytest.mark.parametrize(
  ("sizes", "said"), [((256, 256, 96, 128), "tiles of whole 128 rows"), ((256, 128, 128, 256), "")]
)
def test_tiles_that_do_not_fit_are_refused(sizes, said):
  with pytest.raises(ValueError, match=f"expected blocks of whole tiles.*{said}"):
    Tiles(*sizes)


def test_chips_that_are_none_are_refused():
  case = Case()
  with pytest.raises(ValueError, match="expected one of v5e, v5p, v6e, tpu7x, found 'v3'"):
    run(flash_attention, case, data(case), chip="v3")
