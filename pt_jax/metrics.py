"""What a run writes down as it goes: TensorBoard events, `metrics.jsonl`, `samples.jsonl`.

All three are append-only. A checkpoint stores their sizes (`Journal.state`); a resumed run cuts
them back to those sizes and appends, so what is on disk at the end does not depend on where the run
was killed (wall times and metrics under `perf/` excepted). `metrics.jsonl` is the plain record that
reports and tests read; the event file shows the same numbers in TensorBoard, written with
TensorBoard's own protos and without TensorFlow.
"""

import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event  # pyrefly: ignore
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # pyrefly: ignore
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import summary_v2
from tensorboard.plugins.hparams.api_pb2 import DataType, Status  # pyrefly: ignore
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyrefly: ignore
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

EVENTS = "events.out.tfevents.pt_jax"  # TensorBoard reads every file with "tfevents" in its name
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
HISTOGRAM_BUCKETS = 30  # TensorBoard's own default
SHOWN_SAMPLES = 4  # of one step, in TensorBoard's text tab; samples.jsonl has them all

Scalars = Mapping[str, Any]  # name -> Python number, NumPy or JAX scalar
Sizes = Mapping[str, int]  # file name -> bytes


def check_finite(metrics: Scalars, step: int) -> None:
  """Raises ValueError naming the first metric that is NaN or infinite, and the step.

  Call it before the checkpoint of this step is saved: the one on disk is then still a good one.
  """
  for name, value in metrics.items():
    if not math.isfinite(_number(name, value)):
      raise ValueError(f"step {step}: metric {name!r}: expected a finite number, found {value}")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a JSONL file, [] when there is none; a last line cut off by a kill is left out."""
  path = Path(path)
  return _rows(path.read_bytes()) if path.exists() else []


def _rows(text: bytes) -> list[dict[str, Any]]:
  lines = text.split(b"\n")
  return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is not a line


class AppendLog:
  """A file that only grows, and that can be cut back to a size it once had."""

  def __init__(self, path: str | os.PathLike[str], size: int = 0):
    """Continues `path` after its first `size` bytes; untouched before the first write or sync.

    Raises ValueError when the file is shorter than that.
    """
    self.path = Path(path)
    found = self.path.stat().st_size if self.path.exists() else 0
    if found < size:
      raise ValueError(f"{self.path}: the checkpoint expects {size} bytes, found {found}")
    self.size = size
    self._file: io.FileIO | None = None

  def write(self, data: bytes) -> None:
    """Appends in one system call, so a reader (or a kill) sees whole records."""
    self.size += self._open().write(data)

  def read(self) -> bytes:
    """What was written, without what a later write will cut off."""
    return self.path.read_bytes()[: self.size] if self.size else b""

  def sync(self) -> int:
    """Makes what was written survive a power cut; returns the size in bytes."""
    os.fsync(self._open().fileno())
    return self.size

  def close(self) -> None:
    """Closes the file; a later write continues it."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def _open(self) -> io.FileIO:
    if self._file is None:
      self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (see close)
      self._file.truncate(self.size)
    return self._file


class NoLog(AppendLog):
  """Forgets what it is given: the log of a process that is not the first of its pod."""

  def __init__(self):
    self.size = 0

  def write(self, data: bytes) -> None:
    """Does nothing."""

  def sync(self) -> int:
    """Does nothing."""
    return 0

  def close(self) -> None:
    """Does nothing."""


