"""Grain pipelines: mixture -> encode -> windows of examples, packed -> batches -> a host's rows.

A window of examples is read, encoded and packed by best-fit decreasing on its own, so its rows are
a function of its number and the seed. Batches take rows from window after window. The state of an
iterator is then two integers, the window and the row in it, wherever a batch ends.

The global batch does not depend on the number of hosts: every host packs the whole window and keeps
its own rows. Where tokenizing is dear, encode once into ArrayRecord and let `encode` read that.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import grain
import jax
import numpy as np

from pt_jax.data.batch import PADDING_SEGMENT
from pt_jax.data.groups import Group, checked_group, group_length, pack_groups
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import (
  Example,
  Plan,
  TooLong,
  checked_example,
  one_per_row,
  pack,
  pack_rows,
  spread,
)
from pt_jax.data.sources import Row, Source

Encode = Callable[[Row], Example] | Callable[[Row], Group]
Tree = TypeVar("Tree")
ROW_ORDER = 1  # keeps the shuffle of a window's rows apart from other uses of the seed


@dataclasses.dataclass(frozen=True)
class Layout:
  """How examples become rows and rows batches."""

  batch_size: int  # B, rows of the global batch
  row_length: int  # S
  packed: bool = True  # False: one example a row
  window: int = 1024  # examples packed together; more waste less and delay the first batch
  too_long: TooLong = (
    "error"  # an example longer than a row: an error, left out, or its end cut off
  )

  def __post_init__(self):
    for name in ("batch_size", "row_length", "window"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Form:
  """What rows are encoded to, and how that is checked, measured and laid out."""

  checked: Callable[[Any], Any]  # raises ValueError for what cannot be trained on
  length: Callable[[Any], int]  # its tokens
  # Whether a target is left in its first n tokens; None where the rest cannot be cut off.
  cut: Callable[[Any, int], bool] | None
  rows: Callable[[Sequence[Any], Plan], Any]  # many of them to a batch


EXAMPLES = Form(
  checked_example,
  lambda example: len(example.tokens),
  lambda example, length: bool(example.mask[1:length].any()),
  pack_rows,
)
GROUPS = Form(checked_group, group_length, None, pack_groups)


@dataclasses.dataclass(frozen=True)
class Host:
  """The host that takes rows [index * B / count, (index + 1) * B / count) of every batch."""

  index: int = 0
  count: int = 1

  def rows(self, batch_size: int) -> slice:
    """Its rows. Raises ValueError if there is no such host, or the batch does not divide."""
    if not 0 <= self.index < self.count:
      raise ValueError(f"host {self.index} does not exist among {self.count} hosts")
    if batch_size % self.count:
      raise ValueError(f"batch_size={batch_size} does not divide among {self.count} hosts")
    share = batch_size // self.count
    return slice(self.index * share, (self.index + 1) * share)


def train_batches(
  mixture: Mixture,
  encode: Encode,
  layout: Layout,
  *,
  epochs: int | None = None,
  host: Host = Host(),
  read_ahead: int = 1,
  form: Form = EXAMPLES,
) -> "Batches":
  """Batches of a mixture, in its order. If it has a seed, the rows of a window are shuffled too.

  Args:
    mixture: the rows.
    encode: a row to an example or group. A pure function; it runs in threads if `read_ahead` is
      not 0.
    layout: of rows and batches.
    epochs: passes over the data; the last batch is filled up with empty rows. None is without end.
    host: which share of each batch to give.
    read_ahead: windows prepared ahead, each in its own thread; changes nothing in what comes.
    form: of what `encode` gives: `EXAMPLES`, packed as `Batch`es, or `GROUPS`, as
      `ComparisonBatch`es.

  Returns:
    An iterable. Its iterators give batches of [B / hosts, S] NumPy arrays; see `BatchIterator`.

  Raises:
    ValueError: here, for a host or number of epochs that cannot be, and for groups that would be
      cut; while iterating, for a row that cannot be read or encoded, is too long or has nothing to
      train on, naming the row.
  """
  host.rows(layout.batch_size)
  return Batches(_Windows(mixture, encode, layout, epochs, form), host, read_ahead)


def eval_batches(
  source: Source,
  encode: Encode,
  layout: Layout,
  *,
  host: Host = Host(),
  read_ahead: int = 0,
  form: Form = EXAMPLES,
) -> "Batches":
  """One pass over a source in its own order; the last batch is filled up with empty rows.

  Arguments, result and errors as for `train_batches`. Iterate over the result once an evaluation.
  """
  mixture = Mixture({"eval": source}, seed=None)
  return train_batches(
    mixture, encode, layout, epochs=1, host=host, read_ahead=read_ahead, form=form
  )


def microbatches(batch: Tree, count: int) -> Tree:
  """Splits a batch of [B, ...] arrays into [A, B / A, ...]; microbatch a has rows a, a + A, ...

  With that stride a global microbatch has the same rows in the same order for any number of hosts.

  Raises:
    ValueError: the rows do not divide.
  """

  def split(x):
    if count < 1 or len(x) % count:
      raise ValueError(f"{len(x)} rows do not divide into {count} microbatches")
    return x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


class _Window(NamedTuple):
  """The rows of a window, and how many of its examples were left out or cut."""

  rows: Any  # Batch or ComparisonBatch [R, S]
  numbers: np.ndarray  # [R, S] int64, number of the example that has the position, -1 on padding
  dropped: int
  truncated: int


class _Windows:
  """Reads, encodes and packs the examples of one window."""

  def __init__(
    self, mixture: Mixture, encode: Encode, layout: Layout, epochs: int | None, form: Form
  ):
    if epochs is not None and epochs < 1:
      raise ValueError(f"epochs must be at least 1, or None for no end, got {epochs}")
    if layout.too_long == "truncate" and form.cut is None:
      raise ValueError(
        "too_long: expected error or drop (a group of completions cannot be cut), found 'truncate'"
      )
    self.mixture, self.layout, self.epochs, self.form = mixture, layout, epochs, form
    self._encode = encode
    self._size = min(layout.window, len(mixture))  # a larger one would hold an example twice
    self._examples = sys.maxsize if epochs is None else epochs * len(mixture)
    self.count = -(-self._examples // self._size)

  def pack(self, index: int) -> _Window:
    """Window `index` of `count`; a function of the index alone."""
    numbers, examples = self._read(index)
    plan = (pack if self.layout.packed else one_per_row)(
      [self.form.length(example) for example in examples],
      self.layout.row_length,
      too_long=self.layout.too_long,
      names=lambda i: self.mixture.where(numbers[i]),
    )
    rows = self.form.rows(examples, plan), spread(plan, np.array(numbers, np.int64), -1)
    if self.mixture.seed is not None:
      rng = np.random.default_rng([self.mixture.seed, ROW_ORDER, index])
      rows = _take(rows, rng.permutation(plan.rows))
    unread = min(self._size, self._examples - index * self._size) - len(examples)
    return _Window(*rows, unread + plan.dropped, plan.truncated)

  def _read(self, index: int) -> tuple[list[int], list[Any]]:
    """The examples of a window, without those that would have nothing to train on once cut."""
    cut = self.form.cut if self.layout.too_long == "truncate" else None
    numbers, examples = [], []
    first = index * self._size
    for number in range(first, min(first + self._size, self._examples)):
      example = _encoded(self.mixture, self._encode, self.form, number)
      if cut is None or cut(example, self.layout.row_length):
        numbers.append(number)
        examples.append(example)
    return numbers, examples


class Batches(grain.IterDataset):
  """What `train_batches` and `eval_batches` give; every `iter` of it starts at the beginning."""

  def __init__(self, windows: _Windows, host: Host, read_ahead: int):
    options = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=read_ahead)
    numbers = grain.MapDataset.range(windows.count)
    super().__init__(numbers.map(windows.pack).to_iter_dataset(options))
    self._windows, self._host = windows, host

  def __iter__(self) -> "BatchIterator":
    return BatchIterator(iter(cast(grain.IterDataset, self._parent)), self._windows, self._host)


class BatchIterator(grain.DatasetIterator):
  """Batches of one host; goes on bit for bit from `get_state`.

  A state belongs to the data, seed, layout and epochs that made it. The batch size and the number
  of hosts may change.
  """

  def __init__(self, reader: grain.DatasetIterator, windows: _Windows, host: Host):
    super().__init__(reader)
    self._reader = reader
    self._layout, self._host = windows.layout, host
    self._epoch = len(windows.mixture)  # examples
    rows = {k: v for k, v in dataclasses.asdict(windows.layout).items() if k != "batch_size"}
    self._made_with = {**windows.mixture.signature(), **rows, "epochs": windows.epochs}
    self._window: _Window | None = None  # the one being used, once it is read
    self._number = 0  # its number
    self._row = 0  # its next row
    self._counts = {"examples": 0, "dropped": 0, "truncated": 0}
    # [B, S] int64 of the last batch of all hosts: which example (of the mixture, from 0; of
    # `eval_batches`, the row of the source) has the position, -1 on padding
    self.numbers = np.zeros((0, 0), np.int64)

  def __next__(self) -> Any:
    self._assert_not_closed()
    size = self._layout.batch_size
    parts, missing = [], size
    while missing and (window := self._current()) is not None:
      taken = slice(self._row, self._row + missing)
      parts.append(part := _take((window.rows, window.numbers), taken))
      missing -= len(part[1])
      self._row += len(part[1])
      if self._row == len(window.rows.tokens):
        self._leave(window)
    if not parts:
      raise StopIteration
    if missing:
      parts.append(_empty_rows(parts[0], missing))
    batch, self.numbers = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    ids = getattr(batch, "group_ids", batch.segment_ids)
    self._counts["examples"] += int((ids.max(axis=1) + 1).sum())
    return _take(batch, self._host.rows(size))

  @property
  def counts(self) -> dict[str, float]:
    """For the log, of global batches: examples given, dropped and truncated so far, and the epoch.

    What a window dropped or truncated counts when its last row is given. The epoch is how often the
    data has been gone through.
    """
    passed = self._counts["examples"] + self._counts["dropped"]
    return {**self._counts, "epoch": passed / self._epoch}

  def get_state(self) -> dict[str, Any]:
    """Where the next batch starts, as JSON values."""
    place = {"window": self._number, "row": self._row}
    return {**place, "counts": dict(self._counts), "made_with": self._made_with}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a state. Raises ValueError if other data or another layout made it, naming which."""
    for name, now in self._made_with.items():
      if (then := state["made_with"].get(name)) != now:
        raise ValueError(f"the state of the batches was saved with {name}={then}, now {name}={now}")
    grain.experimental.set_next_index(self._reader, state["window"])
    self._window, self._number, self._row = None, state["window"], state["row"]
    self._counts = dict(state["counts"])

  def _current(self) -> _Window | None:
    """The window with the next row, read if it was not yet; None at the end of the data."""
    fruitless = 0
    while self._window is None:
      try:
        window = next(self._reader, None)
      except Exception:  # Grain would go on with the window after it
        grain.experimental.set_next_index(self._reader, self._number)
        raise
      if window is None:
        return None
      if len(window.rows.tokens):
        self._window = window
        break
      self._leave(window)
      fruitless += window.dropped
      if fruitless >= self._epoch:
        raise ValueError(f"all {self._epoch} rows of the data are too long for the row length")
    return self._window

  def _leave(self, window: _Window) -> None:
    self._counts["dropped"] += window.dropped
    self._counts["truncated"] += window.truncated
    self._window, self._number, self._row = None, self._number + 1, 0


def _encoded(mixture: Mixture, encode: Encode, form: Form, number: int) -> Any:
  """Example or group `number` of the mixture; errors name its row."""
  row = mixture[number]  # names the row itself if it cannot be read
  try:
    return form.checked(encode(row))
  except Exception as error:
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    raise ValueError(f"{mixture.where(number)}: {reason}") from error


def _take(batch: Tree, rows: slice | np.ndarray) -> Tree:
  return jax.tree.map(lambda x: x[rows], batch)


def _empty_rows(like: tuple[Any, np.ndarray], rows: int) -> tuple[Any, np.ndarray]:
  """Rows that hold padding alone, for (a batch, its numbers)."""
  batch, numbers = jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), like)
  ids = [name for name in ("segment_ids", "group_ids") if hasattr(batch, name)]
  padding = np.full_like(batch.segment_ids, PADDING_SEGMENT)
  return batch.replace(**dict.fromkeys(ids, padding)), numbers - 1
