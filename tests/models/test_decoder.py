"""The decoder's invariances: packing, padding, segments, remat, unroll; and RoPE from the paper.

Parity with transformers is in test_hf.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.models import decoder
from pt_jax.models.config import Llama3Rope, ModelConfig

MODEL = ModelConfig(
  vocab_size=50,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=4,
  hidden=24,
  qk_norm=True,
  attention_bias=True,
  remat="none",
)
LENGTHS = (5, 4, 6)  # three samples
WIDTH = 12

pytestmark = pytest.mark.usefixtures("one_device")


@functools.cache
def params():
  """Weights 3 times as wide as they start, so that attention is far from uniform; random biases."""
  made = jax.jit(lambda key: decoder.init(key, MODEL, sharding.USE))(jax.random.key(0))
  blocks = dict(made["blocks"])
  for name in ("q", "k", "v"):
    blocks[name] = 3 * blocks[name]
    bias = blocks[f"{name}_bias"]
    blocks[f"{name}_bias"] = 0.3 * jax.random.normal(jax.random.key(len(name)), bias.shape)
  return {**made, "blocks": blocks}


def lay_out(rows, junk=0):
  """tokens, positions, segment_ids [B, WIDTH] of rows that each hold some of the samples."""
  rng = np.random.default_rng(1)
  samples = [rng.integers(0, MODEL.vocab_size, size) for size in LENGTHS]
  tokens = np.full((len(rows), WIDTH), junk, np.int32)
  positions = np.full((len(rows), WIDTH), junk, np.int32)
  segments = np.full((len(rows), WIDTH), -1, np.int32)
  places = {}
  for row, held in enumerate(rows):
    start = 0
    for segment, index in enumerate(held):
      place = (row, slice(start, start + LENGTHS[index]))
      tokens[place] = samples[index]
      positions[place] = np.arange(LENGTHS[index])
      segments[place] = segment
      places[index], start = place, place[1].stop
  return (tokens, positions, segments), [places[index] for index in range(len(LENGTHS))]


APART, PACKED = ((0,), (1,), (2,)), ((0, 2), (1,), ())


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(c, weights, batch, cotangent):
  """Hidden states, and the gradient of sum(hidden * cotangent) by weights."""

  def total(weights):
    hidden = decoder.forward(weights, c, *batch)
    return jnp.sum(hidden.astype(jnp.float32) * cotangent), hidden

  gradient, hidden = jax.grad(total, has_aux=True)(weights)
  return hidden, gradient


def cotangents(places, rows=3):
  """One random number for every hidden unit of every token, wherever the token stands."""
  rng = np.random.default_rng(2)
  out = np.zeros((rows, WIDTH, MODEL.width), np.float32)
  for place, size in zip(places, LENGTHS):
    out[place] = rng.normal(size=(size, MODEL.width))
  return out


def run(rows, c=MODEL, junk=0):
  """Hidden states of each sample, and the gradient."""
  batch, places = lay_out(rows, junk)
  hidden, gradient = value_and_gradient(c, params(), batch, cotangents(places))
  return [np.asarray(hidden[place]) for place in places], gradient


def assert_close(got, want, rtol=1e-5):
  """Every leaf within rtol of the largest value of that leaf."""
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())
  jax.tree.map(close, got, want)


def test_packed_is_unpacked():
  apart, packed = run(APART), run(PACKED)
  assert_close(packed, apart)
  # Negative control: without segment ids the second sample of a row sees the first.
  (tokens, positions, segments), places = lay_out(PACKED)
  merged = (tokens, positions, np.where(segments >= 0, 0, -1).astype(np.int32))
  hidden, _ = value_and_gradient(MODEL, params(), merged, cotangents(places))
  assert np.abs(hidden[places[2]] - apart[0][2]).max() > 0.1


def test_padding_is_not_read():
  zeros, junk = run(PACKED), run(PACKED, junk=7)
  jax.tree.map(np.testing.assert_array_equal, junk[0], zeros[0])
  jax.tree.map(np.testing.assert_array_equal, junk[1], zeros[1])


def test_nothing_leaks_into_another_segment():
  """Token 3 of the first sample changes: the second one of the row does not, to the last bit."""
  (tokens, positions, segments), places = lay_out(PACKED)
  changed = tokens.copy()
  changed[0, 3] = (changed[0, 3] + 1) % MODEL.vocab_size
  only_second = cotangents(places)
  only_second[places[0]] = 0
  outcomes = [
    value_and_gradient(MODEL, params(), (ids, positions, segments), only_second)
    for ids in (tokens, changed)
  ]
  (hidden, gradient), (other_hidden, other_gradient) = outcomes
  np.testing.assert_array_equal(hidden[places[2]], other_hidden[places[2]])
  np.testing.assert_array_equal(hidden[places[1]], other_hidden[places[1]])
  jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)
  # Negative control, and causality: the first sample changes from token 3 on.
  first, other_first = hidden[places[0]], other_hidden[places[0]]
  np.testing.assert_array_equal(first[:3], other_first[:3])
  assert (np.abs(first[3:] - other_first[3:]).max(-1) > 1e-3).all()
  every = [
    value_and_gradient(MODEL, params(), (ids, positions, segments), cotangents(places))[1]
    for ids in (tokens, changed)
  ]
  assert np.abs(every[0]["blocks"]["q"] - every[1]["blocks"]["q"]).max() > 1e-3


def test_positions_matter_only_by_their_differences():
  """RoPE is relative: moved by 100 positions a sample is the same, stretched by 2 it is not."""
  (tokens, positions, segments), places = lay_out(APART)
  wide = lambda x, fill: np.pad(x, ((0, 0), (0, 110)), constant_values=fill)
  tokens, segments = wide(tokens, 0), wide(segments, -1)
  zero = np.zeros((*tokens.shape, MODEL.width), np.float32)
  at = lambda p: value_and_gradient(
    MODEL, params(), (tokens, wide(p.astype(np.int32), 0), segments), zero
  )[0]
  here, moved, stretched = at(positions), at(positions + 100), at(2 * positions)
  for place in places:
    np.testing.assert_allclose(moved[place], here[place], atol=2e-5)
  assert np.abs(stretched[places[0]] - here[places[0]]).max() > 1e-2


@pytest.mark.parametrize(
  "changes",
  [
    {"remat": "block"},
    {"unroll": True},
    {"remat": "block", "unroll": True},
    {"remat": "attention"},
    {"remat": "heads"},
    {"remat": "projections"},
    {"remat": "offload"},
  ],
  ids=str,
)
def test_how_blocks_are_run_changes_nothing(changes):
  assert_close(run(PACKED, dataclasses.replace(MODEL, **changes)), run(PACKED), 2e-6)


def operations(jaxpr, name):
  """How often a primitive stands in a program, its inner programs included."""
  count = 0
  for equation in jaxpr.eqns:
    count += equation.primitive.name == name
    for inner in jax.core.jaxprs_in_params(equation.params):
      count += operations(inner, name)
  return count


def test_a_policy_keeps_what_it_says():
  """What a policy keeps is not computed again: fewer products, and softmax's exponentials."""
  batch, places = lay_out(PACKED)
  counts = {}
  for remat in ("none", "block", "attention", "heads", "projections"):
    c = dataclasses.replace(MODEL, remat=remat)
    loss = lambda w: jnp.sum(decoder.forward(w, c, *batch) * cotangents(places))  # noqa: B023
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params()).jaxpr
    counts[remat] = [operations(jaxpr, name) for name in ("dot_general", "exp")]
  products, exponentials = zip(*counts.values())
  assert products[1] > products[2] > products[3] > products[4] >= products[0]
  assert exponentials[1] > exponentials[2]


