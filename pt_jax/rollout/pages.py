"""The host's book of pages: who holds which, which are free, and which of the free ones to reuse
last.

A page is a number. It is *held* by one or more sequences, *idle* (held by none, but what it says is
worth keeping), or *free*. `take` prefers free pages and then gives away the page that has been idle
for longest.
"""

import collections
from collections.abc import Callable


class PagePool:
  """Pages 0 to count - 1 with reference counts."""

  def __init__(self, count: int, evict: Callable[[int], None] = lambda page: None):
    """
    Args:
      count: of pages.
      evict: told of an idle page whose content is about to be lost.
    """
    self.count = count
    self._evict = evict
    self._references = [0] * count
    self._free = list(range(count))[::-1]
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
    self._kept: set[int] = set()

  @property
  def available(self) -> int:
    """Pages that `take` can give."""
    return len(self._free) + len(self._idle)

  @property
  def held(self) -> int:
    """Pages that somebody holds."""
    return self.count - self.available

  def references(self, page: int) -> int:
    """How many hold the page."""
    return self._references[page]

  def take(self) -> int:
    """A page that nobody holds, now held once. Raises ValueError when there is none."""
    if self._free:
      page = self._free.pop()
    elif self._idle:
      page, _ = self._idle.popitem(last=False)
      self._kept.discard(page)
      self._evict(page)
    else:
      raise ValueError(f"page pool: all {self.count} pages are held")
    self._references[page] = 1
    return page

  def share(self, page: int) -> None:
    """One more holds the page: a held or an idle one."""
    if not self._references[page]:
      if page not in self._idle:
        raise ValueError(f"page pool: page {page} is free and cannot be shared")
      del self._idle[page]
    self._references[page] += 1

  def release(self, page: int) -> None:
    """One less holds the page."""
    if not self._references[page]:
      raise ValueError(f"page pool: page {page} is released, and nobody holds it")
    self._references[page] -= 1
    if self._references[page]:
      return
    if page in self._kept:
      self._idle[page] = None
    else:
      self._free.append(page)

  def keep(self, page: int) -> None:
    """What this held page says is worth keeping once nobody holds it."""
    if not self._references[page]:
      raise ValueError(f"page pool: page {page} is to be kept, and nobody holds it")
    self._kept.add(page)

  def forget(self) -> None:
    """Nothing is worth keeping any more."""
    self._kept.clear()
    self._free.extend(self._idle)
    self._idle.clear()
