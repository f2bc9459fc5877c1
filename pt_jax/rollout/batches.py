"""Host arrays of what is compiled: samples as the rows of a launch, pieces as a chunk of prefill.

Shapes come from short lists, so the number of programs is bounded: rows of a launch are `slots`,
or that halved until 8 are left; positions of a view 128, 192, 256, 384, 512...; tokens of a chunk
32, 128, 512...
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pt_jax.rollout import guides
from pt_jax.rollout.programs import Chunk, Rows
from pt_jax.rollout.sampling import Needs
from pt_jax.rollout.scheduler import Piece
from pt_jax.rollout.sequence import Sample
from pt_jax.rollout.speculative import History

FEWEST_ROWS = 8  # fewer rows cost as much: a step reads all weights for each
SHORTEST_VIEW = 128  # positions
VIEW_STEP = 32  # positions that a view which never grows is rounded up to
SHORTEST_CHUNK = 32  # tokens
LOOK_BACK = 1024  # tokens of a sample that proposals are looked up in
STOP_TOKENS = 4  # room for so many; more are rounded up to powers of two


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What the arrays of one engine look like."""

  parts: int  # of the mesh's batch axes
  slots: int  # of each part
  pages: int  # of each part
  rows: int  # tokens of a page
  max_length: int
  vocab_size: int

  @property
  def pages_per_sample(self) -> int:
    return -(-self.max_length // self.rows)

  def launch_rows(self, samples: int) -> int:
    """Rows of each part for so many samples in the fullest part."""
    size = self.slots
    while size % 2 == 0 and size // 2 >= max(samples, FEWEST_ROWS):
      size //= 2
    return size

  def view_pages(self, tokens: int, most: int) -> int:
    """Pages of a view whose longest row has so many tokens now and at most `most` in the end."""
    size = SHORTEST_VIEW
    while size < tokens:
      size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    most = -(-most // VIEW_STEP) * VIEW_STEP
    return min(-(-min(size, most) // self.rows), self.pages_per_sample)

  def chunk_tokens(self, tokens: int) -> int:
    """Tokens of each part of a prefill for so many in the fullest part."""
    size = SHORTEST_CHUNK
    while size < tokens:
      size *= 4
    return size

  def few(self, count: int) -> int:
    """Room for so many samples of each part whose keys and values are moved: 4, 8, 16..."""
    return min(max(4, 1 << (count - 1).bit_length()), self.slots)


def rows(
  shapes: Shapes, places: Sequence[tuple[int, Sample]], count: int, *, paged: bool
) -> tuple[Rows, Needs]:
  """The rows of a launch, and what they need together.

  Args:
    shapes: of the engine.
    places: (row, sample) of what is decoded; its next tokens have pages.
    count: R.
    paged: whether the launch works on pages.
  """
  whole = lambda *shape: np.zeros((count, *shape), np.int32)
  stops = max(len(s.request.sampling.stop_tokens) for _, s in places)
  stops = stop_room(stops)
  fields: dict[str, Any] = {
    **{name: whole() for name in ("token", "position", "end", "number", "top_k")},
    "active": np.zeros(count, bool),
    "key": np.zeros((count, *places[0][1].request.key.shape), np.uint32),
    "temperature": np.ones(count, np.float32),
    "top_p": np.ones(count, np.float32),
    "min_p": np.zeros(count, np.float32),
    "stop_tokens": np.full((count, stops), -1, np.int32),
    "table": np.full((count, shapes.pages_per_sample), shapes.pages, np.int32) if paged else None,
    "allowed": _allowed(shapes, count, places),
  }
  if not paged:  # past the view: nothing is written where no sample is decoded
    fields["position"][:] = shapes.pages_per_sample * shapes.rows
  needs = Needs()
  for row, sample in places:
    _fill(fields, row, sample, shapes)
    own = Needs.of(sample.request.sampling)
    needs = Needs(needs.cuts or own.cuts, max(needs.top, own.top))
  return Rows(**fields), dataclasses.replace(needs, top=_reported(needs.top))


def stop_room(count: int) -> int:
  """Room for so many stop tokens of a row."""
  return max(STOP_TOKENS, 1 << (count - 1).bit_length() if count else 0)


def _reported(top: int) -> int:
  """0, 1, 2, 4, 8...: few numbers of reported tokens, few programs."""
  return 1 << (top - 1).bit_length() if top else 0


def _fill(fields: dict[str, Any], row: int, sample: Sample, shapes: Shapes) -> None:
  request = sample.request
  sampling = request.sampling
  values = {
    "token": sample.tokens[-1],
    "position": sample.computed,
    "end": sample.border(shapes.max_length),
    "active": True,
    "key": request.key,
    "number": request.first + sample.index,
    "temperature": sampling.temperature,
    "top_k": sampling.top_k,
    "top_p": sampling.top_p,
    "min_p": sampling.min_p,
  }
  for name, value in values.items():
    fields[name][row] = value
  fields["stop_tokens"][row, : len(sampling.stop_tokens)] = sampling.stop_tokens
  if fields["table"] is not None:
    fields["table"][row, : len(sample.pages)] = sample.pages


def _allowed(shapes: Shapes, count: int, places: Sequence[tuple[int, Sample]]) -> np.ndarray | None:
  """Masks [R, V / 32] where a row has one now."""
  if not any(sample.bound for _, sample in places):
    return None
  bits = np.repeat(guides.every_token(shapes.vocab_size)[None], count, 0)
  for row, sample in places:
    if sample.bound:
      assert sample.mask is not None  # the engine has had it look
      bits[row] = sample.mask
  return bits


def history(shapes: Shapes, places: Sequence[tuple[int, Sample]], count: int, room: int) -> History:
  """The last tokens of the samples of a launch of `count` rows, with room for so many more."""
  look = min(shapes.max_length, LOOK_BACK)
  tokens, first = np.zeros((count, look + room), np.int32), np.zeros(count, np.int32)
  for row, sample in places:
    first[row] = max(0, len(sample.tokens) - look)
    own = sample.tokens[first[row] :]
    tokens[row, : len(own)] = own
  fields: Any = (tokens, first)
  return History(*fields)


def chunk(shapes: Shapes, parts: Sequence[Sequence[Piece]]) -> Chunk:
  """The arrays of a prefill of these pieces of each part."""
  count = len(parts)
  size = shapes.chunk_tokens(max(sum(p.count for p in part) for part in parts))
  tokens, positions = np.zeros((2, count, size), np.int32)
  lengths = np.zeros((count, shapes.slots), np.int32)
  table = np.zeros((count, shapes.slots, shapes.pages_per_sample), np.int32)
  starts = np.zeros((count, shapes.slots + 1), np.int32)
  for p, part in enumerate(parts):
    at = 0
    for i, piece in enumerate(part):
      end = piece.start + piece.count
      own = slice(at, at + piece.count)
      tokens[p, own] = piece.sample.tokens[piece.start : end]
      positions[p, own] = np.arange(piece.start, end)
      lengths[p, i] = end
      table[p, i, : len(piece.sample.pages)] = piece.sample.pages
      at = starts[p, i + 1] = own.stop
    starts[p, len(part) + 1 :] = at
  fields: Any = (tokens, positions, lengths, table, starts)
  return Chunk(*fields)