class EventWriter:
  """TensorBoard events in one file."""

  def __init__(self, log: AppendLog):
    self._log = log
    self._records = RecordWriter(log)

  def scalars(self, step: int, values: Scalars) -> None:
    """One event with a value for every tag."""
    summary = Summary()
    for tag, value in values.items():
      summary.value.add(tag=tag, simple_value=_number(tag, value))
    self._write(step, summary)

  def text(self, step: int, tag: str, markdown: str) -> None:
    """Markdown for the TEXT tab."""
    tensor = tensor_util.make_tensor_proto(np.array(markdown.encode(), dtype=object))
    self._tensor(step, tag, tensor, text_metadata.create_summary_metadata(None, None))

  def histogram(self, step: int, tag: str, values: Any) -> None:
    """The distribution of `values` (any shape; what is not finite is left out)."""
    values = np.asarray(values, np.float64).ravel()
    counts, edges = np.histogram(values[np.isfinite(values)], HISTOGRAM_BUCKETS)
    buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)  # [k, (left, right, count)]
    meta = histogram_metadata.create_summary_metadata(None, None)
    self._tensor(step, tag, tensor_util.make_tensor_proto(buckets), meta)

  def image(self, step: int, tag: str, png: bytes) -> None:
    """A picture, given as the bytes of a PNG file."""
    if png[:8] != b"\x89PNG\r\n\x1a\n":
      raise ValueError(f"image {tag!r}: expected the bytes of a PNG file, found {png[:8]!r}")
    size = [str(int.from_bytes(png[i : i + 4])).encode() for i in (16, 20)]  # IHDR: width, height
    tensor = tensor_util.make_tensor_proto(np.array([*size, png], dtype=object))
    self._tensor(step, tag, tensor, image_metadata.create_summary_metadata(None, None))

  def session_start(self, config: Mapping[str, Any], session: str) -> None:
    """Shows this run in the HPARAMS tab.

    Args:
      config: flat; a value that is no bool, number or string is written as JSON.
      session: the row of this run; runs that share it are averaged there.
    """
    flat = {name: _hparam(value) for name, value in config.items()}
    self._write(0, summary_v2.hparams_pb(flat, trial_id=session))

  def session_end(self, succeeded: bool) -> None:
    """Tells the HPARAMS tab how the run ended."""
    status = Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    end = {"status": status, "end_time_secs": time.time()}
    self._hparams(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)

  def experiment(self, configs: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Chooses the columns of the HPARAMS tab for a group of runs.

    Belongs in the folder above theirs. TensorBoard reads one such record (the first it finds);
    without one it shows the arguments and scalars of all runs.
    """
    names = sorted({name for config in configs for name in config})
    experiment = {
      "hparam_infos": [_hparam_info(name, configs) for name in names],
      "metric_infos": [{"name": {"tag": tag}} for tag in metrics],
      "time_created_secs": time.time(),
    }
    self._hparams(hparams_metadata.EXPERIMENT_TAG, experiment=experiment)

  def _hparams(self, tag: str, **content: Any) -> None:
    meta = hparams_metadata.create_summary_metadata(HParamsPluginData(**content))
    self._tensor(0, tag, hparams_metadata.NULL_TENSOR, meta)

  def _tensor(self, step: int, tag: str, tensor: Any, meta: SummaryMetadata) -> None:
    self._write(step, Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=meta)]))

  def _write(self, step: int, summary: Summary) -> None:
    if self._log.size == 0:
      self._records.write(_event(file_version="brain.Event:2"))
    self._records.write(_event(step=step, summary=summary))


class Journal:
  """The three logs of a run. Tags in TensorBoard are `stage/name`."""

  def __init__(self, folder: str | os.PathLike[str] | None, sizes: Sizes | None = None):
    """Opens the logs; nothing on disk changes before the first write or `state()`.

    Args:
      folder: where they are; None writes nothing (all processes of a pod but the first).
      sizes: a former `state()`, to continue from there; by default they start afresh.

    Raises ValueError when a log is shorter than its size.
    """
    sizes = sizes or {}
    self._logs = {
      name: AppendLog(Path(folder) / name, sizes.get(name, 0)) if folder is not None else NoLog()
      for name in (EVENTS, METRICS, SAMPLES)
    }
    self.events = EventWriter(self._logs[EVENTS])

  def scalars(self, stage: str, step: int, values: Scalars) -> None:
    """One step's metrics. Floats round-trip exactly through metrics.jsonl (float32 in TensorBoard).

    NaN and infinity are written as Python's json does. Raises ValueError on a value that is no
    scalar.
    """
    numbers = {name: _number(name, value) for name, value in values.items()}
    if taken := {"stage", "step"} & numbers.keys():
      raise ValueError(f"metric {min(taken)!r}: the name is taken by a column of {METRICS}")
    self._row(METRICS, {"stage": stage, "step": step, **numbers})
    self.events.scalars(step, {f"{stage}/{name}": value for name, value in numbers.items()})

  def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Completions and what is known of them: {"prompt":, "completion":, "reward":, ...} each."""
    rows = list(rows)
    for row in rows:
      self._row(SAMPLES, {"stage": stage, "step": step, **row})
    self.events.text(step, f"{stage}/samples", samples_markdown(rows[:SHOWN_SAMPLES]))

  def histogram(self, stage: str, step: int, name: str, values: Any) -> None:
    """A distribution, for TensorBoard only."""
    self.events.histogram(step, f"{stage}/{name}", values)

  def rows(self) -> list[dict[str, Any]]:
    """What `scalars` has written, with `stage` and `step`."""
    return _rows(self._logs[METRICS].read())

  def state(self) -> dict[str, int]:
    """The sizes of the logs in bytes, all of it safely on disk. Store it in the checkpoint."""
    return {name: log.sync() for name, log in self._logs.items()}

  def close(self) -> None:
    """Closes the files."""
    for log in self._logs.values():
      log.close()

  def _row(self, name: str, row: Mapping[str, Any]) -> None:
    self._logs[name].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def samples_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
  """Sample rows as markdown: short fields in one line, texts in blocks, as they are."""
  parts = []
  for row in rows:
    texts = {k: v for k, v in row.items() if k in ("prompt", "completion")}
    facts = [
      f"**{k}** {v:.4g}" if isinstance(v, float) else f"**{k}** {v}"
      for k, v in row.items()
      if k not in texts
    ]
    parts.append(" · ".join(facts))
    parts += [f"{name}:\n\n{fenced(str(text))}" for name, text in texts.items()]
  return "\n\n".join(part for part in parts if part)


def fenced(text: str) -> str:
  """A markdown code block around any text, whatever backticks it holds."""
  fence = "```"
  while fence in text:
    fence += "`"
  return f"{fence}text\n{text}\n{fence}"


def _number(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.size != 1 or array.dtype == object or array.dtype.kind in "US":
    found = f"shape {array.shape}" if array.size != 1 else repr(value)
    raise ValueError(f"metric {name!r}: expected one number, found {found}")
  return int(array.item()) if array.dtype.kind in "iub" else float(array.item())


def _hparam(value: Any) -> bool | int | float | str:
  return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _hparam_info(name: str, configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The type of a field over several configs and whether it differs between them."""
  values = [_hparam(config[name]) for config in configs if name in config]
  if all(isinstance(value, bool) for value in values):
    kind = "DATA_TYPE_BOOL"
  elif any(isinstance(value, bool | str) for value in values):
    kind = "DATA_TYPE_STRING"
  else:
    kind = "DATA_TYPE_FLOAT64"
  differs = len(set(values)) > 1 or len(values) < len(configs)
  return {"name": name, "type": DataType.Value(kind), "differs": differs}


def _event(**fields: Any) -> bytes:
  return Event(wall_time=time.time(), **fields).SerializeToString()
