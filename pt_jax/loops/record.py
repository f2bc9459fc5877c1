"""config.json: what a run was asked to do, and on what it ran.

A config may hold dataclasses, functions and paths; `plain` makes it JSON, in which two configs are
compared field by field. No absolute path is recorded.
"""

import dataclasses
import enum
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

CONFIG = "config.json"
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SOURCE = Path(__file__).resolve().parents[2]  # the checkout, when it is one


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """The config of the run in `folder`, flat: {"train.lr": 1e-3, ...}."""
  return flatten(json.loads((Path(folder) / CONFIG).read_text())["config"])


def plain(value: Any, field: str = "config") -> Any:
  """A config as JSON-able values: dataclasses become dicts, functions their names.

  Paths become relative to the working directory, so a record names no machine's folders. Raises
  ValueError naming the field that cannot be recorded.
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(key): plain(item, f"{field}.{key}") for key, item in value.items()}
  if isinstance(value, list | tuple | set | frozenset):
    items = sorted(value) if isinstance(value, set | frozenset) else value
    return [plain(item, f"{field}.{i}") for i, item in enumerate(items)]
  if isinstance(value, enum.Enum):
    return value.name
  is_path = isinstance(value, str) and os.path.isabs(value) and os.path.exists(value)
  if is_path or isinstance(value, os.PathLike):
    return Path(os.path.relpath(value)).as_posix()
  if isinstance(value, np.generic):
    return value.item()
  if value is None or isinstance(value, bool | int | float | str):
    return value
  return _function_name(value, field)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts (and lists that hold dicts) as one dict with dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
      value = dict(enumerate(value))
    if isinstance(value, dict) and value:
      flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
    else:
      flat[str(name)] = value
  return flat


def environment() -> dict[str, Any]:
  """What a run ran on: commit, versions, devices."""
  device = jax.devices()[0]
  versions = {"python": platform.python_version()}
  versions |= {package: importlib.metadata.version(package) for package in VERSIONED}
  return {
    **_commit(),
    "versions": versions,
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
  }


def last_environment(folder: Path) -> dict[str, Any]:
  """What a run folder says that it ran on last; {} where there is no run yet."""
  path = folder / CONFIG
  environments = json.loads(path.read_text())["environments"] if path.exists() else []
  return environments[-1] if environments else {}


def _function_name(value: Any, field: str) -> Any:
  if isinstance(value, functools.partial):
    call = {"args": value.args, **value.keywords} if value.args else value.keywords
    return {"function": _function_name(value.func, field), **plain(call, field)}
  if callable(value) and hasattr(value, "__qualname__"):
    return f"{value.__module__}.{value.__qualname__}"
  if isinstance(value, np.dtype):
    return value.name
  raise ValueError(f"{field}: expected a value that {CONFIG} can hold, found {value!r}")


def write_config(folder: Path, given: dict[str, Any], may_differ: Sequence[str]) -> None:
  """Records a plain config in a run folder, with the environment it runs in (on process 0).

  Raises ValueError naming the first field in which it differs from the config already there, unless
  the field (or the start of its dotted name) is in `may_differ`.
  """
  path = folder / CONFIG
  environments = []
  if path.exists():
    recorded = json.loads(path.read_text())
    _check_config(path, flatten(recorded["config"]), flatten(given), may_differ)
    environments = recorded["environments"]
  here = environment()
  if not environments or environments[-1] != here:
    environments = [*environments, here]
  if jax.process_index() == 0:
    text = json.dumps({"config": given, "environments": environments}, indent=2)
    half_written = path.with_suffix(".tmp")
    half_written.write_text(text + "\n")
    os.replace(half_written, path)


def _check_config(
  path: Path, recorded: Mapping[str, Any], given: Mapping[str, Any], may_differ: Sequence[str]
) -> None:
  for field in sorted(recorded.keys() | given.keys()):
    if any(f"{field}.".startswith(f"{allowed}.") for allowed in may_differ):
      continue
    values = [repr(flat[field]) if field in flat else "nothing" for flat in (recorded, given)]
    if values[0] != values[1]:
      raise ValueError(
        f"{path}: {field}: recorded {values[0]}, given {values[1]}; another run needs another id"
      )


def _commit() -> dict[str, Any]:
  """The checkout's commit and whether files differ from it; both None when it is no checkout."""

  def git(*args: str) -> str:
    command = ["git", "-C", str(SOURCE), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    if Path(git("rev-parse", "--show-toplevel")) != SOURCE:
      return {"commit": None, "modified": None}
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
  except (OSError, subprocess.CalledProcessError):
    return {"commit": None, "modified": None}