def test_bfloat16_compute_is_near_float32():
  c = dataclasses.replace(MODEL, compute_dtype="bfloat16")
  (half, gradient), (full, full_gradient) = run(PACKED, c), run(PACKED)
  for a, b in zip(half, full):
    assert a.dtype == jnp.bfloat16
    difference = np.abs(a.astype(np.float32) - b)
    assert 1e-4 < difference.mean() < 0.05 * np.abs(b).mean() + 0.01
  norm = lambda tree: math.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(tree)))
  error = jax.tree.map(lambda a, b: a - b, gradient, full_gradient)
  assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
  assert norm(error) < 0.1 * norm(full_gradient)


def test_grouped_queries_are_repeated_keys():
  """A model of 2 key heads is one of 4 whose heads are equal in pairs."""
  wide = dataclasses.replace(MODEL, kv_heads=4)
  blocks = dict(params()["blocks"])
  for name, axis in (("k", 2), ("v", 2), ("k_bias", 1), ("v_bias", 1)):
    blocks[name] = jnp.repeat(blocks[name], 2, axis=axis)
  batch, places = lay_out(PACKED)
  repeated = {**params(), "blocks": blocks}
  got, _ = value_and_gradient(wide, repeated, batch, cotangents(places))
  for place, want in zip(places, run(PACKED)[0]):
    np.testing.assert_allclose(got[place], want, atol=1e-5)


