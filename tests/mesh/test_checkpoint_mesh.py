"""A checkpoint saved on one mesh is restored on another, bit for bit, each device its part."""

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.checkpoint import Checkpointer

pytestmark = pytest.mark.mesh

SPECS = {  # how each parameter is split; sizes are multiples of 8
  "wq": jax.P(None, "data", "tensor"),
  "embed": jax.P(("data", "expert"), "tensor"),
  "norm": jax.P(),
  "keys": jax.P("data"),
}


def values():
  rng = np.random.default_rng(0)
  raw = lambda *shape: rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
  keys = jax.random.split(jax.random.key(7), 8)
  return {"wq": raw(2, 16, 8), "embed": raw(8, 16), "norm": raw(8), "keys": keys}


def bits(array):
  if jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  return np.asarray(array).tobytes()


@pytest.mark.parametrize("sizes", [(4, 1, 1, 2), (2, 1, 2, 2), (1, 1, 1, 1)])
def test_restores_on_another_mesh(tmp_path, sizes):
  first = sharding.make_mesh(data=8)
  state = {k: jax.device_put(v, jax.NamedSharding(first, SPECS[k])) for k, v in values().items()}
  count = int(np.prod(sizes))
  second = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
  target = {
    k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=jax.NamedSharding(second, SPECS[k]))
    for k, v in state.items()
  }
  with Checkpointer(tmp_path / "c") as checkpointer:
    checkpointer.save(1, {"params": state}, {})
    found = checkpointer.restore({"params": target}).state["params"]
  for name, want in values().items():
    assert found[name].sharding == target[name].sharding
    assert bits(found[name]) == bits(want)
    if name != "keys":
      for shard in found[name].addressable_shards:
        assert bits(shard.data) == want[shard.index].tobytes()
  assert len(found["wq"].addressable_shards) == count
