"""Where launches find keys and values: in pages, or in rows of a view that samples keep while they
run (`cache` says which suits what), and every program that touches either."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pt_jax.models.config import ModelConfig
from pt_jax.rollout import batches, cache, programs, speculative
from pt_jax.rollout.proposals import Plan
from pt_jax.rollout.sampling import Needs
from pt_jax.rollout.sequence import Sample
from pt_jax.weights import Params

# Tokens that a sample must still be allowed for the view to shrink. In 384 completions of at most
# 48 tokens shrinking saved nothing, and each program for fewer rows takes a second to compile.
WORTH = 64
Parts = Sequence[Sequence[Sample]]  # samples of each part of the mesh's batch axes


class Paged:
  """Launches work on the pages. The last page of each part is no sequence's: rows without a sample
  write there."""

  paged = True

  def __init__(self, configs: Sequence[ModelConfig], shapes: batches.Shapes):
    """
    Args:
      configs: of the model, and of the draft if there is one: it has the same pages and rows, with
        keys and values of its own.
      shapes: of the engine.
    """
    self.configs, self.shapes = tuple(configs), shapes
    count = shapes.parts * (shapes.pages + 1)
    self.pages = tuple(programs.empty_pages(c, count, shapes.rows) for c in self.configs)
    self.programs: set[Any] = set()  # names and shapes of what was asked for

  def clear(self) -> None:
    """What runs next depends on nothing that ran before."""

  def prefill(self, weights: Sequence[Params], parts: Sequence[Sequence[Any]]) -> None:
    """Computes pieces of sequences into their pages."""
    chunk = batches.chunk(self.shapes, parts)
    self.programs.add(("prefill", chunk.tokens.shape))
    limit = self.shapes.max_length
    self.pages = tuple(
      programs.prefill(w, pages, chunk, config=c, limit=limit)
      for c, w, pages in zip(self.configs, weights, self.pages)
    )

  def sit(self, ready: Parts, chosen: Parts, steps: int, most: int) -> int:
    """Makes room for a launch.

    Args:
      ready: samples that could be decoded.
      chosen: those that the launch decodes; their next `steps` tokens have pages.
      steps: tokens that are wanted.
      most: tokens that no sequence exceeds.

    Returns how many tokens there is room for, 1 to `steps`.
    """
    moved = [[s for s in part if s.copied_from is not None] for part in chosen]
    if any(moved):
      of = lambda s: s.pages[s.computed // self.shapes.rows]
      none = self.shapes.pages
      source = self._table(moved, none, lambda s: s.copied_from)
      target = self._table(moved, none, of)
      self.programs.add(("copy", source.shape))
      self.pages = tuple(programs.copy(pages, source, target) for pages in self.pages)
    return steps

  def places(self, chosen: Parts) -> tuple[list[tuple[int, Sample]], int]:
    """(row of the launch, sample) of each sample, and how many rows there are."""
    each = self.shapes.launch_rows(max(map(len, chosen)))
    places = [(p * each + i, s) for p, part in enumerate(chosen) for i, s in enumerate(part)]
    return places, each * len(chosen)

  def fewer(self, chosen: Parts, rows: int) -> int:
    """Samples of a part for which half of these rows are enough; 0 where that is no gain."""
    fewer = self.shapes.launch_rows(rows // len(chosen) // 2)
    return fewer if fewer < max(map(len, chosen)) else 0

  def launch(
    self,
    weights: Sequence[Params],
    rows: programs.Rows,
    steps: int,
    until: tuple[int, int],
    needs: Needs,
    tokens: int,
  ) -> programs.Drawn:
    """`programs.launch`, its tokens on the host. A draft does not see what is drawn."""
    options: Any = {"needs": needs, "tokens": tokens, "limit": self.shapes.max_length}
    key = (len(rows.token), rows.stop_tokens.shape, rows.allowed is None, *options.values())
    self.programs.add(("launch", *key, self._shape()))
    held, drawn = programs.launch(
      weights[0],
      self._cache()[0],
      rows,
      np.int32(steps),
      *map(np.int32, until),
      config=self.configs[0],
      **options,
    )
    self._keep((held, *self._cache()[1:]))
    return jax.device_get(drawn)

  def speculate(
    self,
    weights: Sequence[Params],
    rows: programs.Rows,
    history: speculative.History,
    steps: int,
    until: tuple[int, int],
    plan: Plan,
    needs: Needs,
    tokens: int,
  ) -> tuple[programs.Drawn, speculative.Tally]:
    """`speculative.launch`, its tokens on the host."""
    options: Any = {"plan": plan, "needs": needs, "tokens": tokens}
    options |= {"limit": self.shapes.max_length}
    self.programs.add(
      ("speculate", history.tokens.shape, rows.stop_tokens.shape, *options.values(), self._shape())
    )
    if self.paged:  # what is read past the pages of a sequence goes to the page of none
      more = -(-plan.tokens // self.shapes.rows)
      wider = [(0, 0), (0, more)]
      table: Any = np.pad(np.asarray(rows.table), wider, constant_values=self.shapes.pages)
      rows = dataclasses.replace(rows, table=table)
    held, drawn, tally = speculative.launch(
      tuple(weights),
      self._cache(),
      rows,
      history,
      np.int32(steps),
      *map(np.int32, until),
      **options,
    )
    self._keep(held)
    return jax.device_get((drawn, tally))

  def store(self, samples: Sequence[Sample]) -> None:
    """What was decoded of these samples is in their pages afterwards."""

  def _table(self, parts: Parts, none: int, value: Any) -> np.ndarray:
    """[D, F] int32 of a number for each sample."""
    out = np.full((len(parts), self.shapes.few(max(map(len, parts)))), none, np.int32)
    for own, part in zip(out, parts):
      own[: len(part)] = [value(sample) for sample in part]
    return out

  def _cache(self) -> speculative.Caches:
    return self.pages

  def _keep(self, held: Any) -> None:
    self.pages = held

  def _shape(self) -> Any:
    return None


class Viewed(Paged):
  """A sample that is decoded has a row of the view until it leaves."""

  paged = False

  def __init__(self, configs: Sequence[ModelConfig], shapes: batches.Shapes):
    super().__init__(configs, shapes)
    self._views: tuple[cache.View, ...] = ()
    self._made = (0, 0)  # rows of each part and pages of a row of the views that there are
    self.clear()

  def clear(self) -> None:
    """Nobody sits. The views stay, and are used again where the next ones have their size."""
    self._each = self._pages = 0  # rows of each part; pages of a row
    self._seats: list[list[Sample | None]] = [[] for _ in range(self.shapes.parts)]

  def sit(self, ready: Parts, chosen: Parts, steps: int, most: int) -> int:
    self._seats = [
      [s if s is not None and (s.part, s.row) == (p, i) else None for i, s in enumerate(part)]
      for p, part in enumerate(self._seats)
    ]
    if not any(s is not None for part in self._seats for s in part):
      self.clear()
    pages, steps = self._length(ready, steps, most)
    each = self.shapes.launch_rows(max(map(len, ready)))
    if each < self._each and not self._long(ready):
      each = self._each
    if (each, pages) != (self._each, self._pages):
      self._resize(each, pages)
    new = [[s for s in part if s.row < 0] for part in ready]
    if any(new):
      self._seat(new)
    return steps

  def _length(self, ready: Parts, steps: int, most: int) -> tuple[int, int]:
    """Pages of a row, and steps: where the view would have to grow only for the end of a launch,
    the launch is cut short instead. It shrinks when half of it is enough."""
    longest = max(s.computed for part in ready for s in part)
    pages = self.shapes.view_pages(longest + 1, most)
    if pages < self._pages < 2 * pages:
      pages = self._pages
    room = pages * self.shapes.rows - longest
    if room < steps and 4 * room < steps:
      return self.shapes.view_pages(longest + steps, most), steps
    return pages, min(steps, room)

  def _long(self, parts: Parts) -> bool:
    """Whether one of these may go on for so long that fewer rows pay."""
    size = self.shapes.max_length
    return any(s.limit(size) - len(s.tokens) >= WORTH for part in parts for s in part)

  def fewer(self, chosen: Parts, rows: int) -> int:
    return super().fewer(chosen, rows) if self._long(chosen) else 0

  def _resize(self, each: int, pages: int) -> None:
    """Samples move to the first rows."""
    source = np.zeros((self.shapes.parts, each), np.int32)
    for p, part in enumerate(self._seats):
      kept = [s for s in part if s is not None]
      for i, sample in enumerate(kept):
        source[p, i], sample.row = sample.row, i
      self._seats[p] = [*kept, *[None] * (each - len(kept))]
    if self._each or self._made != (each, pages):
      views = self._views if self._each else [None] * len(self.configs)
      self.programs.add(("resize", self._each, self._pages, each, pages))
      length = pages * self.shapes.rows
      self._views = tuple(
        programs.resize(c, view, source, length) for c, view in zip(self.configs, views)
      )
    self._each, self._pages = self._made = (each, pages)

  def _seat(self, new: Parts) -> None:
    """Copies the pages of these samples to free rows."""
    for p, part in enumerate(new):
      free = [i for i, s in enumerate(self._seats[p]) if s is None]
      for sample, row in zip(part, free):
        sample.row, self._seats[p][row] = row, sample
    rows = self._table(new, self._each, lambda s: s.row)
    longest = max(s.computed for part in new for s in part)
    wide = min(1 << (-(-longest // self.shapes.rows) - 1).bit_length(), self._pages)
    table = np.zeros((*rows.shape, wide), np.int32)
    for p, part in enumerate(new):
      for own, sample in zip(table[p], part):
        sample.stored = sample.computed
        pages = sample.pages[:wide]
        own[: len(pages)] = pages
        if sample.copied_from is not None:
          own[sample.computed // self.shapes.rows] = sample.copied_from
    self.programs.add(("seat", self._each, table.shape))
    self._views = tuple(
      programs.seat(c, view, pages, rows, table)
      for c, view, pages in zip(self.configs, self._views, self.pages)
    )

  def places(self, chosen: Parts) -> tuple[list[tuple[int, Sample]], int]:
    places = [(p * self._each + s.row, s) for p, part in enumerate(chosen) for s in part]
    return places, self._each * len(chosen)

  def store(self, samples: Sequence[Sample]) -> None:
    size = self.shapes.rows
    new = [s for s in samples if s.row >= 0 and s.computed // size > s.stored // size]
    if not new:
      return
    parts = [[s for s in new if s.part == p] for p in range(self.shapes.parts)]
    rows = self._table(parts, 0, lambda s: s.row)
    table = np.full((*rows.shape, self._pages), self.shapes.pages, np.int32)
    for p, part in enumerate(parts):
      for own, sample in zip(table[p], part):
        full = slice(sample.stored // size, sample.computed // size)
        own[full], sample.stored = sample.pages[full], sample.computed
    self.programs.add(("store", self._each, table.shape))
    self.pages = tuple(
      programs.store(c, pages, view, rows, table)
      for c, pages, view in zip(self.configs, self.pages, self._views)
    )

  def _cache(self) -> speculative.Caches:
    assert self._views  # `sit` comes first
    return self._views

  def _keep(self, held: Any) -> None:
    self._views = held

  def _shape(self) -> Any:
    return self._pages
