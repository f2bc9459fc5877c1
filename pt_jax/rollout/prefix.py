"""Automatic prefix caching: pages by what stands in them and before them.

The digest of a full page is that of its tokens and of the page before it, so two pages with one
digest say the same about the same positions under the same weights. `salt` tells sequences apart
that may not share (another adapter, say).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from pt_jax.rollout.pages import PagePool


def extend(chain: list[bytes], tokens: Sequence[int], rows: int, salt: bytes = b"") -> None:
  """Appends to `chain` the digests of the full pages of `tokens` that it does not have yet.

  Args:
    chain: one digest per full page.
    tokens: of the sequence from its beginning.
    rows: tokens of a page.
    salt: of the first page.
  """
  while (len(chain) + 1) * rows <= len(tokens):
    start = len(chain) * rows
    own = np.asarray(tokens[start : start + rows], np.int32).tobytes()
    before = chain[-1] if chain else salt
    chain.append(hashlib.blake2b(before + own, digest_size=16).digest())


class PrefixCache:
  """Digests of the pages of one pool."""

  def __init__(self, count: int):
    """Makes the pool, of `count` pages."""
    self.pool = PagePool(count, self._evicted)
    self._page: dict[bytes, int] = {}
    self._digest: dict[int, bytes] = {}

  def match(self, chain: Sequence[bytes]) -> list[int]:
    """The pages of the longest known prefix of the chain, each now held once more."""
    found: list[int] = []
    for digest in chain:
      page = self._page.get(digest)
      if page is None:
        break
      self.pool.share(page)
      found.append(page)
    return found

  def insert(self, digest: bytes, page: int) -> None:
    """A held page is full and has this digest. Where another page has it already, that one stays
    known."""
    if digest in self._page or page in self._digest:
      return
    self._page[digest], self._digest[page] = page, digest
    self.pool.keep(page)

  def clear(self) -> None:
    """Forgets everything: the weights are others."""
    self._page.clear()
    self._digest.clear()
    self.pool.forget()

  def _evicted(self, page: int) -> None:
    del self._page[self._digest.pop(page)]
