"""Checkpoints: everything a run needs to go on as if it had never stopped, bit for bit.

A checkpoint is a folder named by its step. In it Orbax keeps the arrays, under flat dotted names
("params.blocks.wq"), and a JSON record of what lives on the host. The folder gets its name by a
rename when all of it is on disk, so a process killed at any moment leaves only complete ones. The
names and shapes of the arrays are in the record too: what does not fit is told before anything is
read.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

FORMAT = "pt_jax checkpoint 1"
ARRAYS = "arrays"  # Orbax's item names, folders inside a checkpoint
RECORD = "record"
HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the name of a folder until its checkpoint is complete

Tree = Any  # a pytree of jax.Array, or of jax.ShapeDtypeStruct with shardings


class Restored(NamedTuple):
  """What a checkpoint held."""

  step: int
  state: Tree
  host: dict[str, Any]
  local: Any


class Checkpointer:
  """The checkpoints of one run (or of one stage of it), the last `keep` of them."""

  def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
    """Opens `folder`; nothing on disk is made, removed or changed before the first save.

    Raises ValueError when it holds anything but checkpoints of this module.
    """
    if keep < 1:
      raise ValueError(f"checkpoints to keep: expected at least 1, found {keep}")
    self.folder = Path(folder)
    _check_ours(self.folder)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
    self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
    self._writing = False
    if self.latest_step() is not None:
      self._record(None)

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, None when there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Tree, host: Mapping[str, Any], local: Any = None) -> None:
    """Writes a checkpoint in the background, once the one before is done.

    Returns when `state` is copied: it may be donated at once. Errors of the background show at the
    next call. Every process of a pod calls this.

    Args:
      step: later than the latest one.
      state: tree of jax.Array, on whatever mesh; typed PRNG keys are fine.
      host: JSON-able, the same for all processes; that of process 0 is written.
      local: JSON-able, this process's own (a data iterator); handed back to the same process.

    Raises ValueError on a step that is not later, or a leaf that is no array.
    """
    latest = self.latest_step()
    if latest is not None and step <= latest:
      raise ValueError(f"{self.folder}: expected a step after {latest}, found {step}")
    arrays = _flat(state)
    leaves = {name: _type_of(leaf) for name, leaf in arrays.items()}
    record = {"format": FORMAT, "leaves": leaves, "host": dict(host), "local": _gather(local)}
    items = {ARRAYS: ocp.args.PyTreeSave(arrays), RECORD: ocp.args.JsonSave(record)}
    self._clean()
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def wait(self) -> None:
    """Returns when the checkpoint being written is on disk; raises what went wrong with it."""
    self._manager.wait_until_finished()

  def host(self, step: int | None = None) -> dict[str, Any]:
    """The `host` that was saved at `step` (default: the latest), without reading arrays."""
    return self._record(step)["host"]

  def restore(self, state: Tree, step: int | None = None) -> Restored:
    """Reads the checkpoint of `step` (default: the latest) straight onto the shardings of `state`.

    Args:
      state: tree of jax.ShapeDtypeStruct with shardings, or of arrays to be replaced; the mesh need
        not be the one that saved.

    Raises ValueError naming the leaf, what was expected and what was found, when the checkpoint
    holds other names, shapes or dtypes; FileNotFoundError when there is no checkpoint.
    """
    record = self._record(step)
    step = self._pick(step)
    local = _own(record["local"], self._name(step))
    arrays = self._read(step, _flat(state), record["leaves"])
    return Restored(step, _unflatten(state, arrays), record["host"], local)

  def restore_params(self, params: Tree, step: int | None = None) -> Tree:
    """Reads only what the saved state has under `params`, errors as in `restore`."""
    leaves = self._record(step)["leaves"]
    found = {name: kind for name, kind in leaves.items() if name.split(".")[0] == "params"}
    wanted = {"params": params}
    arrays = self._read(self._pick(step), _flat(wanted), found)
    return _unflatten(wanted, arrays)["params"]

  def close(self) -> None:
    """Waits for the checkpoint being written and lets go of the folder."""
    self._manager.close()

  def _name(self, step: int) -> str:
    return f"checkpoint {self.folder / str(step)}"

  def _pick(self, step: int | None) -> int:
    steps = self._manager.all_steps()
    if not steps or (step is not None and step not in steps):
      wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
      found = f"steps {sorted(steps)}" if steps else "none"
      raise FileNotFoundError(f"{self.folder}: expected {wanted}, found {found}")
    return max(steps) if step is None else step

  def _record(self, step: int | None) -> dict[str, Any]:
    self.wait()
    step = self._pick(step)
    try:
      args = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
      record = self._manager.restore(step, args=args)[RECORD]
    except (FileNotFoundError, KeyError, ValueError) as error:
      raise ValueError(f"{self._name(step)}: expected {FORMAT!r}, found another") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
      raise ValueError(f"{self._name(step)}: expected {FORMAT!r}, found another")
    return record

  def _read(
    self, step: int, wanted: Mapping[str, Any], found: Mapping[str, str]
  ) -> dict[str, jax.Array]:
    _check_fits(wanted, found, self._name(step))
    target = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
      for name, leaf in wanted.items()
    }
    how = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
    return self._manager.restore(step, args=ocp.args.Composite(**{ARRAYS: args}))[ARRAYS]

  def _clean(self) -> None:
    """Before the first save: makes the folder and removes what a kill left half-written in it."""
    if self._writing or jax.process_index():
      return
    self._writing = True
    self.folder.mkdir(parents=True, exist_ok=True)
    for entry in self.folder.iterdir():
      if HALF_WRITTEN in entry.name:
        shutil.rmtree(entry)


def save_params(
  folder: str | os.PathLike[str], params: Tree, host: Mapping[str, Any] | None = None
) -> None:
  """Writes parameters alone, for a later stage to start from, then removes those of before."""
  with Checkpointer(folder, keep=1) as checkpointer:
    version = (checkpointer.latest_step() or 0) + 1
    checkpointer.save(version, {"params": params}, host or {})


def restore_params(folder: str | os.PathLike[str], params: Tree) -> Tree:
  """The newest parameters in a folder of `save_params`, or of checkpoints whose state has `params`.

  Args:
    folder: where they are.
    params: tree of jax.ShapeDtypeStruct with shardings.

  Raises ValueError naming the parameter that does not fit; FileNotFoundError when there are none.
  """
  with Checkpointer(folder) as checkpointer:
    return checkpointer.restore_params(params)


def _flat(tree: Tree) -> dict[str, Any]:
  """{dotted name: array} of a tree of arrays."""
  flat = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
      kind = type(leaf).__name__ + (" without sharding" if hasattr(leaf, "sharding") else "")
      raise ValueError(f"state: {name}: expected a jax.Array, found {kind}")
    if name in flat:
      raise ValueError(f"state: expected every leaf to have its own name, found two of {name}")
    flat[name] = leaf
  return flat


def _unflatten(like: Tree, flat: Mapping[str, jax.Array]) -> Tree:
  return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _flat(like)])


def _type_of(leaf: Any) -> str:
  """E.g. "float32[4, 8]"."""
  return f"{leaf.dtype}{list(leaf.shape)}"


def _check_fits(wanted: Mapping[str, Any], found: Mapping[str, str], where: str) -> None:
  for name, leaf in wanted.items():
    if name not in found:
      raise ValueError(f"{where}: {name}: expected {_type_of(leaf)}, found no such parameter")
    if found[name] != _type_of(leaf):
      raise ValueError(f"{where}: {name}: expected {_type_of(leaf)}, found {found[name]}")
  if extra := sorted(found.keys() - wanted.keys()):
    raise ValueError(f"{where}: {extra[0]}: expected no such parameter, found {found[extra[0]]}")


def _check_ours(folder: Path) -> None:
  for entry in sorted(folder.iterdir()) if folder.exists() else ():
    name = entry.name.split(HALF_WRITTEN)[0]
    if not (entry.is_dir() and name.isdecimal()):
      raise ValueError(f"{folder}: expected only checkpoints of pt_jax, found {entry.name!r}")


def _gather(value: Any) -> list[Any]:
  """The JSON-able values of all processes, in order."""
  if jax.process_count() == 1:
    return [value]
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(mine.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: mine.size] = mine
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def _own(local: list[Any], where: str) -> Any:
  """This process's part of what `_gather` collected. Any number of processes may share a None."""
  if all(value is None for value in local):
    return None
  if len(local) != jax.process_count():
    raise ValueError(
      f"{where}: expected {len(local)} processes, each with its own host state, "
      f"found {jax.process_count()}"
    )
  return local[jax.process_index()]
