"""Sources: files of rows with random access, each able to say where a row stands.

A row is a JSON object. Reading is lazy, so a bad row is reported when it is read, as `file:line`
(JSON Lines, from 1 as editors count) or `file[index]` (JSON arrays and ArrayRecord, from 0).
"""

import array
import bisect
import gzip
import io
import itertools
import json
import mmap
import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, SupportsIndex

import grain
import numpy as np

Row = dict[str, Any]
Path = str | os.PathLike[str]
PACKED = ".gz"


class Source(Protocol):
  """What the rest of the room asks of a source; Grain's random-access protocol and `where`."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex, /) -> Row: ...

  def where(self, index: int) -> str:
    """Names the row for a person: file and line or index."""
    ...


class MemorySource:
  """Rows held in memory."""

  def __init__(self, rows: Sequence[Row], name: str = "memory", fields: Sequence[str] = ()):
    self._rows, self._name, self._fields = rows, name, tuple(fields)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: SupportsIndex, /) -> Row:
    index = _in_range(index, len(self))
    return _checked(self._rows[index], self.where(index), self._fields)

  def where(self, index: int) -> str:
    return f"{self._name}[{index}]"


class JsonSource(MemorySource):
  """A file with one JSON array of objects, read whole.

  Args:
    path: the file.
    fields: names that every row must have.

  Raises:
    ValueError: there is no such file, or it is not a JSON array with at least one row.
  """

  def __init__(self, path: Path, fields: Sequence[str] = ()):
    rows = _parsed(bytes(_content(path)), str(path))
    if not isinstance(rows, list) or not rows:
      raise ValueError(f"{path}: expected a JSON array of rows, got {_kind(rows)}")
    super().__init__(rows, str(path), fields)


class JsonlSource:
  """A JSON Lines file, read by line through an index of byte offsets. Blank lines are not rows.

  One that ends in .gz is unpacked into memory.

  Args:
    path: the file; it must not be changed while it is open.
    fields: names that every row must have.

  Raises:
    ValueError: there is no such file, or it has no rows.
  """

  def __init__(self, path: Path, fields: Sequence[str] = ()):
    self._path, self._fields = path, tuple(fields)
    self._bytes = _content(path)
    mapped = self._bytes
    read = mapped.readline if isinstance(mapped, mmap.mmap) else io.BytesIO(mapped).readline
    spans, lines, stop = array.array("q"), array.array("q"), 0
    for number, line in enumerate(iter(read, b""), start=1):
      start, stop = stop, stop + len(line)
      if not line.isspace():
        spans.extend((start, stop))
        lines.append(number)
    if not lines:
      raise ValueError(f"{path}: no rows")
    self._spans = np.asarray(spans).reshape(-1, 2)  # [N, 2] each row's first byte, and its end
    self._lines = np.asarray(lines)  # [N] line of each row, from 1

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, index: SupportsIndex, /) -> Row:
    index = _in_range(index, len(self))
    start, stop = self._spans[index].tolist()
    where = self.where(index)
    return _checked(_parsed(self._bytes[start:stop], where), where, self._fields)

  def where(self, index: int) -> str:
    return f"{self._path}:{self._lines[index]}"


class ArrayRecordSource:
  """An ArrayRecord file of JSON objects, as `write_array_record` makes it.

  Args:
    path: the file.
    fields: names that every row must have.

  Raises:
    ValueError: there is no such file, it is not an ArrayRecord file, or it has no rows.
  """

  def __init__(self, path: Path, fields: Sequence[str] = ()):
    self._path, self._fields = path, tuple(fields)
    try:
      self._records = grain.sources.ArrayRecordDataSource(os.fspath(_existing(path)))
    except RuntimeError as error:
      raise ValueError(f"{path}: not an ArrayRecord file ({_first_line(error)})") from error
    if not len(self._records):
      raise ValueError(f"{path}: no rows")

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: SupportsIndex, /) -> Row:
    index = _in_range(index, len(self))
    where = self.where(index)
    try:
      record = self._records[index]
    except RuntimeError as error:
      raise ValueError(f"{where}: cannot be read ({_first_line(error)})") from error
    return _checked(_parsed(record, where), where, self._fields)

  def where(self, index: int) -> str:
    return f"{self._path}[{index}]"


class Concatenated:
  """Several sources as one, one after the other: the shards of a data set."""

  def __init__(self, parts: Sequence[Source]):
    self._parts = tuple(parts)
    self._stops = list(itertools.accumulate(map(len, self._parts)))

  def __len__(self) -> int:
    return self._stops[-1] if self._stops else 0

  def __getitem__(self, index: SupportsIndex, /) -> Row:
    part, inner = self._locate(_in_range(index, len(self)))
    return part[inner]

  def where(self, index: int) -> str:
    part, inner = self._locate(index)
    return part.where(inner)

  def _locate(self, index: int) -> tuple[Source, int]:
    number = bisect.bisect_right(self._stops, index)
    return self._parts[number], index - (self._stops[number - 1] if number else 0)


class Subset:
  """Some rows of a source, in the order given."""

  def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
    self._source, self._indices = source, np.asarray(indices, np.int64)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: SupportsIndex, /) -> Row:
    return self._source[int(self._indices[_in_range(index, len(self))])]

  def where(self, index: int) -> str:
    return self._source.where(int(self._indices[index]))


def open_source(paths: Path | Sequence[Path], fields: Sequence[str] = ()) -> Source:
  """Opens a file by its suffix (.jsonl, .json, .array_record), or several as one source.

  The first two may be gzipped (.jsonl.gz).

  Args:
    paths: a file, or the shards of a data set in order.
    fields: names that every row must have.

  Raises:
    ValueError: as the source of that suffix does, or the suffix is another.
  """
  if not isinstance(paths, (str, os.PathLike)):
    return Concatenated([open_source(path, fields) for path in paths])
  kinds = {".jsonl": JsonlSource, ".json": JsonSource, ".array_record": ArrayRecordSource}
  path = pathlib.Path(paths)
  packed = path.suffix == PACKED and path.with_suffix("").suffix in (".jsonl", ".json")
  suffix = (path.with_suffix("") if packed else path).suffix
  if suffix not in kinds:
    raise ValueError(f"{paths}: cannot read {suffix or 'no suffix'}, expected {', '.join(kinds)}")
  return kinds[suffix](paths, fields)


def split(source: Source, held_out: int, seed: int = 0) -> tuple[Subset, Subset]:
  """Splits a source into (the rest, `held_out` random rows); the same rows for the same seed.

  Raises:
    ValueError: one of the two would be empty.
  """
  if not 0 < held_out < len(source):
    raise ValueError(f"held_out must be in 1..{len(source) - 1}, got {held_out}")
  order = np.random.default_rng(seed).permutation(len(source))
  return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))


def write_array_record(path: Path, rows: Iterable[Row]) -> int:
  """Writes rows as an ArrayRecord file, one JSON object a record, and returns how many.

  The file appears under its name when it is complete.

  Raises:
    ValueError: the file exists already, its folder does not, or a row is not a JSON object.
  """
  # Not at the top: ArrayRecord has no Windows wheel, and reading JSON does not need it.
  from array_record.python import array_record_module

  if os.path.exists(path):
    raise ValueError(f"{path}: exists already")
  if not os.path.isdir(folder := os.path.dirname(path) or "."):
    raise ValueError(f"{folder}: no such folder")
  partial = f"{os.fspath(path)}.partial"
  writer = array_record_module.ArrayRecordWriter(partial, "group_size:1")  # 1: random access
  count = 0
  try:
    for row in rows:
      writer.write(_dumped(row, f"row {count}"))
      count += 1
    writer.close()
    os.replace(partial, path)
  except BaseException:
    writer.close()
    os.remove(partial)
    raise
  return count


def _existing(path: Path) -> pathlib.Path:
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such file")
  return pathlib.Path(path)


def _content(path: Path) -> mmap.mmap | bytes:
  """What is in a file, unpacked if its name says that it is packed; memory-mapped if not."""
  file = _existing(path)
  if file.suffix == PACKED:
    try:
      return gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"{path}: not a gzip file ({_first_line(error)})") from error
  with file.open("rb") as opened:
    if not os.fstat(opened.fileno()).st_size:
      return b""
    return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _in_range(index: SupportsIndex, length: int) -> int:
  number = index.__index__()
  if not 0 <= number < length:
    raise IndexError(f"row {number} of a source with {length} rows")
  return number


def _parsed(text: bytes, where: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
    raise ValueError(f"{where}: not valid JSON ({error})") from error


def _dumped(row: Row, where: str) -> bytes:
  try:
    return json.dumps(_checked(row, where, ()), ensure_ascii=False, allow_nan=False).encode()
  except (TypeError, UnicodeEncodeError) as error:
    raise ValueError(f"{where}: cannot be written as JSON ({error})") from error


def _checked(row: Any, where: str, fields: tuple[str, ...]) -> Row:
  if not isinstance(row, dict):
    raise ValueError(f"{where}: expected a JSON object, got {_kind(row)}")
  missing = [field for field in fields if field not in row]
  if missing:
    found = ", ".join(map(repr, row)) or "no fields"
    raise ValueError(f"{where}: no field {missing[0]!r}, found {found}")
  return row


def _kind(value: Any) -> str:
  return "an empty array" if value == [] else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
  return str(error).partition("\n")[0]
