"""The TPU kernel of ragged paged attention in interpret mode, against its contract.

Memory that was not written is NaN there, and so is what the cases put wherever nothing may be read;
copies that race with reads or writes are found.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.ragged_paged_attention import ragged_paged_attention, reference
from kernels.ragged_paged_attention.layout import Tiles
from kernels.ragged_paged_attention.shapes import Shape
from tests.kernels.paged_cases import launch

TILES = Tiles(rows=128, keys=32, heads=2)
# A chunk behind old tokens, single tokens, nothing, a prompt of several tiles, old tokens only.
SEQUENCES = ((5, 8), (1, 73), (0, 0), (1, 1), (70, 101), (0, 4), (1, 33), (2, 64))
BASE = Shape("base", 4, 2, 64, 64, SEQUENCES, 32, dtype="float32", kv_dtype="float32")
BFLOAT16 = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
CASES = {
  "window, no grouping": {"window": 9, "groups": 4} | BFLOAT16,
  "soft cap, sinks, groups of 8": {"heads": 8, "groups": 1, "soft_cap": 2.0, "sinks": True}
  | {"width": 128, "value_width": 128},
  "width 256, groups of 3": {"heads": 6, "width": 256, "value_width": 256, "window": 40} | BFLOAT16,
  "int8": {"dtype": "bfloat16", "kv_dtype": "int8", "window": 64, "sinks": True},
}
MORE_CASES = {
  "float32": {},
  "values narrower than keys, groups of 7": {"heads": 7, "groups": 1, "sinks": True, "window": 33}
  | {"width": 192, "value_width": 128},
  "float8, groups of 5": {"heads": 5, "groups": 1, "dtype": "bfloat16"}
  | {"kv_dtype": "float8_e4m3fn", "soft_cap": 3.0},
}


def split(options: dict) -> tuple[dict, dict]:
  """What is traced, and what is not."""
  arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray | jax.Array)}
  return arrays, {name: x for name, x in options.items() if name not in arrays}


def jitted(function, options: dict):
  """function(positional, arrays) with the static options."""
  return jax.jit(lambda positional, arrays: function(*positional, **arrays, **options))


def interpreted(function, *arguments):
  """The result of a jitted function whose Pallas kernels run in TPU interpret mode."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  pltpu.reset_tpu_interpret_mode_state()
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    result = jax.block_until_ready(function(*arguments))
  assert not interpret_pallas_call.races.races_found
  return result


def compare(got, want, dtype: str) -> None:
  """(out, pages, lse): the pages bit for bit, NaN where it was before."""
  out, kept, lse = (np.asarray(x, np.float32) for x in got)
  want_out, want_kept, want_lse = (np.asarray(x, np.float32) for x in want)
  np.testing.assert_array_equal(kept, want_kept)
  # In bfloat16 weights, queries times their factor and outputs are rounded: 2^-8 each.
  near = 2e-5 if dtype == "float32" else 4 * 2**-8 * np.abs(want_out).max()
  np.testing.assert_allclose(out, want_out, atol=near)
  np.testing.assert_allclose(lse, want_lse, atol=2e-5 if dtype == "float32" else 0.03, rtol=0.01)


@pytest.mark.parametrize(
  "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)]
)
def test_kernel_meets_the_contract(name):
  shape = dataclasses.replace(BASE, **(CASES | MORE_CASES)[name])
  positional, options = launch(shape)
  arrays, static = split(options | {"return_lse": True})
  want = jitted(reference.attention, static)(positional, arrays)
  kernel = jitted(ragged_paged_attention, static | {"chip": "v5e", "tiles": TILES})
  compare(interpreted(kernel, positional, arrays), want, shape.dtype)


SLOTS, TOKENS, LONGEST = 4, 40, 96


@pytest.fixture(scope="module")
def forms():
  """The kernel and the reference for any lengths: one compilation."""
  shape = dataclasses.replace(BASE, window=37, sequences=((TOKENS, LONGEST),) * SLOTS)
  static = {"scale": 0.125, "window": shape.window, "return_lse": True}
  kernel = jitted(ragged_paged_attention, static | {"chip": "v6e", "tiles": TILES})
  return shape, kernel, jitted(reference.attention, static)


