"""HF checkpoints straight onto a mesh: every device has its slice of what one device would have."""

import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pt_jax import sharding, weights
from pt_jax.models import decoder, hf

pytestmark = pytest.mark.mesh

HF = pathlib.Path(__file__).parent.parent / "oracles" / "hf"


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("stage", [1, 3])
def test_sharded_load_and_save(tmp_path, name, stage):
  c, rules = hf.read_config(HF / name), sharding.zero(stage).params
  mesh = sharding.make_mesh(data=4, tensor=2)
  whole = hf.load(HF / name, c, sharding.make_mesh(devices=jax.devices()[:1]), sharding.USE)
  spread = hf.load(HF / name, c, mesh, rules)

  def check(row, one, many):
    assert many.sharding == NamedSharding(mesh, rules.spec(*row.axes))
    for shard in many.addressable_shards:
      np.testing.assert_array_equal(shard.data, np.asarray(one)[shard.index])

  weights.map_table(check, decoder.table(c), whole, spread)
  assert spread["blocks"]["q"].addressable_data(0).size < whole["blocks"]["q"].size
  hf.save(tmp_path / "out", spread, c)
  again = hf.load(tmp_path / "out", c, mesh, rules)
  assert jax.tree.all(jax.tree.map(np.array_equal, whole, again))


def test_mesh_that_does_not_divide_the_model():
  c, mesh = hf.read_config(HF / "qwen3"), sharding.make_mesh(tensor=8)
  with pytest.raises(ValueError, match=r"parameter blocks\.\w+.* does not divide into the 8 parts"):
    hf.load(HF / "qwen3", c, mesh, sharding.USE)
