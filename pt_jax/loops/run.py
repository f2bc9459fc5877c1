"""A run is a folder: ROOT/NAME/ID/{config.json, checkpoints/, params/, events, *.jsonl, report.md}

`Run.open` makes it or, when it holds a checkpoint, goes on from there. What a run does is split
into stages, each with its own steps, tags and checkpoints:

  with Run.open("runs", "quickstart", "seed0", config) as run:
    stage = run.stage("sft")
    if not stage.finished:
      saved = stage.restore(abstract_state)  # None on a fresh start
      for step in ...:
        stage.log(step, metrics)
        stage.save(step, state, {"data": iterator_state})
      stage.finish(state.params)
    params = run.stage("sft").params(abstract_params)  # what the next stage starts from

Only process 0 of a pod writes; all of them call the same things. No absolute path is recorded.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pt_jax import checkpoint
from pt_jax.checkpoint import Checkpointer, Restored, Tree
from pt_jax.loops import diagnose, record
from pt_jax.loops.record import CONFIG
from pt_jax.metrics import Journal, Scalars

LOCK = "lock"  # held while a process writes the run; the system lets go of it when the process dies
CHECKPOINTS = "checkpoints"
PARAMS = "params"
HELD_OUT = "held_out"


class Run:
  """An open run folder."""

  def __init__(self, folder: Path, config: dict[str, Any], lock: int | None):
    """Use `Run.open`."""
    self.folder = folder
    self.config = config
    self._lock = lock
    self._stages: dict[str, Stage] = {}
    newest = max(_saved(folder), key=lambda host: host["saves"], default=None)
    self.resumed = newest is not None
    self._saves = newest["saves"] if newest else 0
    where = folder if jax.process_index() == 0 else None
    self.journal = Journal(where, newest["journal"] if newest else None)

  @classmethod
  def open(
    cls,
    root: str | os.PathLike[str],
    name: str,
    id: str,
    config: Any,
    *,
    may_differ: Sequence[str] = (),
  ) -> "Run":
    """Makes the folder `root/name/id`, or resumes the run in it.

    Args:
      root: the folder of all runs.
      name: the experiment.
      id: tells this run from others of the experiment, e.g. its arguments and seed.
      config: a dataclass or mapping of plain values, functions and more of those.
      may_differ: dotted fields (or the start of some) that may have changed since the run began.

    Raises ValueError, before anything is written, when the folder holds something else, another
    process writes it, or its config differs.
    """
    for part in (name, id):
      if not part or part.startswith(".") or Path(part).name != part:
        raise ValueError(f"run: expected a plain folder name, found {part!r}")
    folder = Path(root) / name / id
    given = json.loads(json.dumps(record.plain(config)))
    lock = None
    if jax.process_index() == 0:
      _check_ours(folder)
      folder.mkdir(parents=True, exist_ok=True)
      lock = _take_lock(folder)
    try:
      run = cls(folder, given, lock)
      record.write_config(folder, given, may_differ)
    except BaseException:
      _let_go(lock)
      raise
    if not run.resumed:
      run.journal.events.session_start(record.flatten(given), f"{name}/{id}")
    return run

  def __enter__(self) -> "Run":
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    self.close(succeeded=error is None)

  def stage(self, name: str, *, keep: int = 2) -> "Stage":
    """A part of the run with its own steps, that keeps its last `keep` checkpoints."""
    if name not in self._stages:
      self._stages[name] = Stage(self, name, keep)
    return self._stages[name]

  def close(self, *, succeeded: bool) -> None:
    """Waits for the checkpoint being written, ends the record and lets others open the run."""
    try:
      for stage in self._stages.values():
        stage.close()
      self.journal.events.session_end(succeeded)
      self.journal.state()
    finally:
      self.journal.close()
      _let_go(self._lock)

  def mark(self, host: Mapping[str, Any]) -> dict[str, Any]:
    """`host` with what a resume must know: how much was logged, and that it is the newest save."""
    self._saves += 1
    return {"saves": self._saves, "journal": self.journal.state(), "host": dict(host)}


class Stage:
  """One stage of a run."""

  def __init__(self, run: Run, name: str, keep: int):
    """Use `Run.stage`."""
    self.name = name
    self.tell: Callable[[str], None] = lambda line: None  # what a new finding is shown by
    self._run = run
    self._watch: diagnose.Watch | None = None
    self._params_folder = run.folder / PARAMS / name
    self._checkpoints = Checkpointer(run.folder / CHECKPOINTS / name, keep=keep)

  @property
  def folder(self) -> Path:
    """Of the run."""
    return self._run.folder

  @property
  def finished(self) -> bool:
    """Whether `finish` was called, now or before the run was killed."""
    with Checkpointer(self._params_folder) as saved:
      return saved.latest_step() is not None

  def log(self, step: int, metrics: Scalars) -> None:
    """Scalars of one step, to TensorBoard (as STAGE/NAME) and metrics.jsonl, with what they newly
    show of a failure (diagnosis/NAME), which is also told."""
    if self._watch is None:
      self._watch = self._watch_so_far()
    found = self._watch.update(step, metrics)
    self._run.journal.scalars(self.name, step, {**metrics, **diagnose.logged(found)})
    for finding in found:
      self.tell(str(finding))

  def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Completions, to TensorBoard and samples.jsonl."""
    self._run.journal.samples(self.name, step, rows)

  def histogram(self, step: int, name: str, values: Any) -> None:
    """A distribution, to TensorBoard."""
    self._run.journal.histogram(self.name, step, name, values)

  def save_outputs(self, arrays: Mapping[str, np.ndarray]) -> None:
    """The newest held-out outputs of the stage, for the report: `held_out/STAGE.npz`."""
    if jax.process_index() == 0:
      folder = self._run.folder / HELD_OUT
      folder.mkdir(exist_ok=True)
      half_written = folder / f"{self.name}.tmp"
      with half_written.open("wb") as file:
        np.savez(file, **arrays)  # pyrefly: ignore
      os.replace(half_written, folder / f"{self.name}.npz")

  def save(self, step: int, state: Tree, host: Mapping[str, Any], local: Any = None) -> None:
    """A checkpoint of the stage and of all that was logged so far; see `Checkpointer.save`."""
    self._checkpoints.save(step, state, self._run.mark(host), local)

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint of this stage, None when there is none."""
    return self._checkpoints.latest_step()

  def restore(self, state: Tree) -> Restored | None:
    """The newest checkpoint of this stage, None when there is none; see `Checkpointer.restore`."""
    if self._checkpoints.latest_step() is None:
      return None
    saved = self._checkpoints.restore(state)
    return saved._replace(host=saved.host["host"])

  def finish(self, params: Tree, results: Mapping[str, float] | None = None) -> None:
    """Writes what the stage leaves, with figures for the report; it then counts as done."""
    self._checkpoints.wait()
    checkpoint.save_params(self._params_folder, params, self._run.mark(results or {}))

  def params(self, params: Tree) -> Tree:
    """The result of a finished stage on the shardings of `params`."""
    return checkpoint.restore_params(self._params_folder, params)

  def results(self) -> dict[str, float]:
    """The figures that a finished stage left."""
    with Checkpointer(self._params_folder) as saved:
      return saved.host()["host"]

  def _watch_so_far(self) -> diagnose.Watch:
    """The watch as it was when the last of the logged rows had been written."""
    watch = diagnose.Watch()
    for row in self._run.journal.rows():
      stage, step = row.pop("stage"), row.pop("step")
      if stage == self.name:
        watch.update(step, row)
    return watch

  def close(self) -> None:
    """Waits for the checkpoint being written."""
    self._checkpoints.close()


def _check_ours(folder: Path) -> None:
  ours = {CONFIG, LOCK, f"{Path(CONFIG).stem}.tmp"}
  found = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
  if CONFIG not in found and set(found) - ours:
    raise ValueError(f"{folder}: expected a run or nothing, found {found[0]!r} and no {CONFIG}")


def _take_lock(folder: Path) -> int:
  lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    os.close(lock)
    raise ValueError(f"{folder}: expected a free run, found another process writing it") from error
  return lock


def _let_go(lock: int | None) -> None:
  if lock is not None:
    os.close(lock)


def _saved(folder: Path) -> list[dict[str, Any]]:
  """What `Run.mark` put into the newest checkpoint of every stage."""
  hosts = []
  for kind in (CHECKPOINTS, PARAMS):
    parent = folder / kind
    for stage in sorted(parent.iterdir()) if parent.exists() else ():
      with Checkpointer(stage) as checkpointer:
        if checkpointer.latest_step() is not None:
          hosts.append(checkpointer.host())
  return hosts
