"""Tables, initialisation and `project`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import sharding, weights
from pt_jax.weights import Param

pytestmark = pytest.mark.usefixtures("one_device")

TABLE = {
  "out": Param((64, 32), ("vocab", "embed"), std=0.5, decay=True),
  "blocks": {
    "gain": Param((32,), (None,), mean=1.0).stack(3),
    "up": Param((32, 40), ("embed", "hidden"), std=0.1, mean=2.0).stack(3),
  },
}


@functools.cache
def init(dtype=jnp.float32, seed=0):
  make = lambda key: weights.init(key, TABLE, sharding.USE, jnp.dtype(dtype))
  return jax.jit(make)(jax.random.key(seed))


def test_names_and_counts():
  names = [name for name, _ in weights.named_rows(TABLE)]
  assert names == ["blocks.gain", "blocks.up", "out"]
  assert weights.count(TABLE) == 64 * 32 + 3 * 32 + 3 * 32 * 40
  row = TABLE["blocks"]["up"]
  assert (row.shape, row.axes) == ((3, 32, 40), ("layer", "embed", "hidden"))


def test_init_has_the_moments_of_the_table():
  params = init()
  assert (params["blocks"]["gain"] == 1).all()
  for w, mean, std in ((params["out"], 0, 0.5), (params["blocks"]["up"], 2, 0.1)):
    error = std / np.sqrt(w.size)
    assert abs(w.mean() - mean) < 5 * error
    assert abs(w.std() - std) < 5 * error
  layers = params["blocks"]["up"]
  assert np.abs(layers[0] - layers[1]).max() > 0.1, "every layer has values of its own"


def test_init_depends_on_seed_and_name_only():
  """A parameter keeps its values when others come or go; another name or seed has other values."""
  out = TABLE["out"]
  make = lambda key: weights.init(key, {"new": out, "out": out}, sharding.USE, jnp.dtype("float32"))
  other = jax.jit(make)(jax.random.key(0))
  np.testing.assert_array_equal(other["out"], init()["out"])
  assert np.abs(other["new"] - other["out"]).max() > 0.1
  assert np.abs(init(seed=1)["out"] - init()["out"]).max() > 0.1


def test_bfloat16_parameters_are_the_rounded_float32_ones():
  half = init(jnp.bfloat16)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, init())


def test_abstract_says_what_init_makes(one_device):
  params = init(jnp.bfloat16)
  told = weights.abstract(TABLE, sharding.USE, one_device, jnp.dtype("bfloat16"))
  assert jax.tree.structure(told) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(params)):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize(
  ("equation", "x", "w"),
  [
    ("bsd,dhk->bshk", (2, 3, 4), (4, 5, 6)),
    ("bshk,hkd->bsd", (2, 3, 5, 6), (5, 6, 4)),
    ("bsd,df->bsf", (2, 3, 4), (4, 7)),
  ],
)
def test_project_is_einsum(equation, x, w):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=x).astype(np.float32), rng.normal(size=w).astype(np.float32)
  got, pull = jax.vjp(lambda x, w: weights.project(x, w, equation), jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(got, np.einsum(equation, x, w), rtol=1e-5, atol=1e-5)
  g = rng.normal(size=got.shape).astype(np.float32)
  left, right = equation.split("->")[0].split(",")
  out = equation.split("->")[1]
  dx, dw = pull(jnp.asarray(g))
  np.testing.assert_allclose(dx, np.einsum(f"{out},{right}->{left}", g, w), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dw, np.einsum(f"{out},{left}->{right}", g, x), rtol=1e-5, atol=1e-5)


def test_project_computes_in_the_dtype_of_x():
  x, w = jnp.ones((1, 2, 4), jnp.bfloat16), jnp.full((4, 3), 1.001, jnp.float32)
  got = weights.project(x, w, "bsd,df->bsf")
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, 4)  # 1.001 is 1 in bfloat16


@pytest.mark.parametrize("equation", ["bsd,hdk->bshk", "bsd,dhk->bskh", "bsd,dhk->shk"])
def test_project_refuses_an_equation_of_another_form(equation):
  x, w = jnp.ones((1, 2, 4)), jnp.ones((4, 4, 4))
  with pytest.raises(ValueError, match=r"^project: expected an equation like .*, found"):
    weights.project(x, w, equation)
