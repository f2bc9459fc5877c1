"""`load`: safetensors to the mesh, each device's part of each parameter read by itself."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.hf.config import read_json
from pt_jax.models.hf.names import (
  EMBED,
  INDEX,
  SINGLE,
  UNEMBED,
  Tensor,
  slices_of,
  tensors,
  to_ours,
)
from pt_jax.sharding import Rules
from pt_jax.weights import Params

DTYPES = ("F32", "F16", "BF16")
ROWS_AT_ONCE = 4096  # of a vocabulary matrix, when two are compared


class Slot(NamedTuple):
  """A tensor in an open file."""

  path: Path
  view: Any  # safetensors' slice: get_shape, get_dtype, and reading by index


def load(folder: str | Path, c: ModelConfig, mesh: jax.sharding.Mesh, rules: Rules) -> Params:
  """Reads a checkpoint, in one file or several, to where `rules` want it, in `c.param_dtype`.

  The host holds the local parts of one parameter at a time, never the model. Files in float32,
  float16 and bfloat16 are cast.

  Args:
    folder: has model.safetensors, or model.safetensors.index.json and the files that it names.
    c: the model, usually `read_config(folder)`.
    mesh, rules: where the parameters go.

  Raises ValueError, before a parameter is read, naming the file and the tensor: one that the model
  does not have, one that is missing, in two files, or of another shape or dtype; a mesh that does
  not divide a parameter; an `lm_head.weight` beside tied embeddings that differs from them.
  """
  folder, rows, expected = Path(folder), decoder.table(c), tensors(c)
  weights.check_mesh(rows, rules, mesh)
  with contextlib.ExitStack() as stack:
    slots = _open(folder, stack)
    if c.tied_embeddings and UNEMBED in slots:
      _check_tied(slots.pop(UNEMBED), slots.get(EMBED))
    _check(folder, slots, expected)
    loaded = {}
    for ours, row in weights.named_rows(rows):
      parts = [(slots[name].view, t) for name, t in expected.items() if t.ours == ours]
      where = jax.sharding.NamedSharding(mesh, rules.spec(*row.axes))
      loaded[ours] = _load_leaf(parts, row.shape, where, jnp.dtype(c.param_dtype))
  return flax.traverse_util.unflatten_dict(loaded, sep=".")


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Slot]:
  """Every tensor in the checkpoint, by name; `stack` closes the files."""
  places = _places(folder)
  slots: dict[str, Slot] = {}
  for path in sorted({folder / name for name in places.values()}) or [folder / SINGLE]:
    try:
      file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except FileNotFoundError:
      raise ValueError(f"{folder / INDEX}: names {path.name}, which does not exist") from None
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    for name in file.keys():  # noqa: SIM118  the file is no dict
      if name in slots:
        raise ValueError(f"{folder}: tensor {name!r} is in {slots[name].path.name} and {path.name}")
      slots[name] = Slot(path, file.get_slice(name))
  for name, place in places.items():
    if name not in slots or slots[name].path.name != place:
      raise ValueError(f"{folder / INDEX}: places tensor {name!r} in {place}, which lacks it")
  return slots


def _places(folder: Path) -> dict[str, str]:
  """The file of each tensor if the checkpoint has an index; nothing if it is one file."""
  index, single = folder / INDEX, folder / SINGLE
  if index.exists() == single.exists():
    which = "both" if single.exists() else "neither"
    raise ValueError(f"{folder}: expected {SINGLE} or {INDEX}, found {which}")
  if single.exists():
    return {}
  places = read_json(index).get("weight_map")
  if not places:
    raise ValueError(
      f"{index}: weight_map: expected tensor names and their files, found {places!r}"
    )
  return places


def _check(folder: Path, slots: dict[str, Slot], expected: dict[str, Tensor]) -> None:
  """The checkpoint has the tensors of the model, no others, in the right shapes."""
  for problem, names in (
    ("has no place in the model that config.json describes", slots.keys() - expected.keys()),
    ("is missing", expected.keys() - slots.keys()),
  ):
    if names:
      more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
      raise ValueError(f"{folder}: tensor {min(names)!r}{more} {problem}")
  for name, tensor in expected.items():
    path, view = slots[name]
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if shape != tensor.shape:
      raise ValueError(f"{path}: tensor {name!r} has shape {shape}, expected {tensor.shape}")
    if dtype not in DTYPES:
      raise ValueError(f"{path}: tensor {name!r} is {dtype}, expected one of {', '.join(DTYPES)}")


def _check_tied(unembed: Slot, embed: Slot | None) -> None:
  """Some checkpoints hold the tied matrix twice (Qwen3-0.6B): fine while both are equal."""
  equal = embed is not None and unembed.view.get_shape() == embed.view.get_shape()
  if equal:
    rows = embed.view.get_shape()[0]
    cuts = [slice(i, min(i + ROWS_AT_ONCE, rows)) for i in range(0, rows, ROWS_AT_ONCE)]
    equal = all(np.array_equal(unembed.view[cut], embed.view[cut]) for cut in cuts)
  if not equal:
    raise ValueError(
      f"{unembed.path}: {UNEMBED!r} differs from {EMBED!r}, but config.json ties them"
    )


def _load_leaf(
  parts: list[tuple[Any, Tensor]],
  shape: tuple[int, ...],
  where: jax.sharding.Sharding,
  dtype: jnp.dtype,
) -> jax.Array:
  """One parameter from its HF tensor(s), one a layer. Devices with equal parts share a read."""
  stacked = parts[0][1].layer is not None
  read: dict[Any, np.ndarray] = {}

  def callback(index: Any) -> np.ndarray:
    bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))
    if bounds not in read:
      cuts = tuple(slice(*pair) for pair in bounds)
      chosen, cuts = (parts[cuts[0]], cuts[1:]) if stacked else (parts, cuts)
      out = np.empty([stop - start for start, stop in bounds], dtype)
      for row, (view, tensor) in zip(out if stacked else out[None], chosen):
        row[...] = to_ours(view[slices_of(tensor, cuts)], tensor, cuts)
      read[bounds] = out
    return read[bounds]

  return jax.make_array_from_callback(shape, where, callback)
