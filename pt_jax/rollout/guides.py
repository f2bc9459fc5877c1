"""What the host may impose on a completion: guides say which tokens may come next.

A guided completion runs free for `free` tokens; then every token is drawn under a mask, one launch
a token. The log-prob of a token is that of the unmasked distribution, as ever.

W = ceil(V / 32) words of a mask.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

FREE = 1 << 30  # tokens: no mask will be asked for


class Guide(Protocol):
  """Follows one completion."""

  @property
  def free(self) -> int:
    """How many tokens may be drawn before the next mask is needed; 0 needs one now."""
    ...

  @property
  def forces(self) -> bool:
    """Whether the next token is given, whatever the model says."""
    ...

  def mask(self) -> np.ndarray:
    """[W] uint32: bit t % 32 of word t // 32 says whether token t may come next. Raises ValueError
    where it cannot say."""
    ...

  def advance(self, token: int) -> None:
    """Takes the token that was drawn. Raises ValueError for one that it cannot take."""
    ...


class Matcher(Protocol):
  """What a grammar gives: see `constraints.Matcher`."""

  def mask(self) -> np.ndarray: ...

  def advance(self, token: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Thinking:
  """A cap on how long a completion may think.

  After `budget` tokens without the closing tag, the tokens of the tag are forced, one after the
  other. With several budgets sample j of a request has number j modulo their count, so a group
  thinks for graded lengths.
  """

  budgets: tuple[int, ...]  # tokens
  close: tuple[int, ...]  # the tokens of the closing tag

  def __post_init__(self):
    if not self.budgets or min(self.budgets) < 0:
      raise ValueError(f"thinking.budgets: expected tokens, 0 or more, found {self.budgets}")
    if not self.close or min(self.close) < 0:
      raise ValueError(f"thinking.close: expected the tokens of the tag, found {self.close}")


class Capped:
  """The guide of `Thinking` for one completion."""

  def __init__(self, thinking: Thinking, sample: int, vocab_size: int):
    self._left = thinking.budgets[sample % len(thinking.budgets)]
    self._close, self._vocab_size = thinking.close, vocab_size
    self._recent: list[int] = []
    self._forced = 0  # tokens of the tag that have been forced
    self.closed = False

  @property
  def free(self) -> int:
    return FREE if self.closed else self._left

  @property
  def forces(self) -> bool:
    return self.free == 0

  def mask(self) -> np.ndarray:
    bits = np.zeros(-(-self._vocab_size // 32), np.uint32)
    token = self._close[self._forced]
    bits[token // 32] = np.uint32(1 << token % 32)
    return bits

  def advance(self, token: int) -> None:
    if self.closed:
      return
    if self._left == 0:
      self._forced += 1
      self.closed = self._forced == len(self._close)
      return
    self._left -= 1
    self._recent = [*self._recent, token][-len(self._close) :]
    self.closed = tuple(self._recent) == self._close


class Constrained:
  """The guide of a grammar: every token is drawn under its mask, from where `after` lets go."""

  def __init__(self, matcher: Matcher, after: Capped | None = None):
    self._matcher, self._after = matcher, after

  @property
  def _thinks(self) -> bool:
    return self._after is not None and not self._after.closed

  @property
  def free(self) -> int:
    return self._after.free if self._after is not None and self._thinks else 0

  @property
  def forces(self) -> bool:
    return self._after is not None and self._thinks and self._after.forces

  def mask(self) -> np.ndarray:
    if self._after is not None and self._thinks:
      return self._after.mask()
    return self._matcher.mask()

  def advance(self, token: int) -> None:
    if self._after is not None and self._thinks:
      self._after.advance(token)
    else:
      self._matcher.advance(token)


def every_token(vocab_size: int) -> np.ndarray:
  """[W] uint32, the mask that allows all."""
  return np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)


def words(vocab_size: int) -> int:
  """W, the words of a mask."""
  return -(-vocab_size // 32)


def allows(mask: Sequence[int], token: int) -> bool:
  """Whether a mask lets this token come next."""
  return bool(int(mask[token // 32]) >> token % 32 & 1)
