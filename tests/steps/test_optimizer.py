"""AdamW against NumPy written from arXiv 1711.05101, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.steps.optimizer import AdamW, Group
from pt_jax.steps.state import Updater
from pt_jax.weights import Param

pytestmark = pytest.mark.usefixtures("one_device")

TABLE = {
  "matrix": Param((4, 3), ("embed", None), decay=True),
  "gain": Param((4,), (None,)),
  "slow": {"matrix": Param((3, 2), (None, None), decay=True)},
  "frozen": {"matrix": Param((2, 2), (None, None), decay=True)},
}
ADAM = AdamW(
  0.05,
  steps=8,
  warmup=2,
  final_scale=0.2,
  b1=0.8,
  b2=0.9,
  epsilon=1e-6,
  weight_decay=0.3,
  clip_norm=2.0,
  groups=(Group(r"^slow\.", lr_scale=0.5, weight_decay=0.7), Group("frozen", lr_scale=0)),
)
SCALE = {"matrix": 1.0, "gain": 1.0, "slow": 0.5, "frozen": 0.0}
DECAY = {"matrix": 0.3, "gain": 0.0, "slow": 0.7, "frozen": 0.0}


def rate(step):
  """Linear warm-up over 2 steps to 0.05, then a cosine over 6 to a fifth of it."""
  if step < 2:
    return 0.05 * (step + 1) / 2
  half = 0.5 * (1 + math.cos(math.pi * min((step - 2) / 6, 1)))
  return 0.05 * (0.2 + 0.8 * half)


def flat(tree):
  """Name of the top-level entry -> array; every entry of the table has one matrix or vector."""
  return {k: np.asarray(jax.tree.leaves(v)[0], np.float64) for k, v in tree.items()}


def numpy_adamw(params, gradients):
  """Algorithm 2 with a schedule: decay is added to Adam's direction, not to the gradient."""
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(v) for k, v in params.items()}
  norms = []
  for t, g in enumerate(gradients, start=1):
    norm = math.sqrt(sum((x**2).sum() for x in g.values()))
    norms.append(norm)
    for k in params:
      clipped = g[k] * min(1, 2.0 / norm)
      m[k] = 0.8 * m[k] + 0.2 * clipped
      v[k] = 0.9 * v[k] + 0.1 * clipped**2
      direction = (m[k] / (1 - 0.8**t)) / (np.sqrt(v[k] / (1 - 0.9**t)) + 1e-6)
      step = rate(t - 1) * SCALE[k]
      params[k] = params[k] - step * (direction + DECAY[k] * params[k])
  return params, norms


def draw(rng, scale=1.0):
  leaf = lambda row: jnp.asarray(rng.normal(scale=scale, size=row.shape), jnp.float32)
  return jax.tree.map(leaf, TABLE, is_leaf=lambda x: isinstance(x, Param))


def test_five_steps():
  rng = np.random.default_rng(0)
  params = draw(rng)
  sums = [draw(rng, scale) for scale in (4.0, 0.2, 8.0, 0.1, 4.0)]  # of a batch of weight 4
  want, norms = numpy_adamw(flat(params), [{k: v / 4 for k, v in flat(g).items()} for g in sums])
  assert min(norms) < 2 < max(norms), "some are clipped, some are not"
  updater = Updater(ADAM, TABLE, sharding.zero(1))
  frozen = np.asarray(params["frozen"]["matrix"])
  state, apply = updater.create(params), jax.jit(updater.apply)
  for step, (gradient, norm) in enumerate(zip(sums, norms)):
    state, metrics = apply(state, gradient, jnp.asarray(4.0))
    np.testing.assert_allclose(metrics["optimizer/grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["optimizer/learning_rate"], rate(step), rtol=1e-6)
  assert int(state.step) == 5
  for name, value in flat(state.params).items():
    np.testing.assert_allclose(value, want[name], rtol=2e-5, atol=1e-6, err_msg=name)
  np.testing.assert_array_equal(state.params["frozen"]["matrix"], frozen)


def test_schedule_to_the_end_and_past_it():
  got = [float(ADAM.schedule(jnp.asarray(step))) for step in range(12)]
  np.testing.assert_allclose(got, [rate(step) for step in range(12)], rtol=1e-6)
  assert got[1] == pytest.approx(0.05) and got[8] == got[11] == pytest.approx(0.01)
  constant = AdamW(0.1, steps=4, final_scale=1.0)
  assert [float(constant.schedule(jnp.asarray(s))) for s in (0, 3, 9)] == pytest.approx([0.1] * 3)


def test_the_first_group_that_matches_decides():
  rng = np.random.default_rng(1)
  params, gradient = draw(rng), draw(rng)
  both = (Group("matrix", lr_scale=0), Group("slow", lr_scale=3))
  optimizer = AdamW(0.1, steps=1, groups=both)
  updater = Updater(optimizer, TABLE, sharding.zero(1))
  before = flat(params)
  state, _ = updater.apply(updater.create(params), gradient, jnp.asarray(1.0))
  moved = {k: np.abs(v - before[k]).max() for k, v in flat(state.params).items()}
  assert moved == {"matrix": 0, "slow": 0, "frozen": 0, "gain": pytest.approx(0.1, rel=1e-3)}


def test_moments_are_float32_for_bfloat16_weights():
  half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), draw(np.random.default_rng(2)))
  updater = Updater(ADAM, TABLE, sharding.zero(1))
  state, _ = updater.apply(updater.create(half), draw(np.random.default_rng(3)), jnp.asarray(1.0))
  types = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
  assert types(state.params) == {"bfloat16"}
  assert types((state.optimizer[0].mu, state.optimizer[0].nu)) == {"float32"}


def test_bad_optimizers():
  make = functools.partial(AdamW, 0.1, steps=10)
  with pytest.raises(ValueError, match=r"^optimizer: warmup must be in 0\.\.10 .*, found 11$"):
    make(warmup=11)
  with pytest.raises(
    ValueError, match=r"^optimizer: learning_rate and clip_norm .* found 0.1 and 0$"
  ):
    make(clip_norm=0)
  with pytest.raises(
    ValueError, match=r"^optimizer: group pattern 'adapter' matches no parameter$"
  ):
    make(groups=(Group("adapter"),)).transform(TABLE)
