"""The chips beside what JAX knows of them, and the table of tiles."""

import math

import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import chip, tiles

VERSIONS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x"}


@pytest.mark.parametrize("name", chip.CHIPS)
def test_a_chip_is_what_jax_says(name):
  ours = chip.get(name)
  info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(VERSIONS[name]), ours.device_cores)
  assert ours.vmem_bytes == info.vmem_capacity_bytes
  assert ours.mxu == info.mxu_column_size
  assert ours.cores == info.chip_version.num_physical_tensor_cores_per_chip
  per_core = ours.bf16_flops / ours.cores
  assert math.isclose(per_core, info.bf16_ops_per_second, rel_tol=0.01)
  assert math.isclose(ours.hbm_bytes / ours.cores, info.hbm_capacity_bytes, rel_tol=0.02)
  assert 0.9 * ours.hbm_bytes < ours.usable_hbm / ours.device_share < 1.01 * ours.hbm_bytes


def test_clocks():
  """A clock that is plausible says that peak, cores and edge belong together."""
  clocks = {name: round(each.clock / 1e9, 2) for name, each in chip.CHIPS.items()}
  assert clocks == {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


def test_names_and_kinds():
  assert chip.of_kind("TPU v5 lite") == "v5e"
  assert chip.of_kind("TPU7x") == "tpu7x"
  assert chip.of_kind("cpu") is None
  kinds = [kind for each in chip.CHIPS.values() for kind in each.device_kinds]
  assert len(set(kinds)) == len(kinds)
  with pytest.raises(ValueError, match=r"chip: expected one of v5e, .* found 'v9'"):
    chip.get("v9")


def test_the_most_special_row_of_tiles_counts(monkeypatch):
  row = lambda chip, shape, rows: tiles.Row("op", chip, shape, {"rows": rows}, "by hand")
  table = [row("any", "any", 1), row("any", "wide", 2), row("v5e", "any", 3)]
  monkeypatch.setattr(tiles, "ROWS", (*table, row("v5e", "wide", 4)))
  assert tiles.find("op", "v5e", "wide") == {"rows": 4}
  assert tiles.find("op", "v5e", "thin") == {"rows": 3}
  assert tiles.find("op", "v6e", "wide") == {"rows": 2}
  assert tiles.find("op", "v6e") == {"rows": 1}
  with pytest.raises(ValueError, match="tiles of other: expected a row for v6e any, found none"):
    tiles.find("other", "v6e")


def test_rows_of_tiles_are_told_apart_and_explained():
  keys = [(row.kernel, row.chip, row.shape) for row in tiles.ROWS]
  assert len(set(keys)) == len(keys)
  for row in tiles.ROWS:
    assert row.chip == tiles.ANY or row.chip in chip.CHIPS
    assert row.found and all(size > 0 for size in row.tiles.values())
