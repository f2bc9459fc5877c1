"""The contract of ragged paged attention, and what runs without a TPU, against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.flash_attention import reference as flash
from kernels.ragged_paged_attention import pages, ragged_paged_attention, reference
from kernels.ragged_paged_attention.shapes import Shape
from tests.kernels.paged_cases import launch, numpy_attention

# A chunk behind 3 old tokens, single tokens, nothing at all, a whole prompt, old tokens only.
SEQUENCES = ((5, 8), (1, 13), (0, 0), (1, 1), (9, 9), (0, 4), (2, 17))
PLAIN = Shape("plain", 4, 2, 8, 8, SEQUENCES, 4, dtype="float32", kv_dtype="float32")
CASES = {
  "plain": {},
  "one head of keys": {"groups": 1},
  "no grouping": {"groups": 4},
  "narrow window": {"window": 1},
  "window": {"window": 6},
  "soft cap": {"soft_cap": 1.5},
  "sinks": {"sinks": True, "width": 64, "value_width": 64},
  "all at once": {"window": 5, "soft_cap": 2.0, "sinks": True, "width": 16, "value_width": 24},
  "wide": {"width": 192, "value_width": 128, "sinks": True},
  "int8": {"kv_dtype": "int8", "sinks": True},
  "fp8": {"kv_dtype": "float8_e4m3fn", "window": 6},
  "pages of one row": {"page_rows": 1},
}


def run(form, given, options, **more):
  arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
  rest = {name: x for name, x in options.items() if name not in arrays} | more
  return jax.jit(lambda given, arrays: form(*given, **arrays, **rest))(given, arrays)


@pytest.mark.parametrize("form", [reference.attention, ragged_paged_attention])
@pytest.mark.parametrize("name", CASES)
def test_is_the_plain_loop(name, form):
  shape = dataclasses.replace(PLAIN, **CASES[name])
  given, options = launch(shape)
  out, kept, lse = run(form, given, options, return_lse=True)
  want, want_kept, want_lse = numpy_attention(*given, **options)
  np.testing.assert_array_equal(np.asarray(kept, np.float32), want_kept)  # NaN where it was, too
  np.testing.assert_allclose(out, want, atol=2e-5)
  np.testing.assert_allclose(lse, want_lse, atol=2e-5)
  assert not np.asarray(out)[shape.tokens :].any()


def test_what_is_stored_in_8_bits():
  """Round to even, cut at the largest value; float8's largest is 448."""
  x = jnp.asarray([[0.5, 1.5, 2.5, -3.5, 400.0, -400.0, 0.1, 0.0]])
  one = jnp.ones((1, 1))
  assert pages.stored(x, one, jnp.int8).tolist() == [[0, 2, 2, -4, 127, -127, 0, 0]]
  got = pages.stored(x * 2, one, jnp.float8_e4m3fn).astype(jnp.float32)
  assert got.tolist() == [[1.0, 3.0, 5.0, -7.0, 448.0, -448.0, 0.203125, 0.0]]


def test_rows_fit_the_lanes():
  assert [pages.row_width(k, k) for k in (8, 64, 80, 128, 256)] == [16, 128, 256, 256, 512]
  assert pages.row_width(192, 128) == 384 and pages.value_offset(192, 128) == 256


@pytest.mark.parametrize("window", [None, 7])
def test_a_prompt_in_chunks_is_a_packed_row(window):
  """Two prompts, chunk by chunk and then token by token, give what the trainer's attention gives
  for a row that holds them both."""
  lengths, heads, groups, width, size = (23, 18), 4, 2, 16, 8
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 23, heads, width)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 23, groups, width)).astype(np.float32)
  packed = [np.concatenate([x[0], x[1, : lengths[1]]])[None] for x in (q, k, v)]
  segments = jnp.asarray([[0] * 23 + [1] * 18])
  sinks = rng.normal(size=heads).astype(np.float32)
  features = {"scale": width**-0.5, "window": window, "sinks": sinks, "soft_cap": 2.0}
  want, want_lse = flash.attention(
    *packed, q_segments=segments, k_segments=segments, return_lse=True, **features
  )
  kept = pages.empty_pages(6, size, groups, width, width, jnp.float32)
  table = np.asarray([[5, 0, 3], [1, 4, 2]], np.int32)
  step = jax.jit(lambda *x, **o: ragged_paged_attention(*x, **o, **features, return_lse=True))
  done, rows, lses = [0, 0], ([], []), ([], [])
  while done != list(lengths):
    take = [min(9 if at < 9 else 1, length - at) for at, length in zip(done, lengths)]
    starts = np.cumsum([0, *take]).astype(np.int32)
    new = [
      np.concatenate([x[i, a : a + n] for i, (a, n) in enumerate(zip(done, take))])
      for x in (q, k, v)
    ]
    new = [np.pad(x, ((0, 18 - len(x)), (0, 0), (0, 0))) for x in new]
    done = [a + n for a, n in zip(done, take)]
    lengths_now = np.asarray(done, np.int32)
    out, kept, lse = step(*new, kept, kv_lengths=lengths_now, q_starts=starts, page_table=table)
    for i in range(2):
      rows[i].append(out[starts[i] : starts[i + 1]])
      lses[i].append(lse[starts[i] : starts[i + 1]])
  np.testing.assert_allclose(np.concatenate(rows[0] + rows[1]), want[0], atol=1e-5)
  np.testing.assert_allclose(np.concatenate(lses[0] + lses[1]), want_lse[0], atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"window": 0}, "window >= 1, found 0"),
    ({"soft_cap": -1.0}, "soft_cap > 0, found -1.0"),
    ({"kv_scales": np.ones((2, 2), np.float32)}, "kv_scales are for pages of 8 bits"),
    ({"kv_lengths": np.zeros(7, np.int64)}, "kv_lengths in int32, found int64"),
    ({"kv_pages": jnp.zeros((3, 2, 4, 8))}, r"\[pages, 2, rows, 16\]"),
    ({"kv_pages": jnp.zeros((3, 2, 4, 16), jnp.int8)}, "need kv_scales"),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  given, options = launch(PLAIN)
  q, k_new, v_new, kept = given
  options |= change
  kept = options.pop("kv_pages", kept)
  with pytest.raises(ValueError, match=message):
    ragged_paged_attention(q, k_new, v_new, kept, **options)