def of_lengths(shape: Shape, sequences) -> tuple[tuple, dict]:
  """A launch of these lengths in arrays of one size."""
  shape = dataclasses.replace(shape, sequences=tuple(sequences))
  spare = SLOTS * LONGEST // 32 + 1 - sum(-(-length // 32) for _, length in sequences)
  positional, options = launch(shape, spare_pages=spare)
  rows = TOKENS - len(positional[0])
  fit = lambda x: jnp.pad(x, ((0, rows), (0, 0), (0, 0)), constant_values=np.nan)
  arrays, _ = split(options)
  columns = LONGEST // 32 + 1 - arrays["page_table"].shape[1]
  arrays["page_table"] = np.pad(arrays["page_table"], ((0, 0), (0, columns)))
  return (*(fit(x) for x in positional[:3]), positional[3]), arrays


@st.composite
def lengths(draw):
  """(new, all) of every slot; the new ones fit."""
  left, found = TOKENS - 3, []
  for _ in range(SLOTS):
    new = draw(
      st.integers(0, left) | st.sampled_from([0, 1]).filter(lambda n, left=left: n <= left)
    )
    found.append((new, new + draw(st.integers(0, LONGEST - new))))
    left -= new
  return tuple(found)


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_kernel_meets_the_contract_at_any_lengths(forms, examples):
  shape, kernel, contract = forms

  @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @given(sequences=lengths())
  def check(sequences):
    positional, arrays = of_lengths(shape, sequences)
    compare(interpreted(kernel, positional, arrays), contract(positional, arrays), "float32")

  check()


def test_a_sequence_does_not_depend_on_its_batch(forms):
  """Bit for bit, and so do its pages; alone, among others, and at another place."""
  shape, kernel, _ = forms
  mine = ((30, 75), (1, 50))
  others = ((0, 0), (0, 9)), ((3, 40), (1, 96)), ((1, 64), (4, 4))
  batches = [(mine[0], *others[0], mine[1]), (mine[0], *others[1], mine[1])]
  batches.append((others[2][0], mine[0], mine[1], others[2][1]))
  found = []
  for batch in batches:
    positional, arrays = of_lengths(shape, batch)
    own = [batch.index(sequence) for sequence in mine]
    positional = given_the_same(positional, arrays, own)
    out, _, lse = interpreted(kernel, positional, arrays)
    rows = [slice(*arrays["q_starts"][n : n + 2]) for n in own]
    found.append([np.concatenate([np.asarray(x)[r] for r in rows]) for x in (out, lse)])
  for other in found[1:]:
    for a, b in zip(found[0], other):
      np.testing.assert_array_equal(a, b)
  assert np.abs(found[0][0]).min(axis=(1, 2)).all()


def given_the_same(positional, arrays, own) -> tuple:
  """The arguments, with sequences `own` of the same numbers wherever they stand."""
  rng = np.random.default_rng(7)
  q, k, v, kept = (np.array(x) for x in positional)
  for n in own:
    rows = slice(*arrays["q_starts"][n : n + 2])
    for x in (q, k, v):
      x[rows] = rng.normal(size=x[rows].shape)
    used = arrays["page_table"][n, : -(-arrays["kv_lengths"][n] // 32)]
    kept[used] = rng.normal(size=(LONGEST // 32, *kept.shape[1:]))[: len(used)]
  return tuple(jnp.asarray(x) for x in (q, k, v, kept))


def test_positions_beyond_16_bits():
  """A token at position 70,000: what its window reaches is what a short sequence has there."""
  shape = dataclasses.replace(BASE, heads=2, groups=1, window=40, sequences=((1, 49),))
  positional, options = launch(shape)
  arrays, static = split(options | {"return_lse": True})
  want = jitted(reference.attention, static)(positional, arrays)
  before = 69_952 // 32  # pages that are never read
  table = np.full((1, before + 3), 1 << 20, np.int32)
  table[0, before:] = arrays["page_table"][0]
  arrays |= {"page_table": table, "kv_lengths": np.asarray([70_001], np.int32)}
  kernel = jitted(ragged_paged_attention, static | {"chip": "tpu7x", "tiles": TILES})
  compare(interpreted(kernel, positional, arrays), want, "float32")


def test_what_does_not_fit_is_refused():
  positional, options = launch(BASE)
  with pytest.raises(ValueError, match=r"rows of float32, found 4|multiple of 8 rows"):
    q, k, v, kept = positional
    ragged_paged_attention(q, k, v, kept[:, :, :4], **options, chip="v5e")
  with pytest.raises(ValueError, match="expected one of v5e, v5p, v6e, tpu7x, found 'v9'"):
    ragged_paged_attention(*positional, **options, chip="v9")
  with pytest.raises(ValueError, match="rows to be a multiple of 128, found 100"):
    Tiles(rows=100)
