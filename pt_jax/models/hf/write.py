"""`save`: parameters on the mesh to a folder that transformers reads."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.hf.config import write_config
from pt_jax.models.hf.names import INDEX, SINGLE, Tensor, tensors, to_theirs
from pt_jax.weights import Params


def save(
  folder: str | Path,
  params: Params,
  c: ModelConfig,
  *,
  max_shard_bytes: int = 5 * 10**9,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes a checkpoint that transformers (4 and 5) reads, in `c.param_dtype`.

  The folder appears whole or not at all. Beside the model, devices hold one layer of one parameter
  and the host one file. With several processes all of them call this, and the first one writes.

  Args:
    folder: must not exist.
    params: tree of `decoder.table(c)`, on its mesh.
    c: the model.
    max_shard_bytes: one file when everything fits in it, else several with an index.
    extra: further entries of config.json, e.g. eos_token_id.

  Raises ValueError when the folder exists or a parameter is not as the table says.
  """
  folder, expected = Path(folder), tensors(c)
  leaves = jax.tree.leaves_with_path(params)
  flat = {".".join(entry.key for entry in path): leaf for path, leaf in leaves}
  config = write_config(c, extra or {})
  _check_params(flat, dict(weights.named_rows(decoder.table(c))))
  if folder.exists():
    raise ValueError(f"{folder}: already exists, expected a new folder; nothing was written")
  partial, writes = folder.with_name(folder.name + ".partial"), jax.process_index() == 0
  if writes:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  dtype = jnp.dtype(c.param_dtype)
  places = {}
  for file, names in _plan(expected, dtype.itemsize, max_shard_bytes):
    places |= dict.fromkeys(names, file)
    held = {name: _fetch(flat[expected[name].ours], expected[name], dtype) for name in names}
    if writes:
      safetensors.numpy.save_file(held, partial / file, metadata={"format": "pt"})
  if writes:
    if SINGLE not in places.values():
      total = sum(math.prod(tensor.shape) for tensor in expected.values()) * dtype.itemsize
      _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(partial / "config.json", config)
    partial.rename(folder)


def _check_params(flat: dict[str, jax.Array], rows: dict[str, weights.Param]) -> None:
  for name in sorted(rows.keys() ^ flat.keys()):
    problem = "is missing" if name in rows else "has no place in the model config"
    raise ValueError(f"parameter {name} {problem}; nothing was written")
  for name, row in rows.items():
    if flat[name].shape != row.shape:
      raise ValueError(
        f"parameter {name} has shape {flat[name].shape}, expected {row.shape}; nothing was written"
      )


def _plan(
  expected: dict[str, Tensor], itemsize: int, max_bytes: int
) -> Iterator[tuple[str, list[str]]]:
  """(file name, its tensors), filled in order; a tensor larger than a file has one of its own."""
  groups: list[list[str]] = [[]]
  size = 0
  for name, tensor in expected.items():
    own = math.prod(tensor.shape) * itemsize
    if groups[-1] and size + own > max_bytes:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += own
  for i, names in enumerate(groups, 1):
    yield (SINGLE if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"), names


@jax.jit
def _take(x: jax.Array, layer: jax.Array | None) -> jax.Array:
  """One layer of a stacked parameter, or all of another one, whole on every device."""
  if layer is not None:
    x = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  return jax.reshard(x, jax.P(*(None,) * x.ndim))


def _fetch(param: jax.Array, tensor: Tensor, dtype: jnp.dtype) -> np.ndarray:
  """One HF tensor of one of our parameters."""
  where = param.sharding
  assert isinstance(where, jax.sharding.NamedSharding) and isinstance(where.mesh, jax.sharding.Mesh)
  with jax.set_mesh(where.mesh):
    whole = _take(param, tensor.layer)
  return to_theirs(np.asarray(whole).astype(dtype), tensor)


def _write_json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
