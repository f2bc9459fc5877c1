"""The host's side of a `generate`: which request sits in which slot, and when a completion ends."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from pt_jax.rollout.rollouts import Detokenizer, Rollouts, SamplingParams, StopReason

REFILL = 8  # a launch ends when one slot in so many is free and requests wait
ROUND = (
  16  # prompt and cache lengths are rounded up to multiples, so that few programs are compiled
)


@flax.struct.dataclass
class Fill:
  """A refill: R prompt rows, and which of the N slots begins with which."""

  tokens: jax.Array  # [R, P] int32, right-padded
  length: jax.Array  # [R] int32
  source: jax.Array  # [N] int32, row of the prompt, -1 for slots that go on
  end: jax.Array  # [N] int32, position that the completion may not reach
  request: jax.Array  # [N] int32


@flax.struct.dataclass
class Drawn:
  """Tokens of one launch of at most C; entries past `count` are 0."""

  tokens: jax.Array  # [N, C] int32
  logprobs: jax.Array  # [N, C] float32
  count: jax.Array  # [N] int32


@dataclasses.dataclass
class Request:
  """One completion on its way."""

  prompt: int  # index
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  version: list[int] = dataclasses.field(default_factory=list)
  text: str = ""  # kept only when there are stop strings
  detokenizer: Detokenizer | None = None
  stop: StopReason | None = None


class Schedule:
  """Requests first come, first served in N slots."""

  def __init__(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    n: int,
    *,
    slots: int,
    max_length: int,
    row_multiple: int,
    detokenizer: Callable[[], Detokenizer] | None,
  ):
    """Takes prompts that `Engine.generate` has checked.

    Args:
      prompts: token ids.
      sampling: when to stop.
      n: completions per prompt.
      slots: N.
      max_length: tokens that a prompt and its completion may have together.
      row_multiple: rows of a prefill are padded to a multiple, for the mesh.
      detokenizer: for stop strings.
    """
    self.requests = [Request(i // n) for i in range(len(prompts) * n)]
    self.prefilled = 0  # prompt tokens handed out by `seat`
    longest = max(map(len, prompts))
    self.length = min(max_length, _round(longest + sampling.max_tokens))
    self._width = _round(longest)
    self._prompts, self._sampling, self._detokenizer = prompts, sampling, detokenizer
    self._max_length, self._row_multiple = max_length, row_multiple
    self._seated: list[int | None] = [None] * slots
    self._waiting = list(range(len(self.requests)))[::-1]

  @property
  def unfinished(self) -> bool:
    """Whether a request waits or sits."""
    return bool(self._waiting) or any(seat is not None for seat in self._seated)

  @property
  def free(self) -> np.ndarray:
    """[N] bool, slots without a request."""
    return np.array([seat is None for seat in self._seated])

  @property
  def enough(self) -> int:
    """How many slots have to be free for a launch to return."""
    slots = len(self._seated)
    spare = max(1, slots // REFILL) if self._waiting else slots
    return min(spare + int(self.free.sum()), slots)

  def seat(self) -> Fill | None:
    """Gives free slots to waiting requests; None when there are none of either."""
    rows: dict[int, int] = {}
    slots = len(self._seated)
    source = np.full(slots, -1, np.int32)
    end, request = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    for slot in np.flatnonzero(self.free)[: len(self._waiting)]:
      index = self._waiting.pop()
      prompt = self.requests[index].prompt
      self._seated[slot] = index
      source[slot] = rows.setdefault(prompt, len(rows))
      end[slot] = min(len(self._prompts[prompt]) + self._sampling.max_tokens, self.length)
      request[slot] = index
    if not rows:
      return None
    tokens, length = self._prompt_rows(list(rows))
    fields: Any = (tokens, length, source, end, request)
    return Fill(*fields)

  def _prompt_rows(self, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as rows, as many as the next power of 4: few shapes, few compilations."""
    count = 1
    while count < len(chosen):
      count *= 4
    count = max(min(count, len(self._seated)), len(chosen))
    count = -(-count // self._row_multiple) * self._row_multiple
    tokens = np.zeros((count, self._width), np.int32)
    length = np.ones(count, np.int32)
    for row, prompt in enumerate(chosen):
      length[row] = len(self._prompts[prompt])
      tokens[row, : length[row]] = self._prompts[prompt]
    self.prefilled += int(length[: len(chosen)].sum())
    return tokens, length

  def collect(self, drawn: Drawn, version: int) -> None:
    """Hands tokens, drawn under these weights, to their requests and frees the slots that ended."""
    for slot, index in enumerate(self._seated):
      if index is None:
        continue
      request, count = self.requests[index], drawn.count[slot]
      tokens, logprobs = drawn.tokens[slot, :count], drawn.logprobs[slot, :count]
      for token, logprob in zip(tokens.tolist(), logprobs.tolist()):
        request.tokens.append(token)
        request.logprobs.append(logprob)
        request.version.append(version)
        request.stop = self._stop(request, token)
        if request.stop is not None:
          self._seated[slot] = None
          break

  def _stop(self, request: Request, token: int) -> StopReason | None:
    sampling = self._sampling
    if token in sampling.stop_tokens:
      return StopReason.TOKEN
    if sampling.stop_strings and self._detokenizer is not None:
      request.detokenizer = request.detokenizer or self._detokenizer()
      request.text += request.detokenizer.push(token)
      if any(string in request.text for string in sampling.stop_strings):
        return StopReason.STRING
    if len(request.tokens) == sampling.max_tokens:
      return StopReason.LENGTH
    if len(self._prompts[request.prompt]) + len(request.tokens) >= self._max_length:
      return StopReason.BUDGET
    return None

  def rollouts(self) -> Rollouts:
    """The finished requests as right-padded arrays, in NumPy."""
    requests = self.requests
    prompt_length = np.array([len(self._prompts[r.prompt]) for r in requests], np.int32)
    length = prompt_length + np.array([len(r.tokens) for r in requests], np.int32)
    shape = (len(requests), int(length.max()))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    version = np.full(shape, -1, np.int32)
    for i, r in enumerate(requests):
      tokens[i, : prompt_length[i]] = self._prompts[r.prompt]
      drawn = slice(prompt_length[i], length[i])
      tokens[i, drawn], logprobs[i, drawn], version[i, drawn] = r.tokens, r.logprobs, r.version
    stop = np.array([r.stop for r in requests], np.int8)
    fields: Any = (tokens, prompt_length, length, logprobs, version, stop)
    return Rollouts(*fields)


def _round(length: int) -> int:
  return -(-length // ROUND) * ROUND
