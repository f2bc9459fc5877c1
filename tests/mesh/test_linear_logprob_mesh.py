"""linear_logprob with its vocabulary and its rows split: values and gradients of one device."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_logprob import IGNORE, linear_logprob, reference
from pt_jax import sharding

pytestmark = pytest.mark.mesh

N, E, V, K = 32, 16, 512, 2
TILES = {"rows": 16, "tokens": 128, "backward_rows": 16, "backward_tokens": 128}
OPTIONS = {"temperature": 0.8, "soft_cap": 6.0}


def inputs():
  rng = np.random.default_rng(0)
  hidden, matrix = (rng.normal(size=shape).astype(np.float32) for shape in ((N, E), (V, E)))
  labels = rng.integers(0, V, (N, K)).astype(np.int32)
  labels[3, 1] = IGNORE
  weights = rng.normal(size=(N,)).astype(np.float32)
  return hidden, matrix, labels, weights


def value_and_gradients(function, hidden, matrix, labels, weights):
  def total(hidden, matrix):
    stats = function(hidden, matrix, labels)
    value = (stats.logprobs.sum(-1) + stats.entropy + 0.5 * stats.lse) * weights
    return value.sum(), stats

  gradients, stats = jax.grad(total, (0, 1), has_aux=True)(hidden, matrix)
  return gradients, stats


@pytest.mark.parametrize("form", ["xla", "tpu"])
def test_split_vocabulary_and_rows(form):
  own = {"xla": {"chunk": 64}, "tpu": {"chip": "v5e", "tiles": TILES}}[form]
  rows, columns = jax.P("data"), jax.P("tensor")
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  mode = pltpu.force_tpu_interpret_mode(params) if form == "tpu" else contextlib.nullcontext()
  mesh = sharding.make_mesh(data=2, tensor=4)
  with jax.set_mesh(mesh), mode:
    local = functools.partial(linear_logprob, axis_name="tensor", **OPTIONS, **own)
    out = reference.Statistics(*(rows,) * 4)
    split = jax.shard_map(local, in_specs=(rows, columns, rows), out_specs=out)
    hidden, matrix, labels, weights = inputs()
    placed = [jax.device_put(x, s) for x, s in zip(inputs(), (rows, columns, rows, rows))]
    got = jax.device_get(jax.jit(functools.partial(value_and_gradients, split))(*placed))
  whole = functools.partial(reference.linear_logprob, **OPTIONS)
  want = value_and_gradients(whole, hidden, matrix, labels, weights)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
