"""A request, its samples, and when a sample ends."""

import dataclasses
import logging
import time
from collections.abc import Sequence

import numpy as np

from pt_jax.rollout.guides import FREE, Guide
from pt_jax.rollout.rollouts import Detokenizer, Output, SamplingParams, StopReason

log = logging.getLogger("pt_jax.rollout")


@dataclasses.dataclass(eq=False)
class Request:
  """A prompt with its samples on their way."""

  number: int
  prompt: tuple[int, ...]
  sampling: SamplingParams
  key: np.ndarray  # data of the PRNG key
  first: int = 0  # sample j folds first + j into the key
  samples: "list[Sample]" = dataclasses.field(default_factory=list)
  # Of the samples that have not begun: pages that hold the prompt for them, by part of the mesh;
  # the sample that computes them.
  held: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  leader: "dict[int, Sample]" = dataclasses.field(default_factory=dict)
  submitted: float = dataclasses.field(default_factory=time.perf_counter)


@dataclasses.dataclass(eq=False)
class Sample:
  """One completion on its way. `tokens[computed]` is the next token that has to be read."""

  request: Request
  index: int  # of the samples of the request
  tokens: list[int]  # of the prompt, then drawn ones
  logprobs: list[float] = dataclasses.field(default_factory=list)  # of drawn ones, as what follows
  versions: list[int] = dataclasses.field(default_factory=list)
  forced: list[int] = dataclasses.field(default_factory=list)  # places in `tokens`
  top: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
  guide: Guide | None = None
  mask: np.ndarray | None = None  # for the next token, where it is `bound`
  detokenizer: Detokenizer | None = None
  text: str = ""
  stop: StopReason | None = None
  reported: int = 0  # drawn tokens that an `Output` has named
  reported_text: int = 0  # characters
  # Where it is in the machine.
  part: int = -1
  computed: int = 0  # tokens whose keys and values are in pages or in the row of a view
  row: int = -1  # of the view, in its part
  stored: int = 0  # tokens whose keys and values are in pages, if it has a row
  pages: list[int] = dataclasses.field(default_factory=list)
  copied_from: int | None = None  # page that is read in place of the one about to be written
  chain: list[bytes] = dataclasses.field(default_factory=list)  # digests of full pages
  # Seconds since the request was submitted, for figures.
  seated_at: float | None = None
  first_at: float | None = None

  @property
  def start(self) -> int:
    """Tokens of the prompt."""
    return len(self.request.prompt)

  @property
  def drawn(self) -> int:
    return len(self.tokens) - self.start

  @property
  def target(self) -> int:
    """Tokens that are computed before a launch reads the last one and draws the next."""
    return len(self.tokens) - 1

  @property
  def ready(self) -> bool:
    """Whether the next launch can draw for it."""
    return self.computed == self.target

  @property
  def bound(self) -> bool:
    """Whether its next token has to be drawn under a mask."""
    return self.guide is not None and self.guide.free == 0

  def look(self) -> bool:
    """Gets the mask of the next token; a guide that has none ends the sample. Returns whether it
    goes on."""
    if self.guide is not None:
      try:
        self.mask = self.guide.mask()
      except ValueError as error:
        self._failed(error)
    return self.stop is None

  def _failed(self, error: ValueError) -> None:
    self.stop = StopReason.FAILED
    where = f"request {self.request.number}, sample {self.index}, token {self.drawn}"
    log.warning("%s: ended: %s", where, " ".join(str(error).split()))

  def limit(self, max_length: int) -> int:
    """Tokens that it may have in the end."""
    return min(self.start + self.request.sampling.max_tokens, max_length)

  def border(self, max_length: int) -> int:
    """Tokens that it may have before the host has to look at it."""
    free = FREE if self.guide is None else max(self.guide.free, 1)
    return min(self.limit(max_length), len(self.tokens) + free)

  def take(
    self,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[tuple[tuple[int, float], ...]],
    version: int,
    max_length: int,
  ) -> None:
    """Takes what a launch drew, up to where the sample ends."""
    count = len(tokens)
    if self.guide is not None or self.detokenizer is not None:
      count = self._read(tokens)
    self.tokens += tokens[:count]
    self.logprobs += logprobs[:count]
    self.top += top[:count]
    self.versions += [version] * count
    if self.stop is None:
      self.stop = self._ended(max_length)

  def _read(self, tokens: Sequence[int]) -> int:
    """Shows tokens to the guide and the detokenizer; returns how many belong to the sample."""
    strings = self.request.sampling.stop_strings
    for i, token in enumerate(tokens):
      if self.guide is not None and not self._guided(token, len(self.tokens) + i):
        return i + 1
      if self.detokenizer is None or token in self.request.sampling.stop_tokens:
        continue
      self.text += self.detokenizer.push(token)
      if any(string in self.text for string in strings):
        self.stop = StopReason.STRING
        return i + 1
    return len(tokens)

  def _guided(self, token: int, place: int) -> bool:
    """Shows a token to the guide; returns whether the guide took it."""
    assert self.guide is not None
    if self.guide.forces:
      self.forced.append(place)
    try:
      self.guide.advance(token)
    except ValueError as error:
      self._failed(error)
    return self.stop is None

  def _ended(self, max_length: int) -> StopReason | None:
    sampling = self.request.sampling
    if self.drawn and self.tokens[-1] in sampling.stop_tokens:
      return StopReason.TOKEN
    if self.drawn >= sampling.max_tokens:
      return StopReason.LENGTH
    return StopReason.BUDGET if len(self.tokens) >= max_length else None

  def output(self, version: int) -> Output:
    """What is new since the last one."""
    a, self.reported = self.reported, self.drawn
    text, self.reported_text = self.text[self.reported_text :], len(self.text)
    return Output(
      self.request.number,
      self.index,
      tuple(self.tokens[self.start + a :]),
      tuple(self.logprobs[a:]),
      text,
      self.stop,
      version,
      tuple(self.top[a:]),
    )