def llama3_frequencies(theta, width, s: Llama3Rope) -> list[float]:
  """`apply_scaling` of the Llama 3.1 reference code (models/llama3/reference_impl/model.py)."""
  scaled = []
  for i in range(0, width, 2):
    frequency = 1.0 / theta ** (i / width)
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_length / s.high_frequency_factor:
      scaled.append(frequency)
    elif wavelength > s.original_length / s.low_frequency_factor:
      scaled.append(frequency / s.factor)
    else:
      smooth = (s.original_length / wavelength - s.low_frequency_factor) / (
        s.high_frequency_factor - s.low_frequency_factor
      )
      scaled.append((1 - smooth) * frequency / s.factor + smooth * frequency)
  return scaled


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope(factor):
  scaling = Llama3Rope(factor=factor)
  c = dataclasses.replace(MODEL, head_dim=128, rope_theta=500_000.0, rope_scaling=scaling)
  want = np.array(llama3_frequencies(500_000.0, 128, scaling))
  plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
  kept, divided = np.isclose(want, plain), np.isclose(want, plain / factor)
  assert kept.sum() > 20 and divided.sum() > 20 and (~kept & ~divided).sum() > 3
  np.testing.assert_allclose(decoder.rope_frequencies(c), want, rtol=2e-6)
  plain_config = dataclasses.replace(c, rope_scaling=None)
  np.testing.assert_allclose(decoder.rope_frequencies(plain_config), plain, rtol=2e-6)


def test_rotation_is_that_of_the_paper():
  """arXiv 2104.09864: the pair (x_i, x_{i+K/2}) as a complex number times exp(j m theta_i)."""
  c = dataclasses.replace(MODEL, head_dim=6)
  rng = np.random.default_rng(0)
  x, positions = rng.normal(size=(2, 3, 4, 6)).astype(np.float32), rng.integers(0, 99, (2, 3))
  angles = decoder.rope_angles(decoder.rope_table(c, 99), jnp.asarray(positions))
  turned = decoder.rotate(x, *angles)
  theta = 10_000.0 ** (-np.arange(0, 6, 2) / 6)
  z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * positions[:, :, None, None] * theta)
  np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), atol=2e-5)


def test_a_position_past_the_limit_is_not_taken_for_another():
  cos, sin = decoder.rope_angles(decoder.rope_table(MODEL, 8), jnp.array([[0, 7, 8]]))
  assert np.isfinite(cos[0, :2]).all() and np.isfinite(sin[0, :2]).all()
  assert np.isnan(cos[0, 2]).all() and np.isnan(sin[0, 2]).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers": 0}, "model config: layers must be positive, found 0"),
    ({"kv_heads": 3}, r"model config: heads \(4\) must be a multiple of kv_heads \(3\)"),
    ({"head_dim": 5}, "model config: head_dim must be even for RoPE, found 5"),
  ],
)
def test_bad_config(changes, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    dataclasses.replace(MODEL, **changes)
