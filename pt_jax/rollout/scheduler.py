"""Which samples run, what is computed next, and in which pages: the host's side of the engine.

First come, first served. A sample is admitted when a slot and pages for what it has to compute are
free; it gets more as it grows. When there are none left, the youngest one is preempted: its pages
go back, its tokens and log-probs stay, and it waits at the front of the queue to be computed again.

Samples of a request share the pages of their prompt. The last of these is rarely full; who writes
to a page that others hold gets a copy of it (copy on write).

On a mesh every part of the batch axes has pages of its own, and a sample lives in one part.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from pt_jax.rollout import prefix
from pt_jax.rollout.prefix import PrefixCache
from pt_jax.rollout.sequence import Request, Sample


@dataclasses.dataclass
class Piece:
  """A run of a sample's tokens that is computed next."""

  sample: Sample
  start: int
  count: int


class Scheduler:
  """Samples that wait and samples that run."""

  def __init__(self, *, parts: int, slots: int, pages: int, rows: int):
    """
    Args:
      parts: of the mesh's batch axes.
      slots: samples that run at once in each part.
      pages: of each part.
      rows: tokens of a page.
    """
    self.caches = [PrefixCache(pages) for _ in range(parts)]
    self.slots, self.rows = slots, rows
    self.waiting: collections.deque[Sample] = collections.deque()
    self.running: list[list[Sample]] = [[] for _ in range(parts)]
    self.preemptions = self.hits = 0  # samples preempted; prompt tokens found in pages
    self._pending: list[set[bytes]] = [set() for _ in range(parts)]  # pages about to be computed

  @property
  def unfinished(self) -> bool:
    """Whether a sample waits or runs."""
    return bool(self.waiting) or any(self.running)

  def samples(self) -> Iterator[Sample]:
    """All that run, the parts one after the other."""
    for part in self.running:
      yield from part

  def add(self, request: Request) -> None:
    """All samples of a request wait."""
    self.waiting.extend(request.samples)

  def admit(self) -> list[Sample]:
    """Moves samples from the queue to free slots, as long as there are pages. Returns them.

    One whose prompt is being computed for another one is passed over, and shares it later.
    """
    admitted: list[Sample] = []
    passed: list[Sample] = []
    full = False
    while self.waiting and not full and any(len(part) < self.slots for part in self.running):
      sample = self.waiting.popleft()
      placed, blocked = self._place(sample)
      (admitted if placed else passed).append(sample)
      full = blocked
    self.waiting.extendleft(reversed(passed))
    return admitted

  def _place(self, sample: Sample) -> tuple[bool, bool]:
    """(whether the sample has been seated, whether the ones behind it have to wait for pages)."""
    request = sample.request
    open_parts = [i for i, part in enumerate(self.running) if len(part) < self.slots]
    shared = lambda i: i in request.held or i in request.leader
    order = sorted(open_parts, key=lambda i: (not shared(i), -self.caches[i].pool.available))
    awaited = False
    for part in order:
      if not sample.drawn and part in request.held:
        seated = self._fork(sample, part)
      elif not sample.drawn and request.leader.get(part, sample) is not sample:
        seated, awaited = False, True
      else:
        seated = self._seat(sample, part)
        awaited |= seated is None
      if seated:
        sample.part = part
        self.running[part].append(sample)
        self._release_held(request)
        return True, False
      if awaited:
        return False, False
    return False, not awaited

  def _fork(self, sample: Sample, part: int) -> bool:
    """Gives the sample the pages of its prompt, if one to write to is left."""
    pool = self.caches[part].pool
    if pool.available < 1:
      return False
    sample.pages = list(sample.request.held[part])
    for page in sample.pages:
      pool.share(page)
    sample.computed = sample.target
    self.hits += sample.computed
    return True

  def _seat(self, sample: Sample, part: int) -> bool | None:
    """Gives the sample what is cached of it, and pages for the rest and for one token more. None
    when a page that it needs is being computed for another one."""
    cache, pending = self.caches[part], self._pending[part]
    prefix.extend(sample.chain, sample.tokens, self.rows)
    chain = sample.chain[: sample.target // self.rows]
    found = cache.match(chain)
    wait = len(found) < len(chain) and chain[len(found)] in pending
    need = sample.target // self.rows + 1 - len(found)
    spare = len(self.running[part])  # each of those may soon want a page
    fits = need + spare <= cache.pool.available or (
      not self.running[part] and need <= cache.pool.available
    )
    if wait or not fits:
      for page in reversed(found):
        cache.pool.release(page)
      return None if wait else False
    sample.pages = found + [cache.pool.take() for _ in range(need)]
    sample.computed = len(found) * self.rows
    self.hits += sample.computed
    sample.part = part
    pending.update(chain[len(found) :])
    if len(sample.request.samples) > 1 and not sample.drawn:
      sample.request.leader[part] = sample
      self._lead(sample)
    return True

  def pieces(self, budget: int) -> list[list[Piece]]:
    """What is computed next, at most `budget` tokens in each part, the oldest samples first."""
    out: list[list[Piece]] = []
    for part in self.running:
      left, own = budget, []
      for sample in part:
        count = min(sample.target - sample.computed, left)
        if count > 0:
          own.append(Piece(sample, sample.computed, count))
          left -= count
      out.append(own)
    return out

  def computed(self, sample: Sample, count: int) -> None:
    """The next `count` tokens of the sample have been computed, into its pages."""
    sample.computed += count
    self.publish(sample, sample.computed - count)
    self._lead(sample)

  def publish(self, sample: Sample, start: int = 0) -> None:
    """Lets others find the full pages of what was computed of the sample from `start` on."""
    prefix.extend(sample.chain, sample.tokens, self.rows)
    cache, pending = self.caches[sample.part], self._pending[sample.part]
    for i in range(start // self.rows, sample.computed // self.rows):
      cache.insert(sample.chain[i], sample.pages[i])
      pending.discard(sample.chain[i])

  def _lead(self, sample: Sample) -> None:
    """Holds the prompt's pages for the samples that have not begun, once they are computed."""
    request, part = sample.request, sample.part
    if request.leader.get(part) is not sample or sample.computed < sample.start - 1:
      return
    del request.leader[part]
    pages = sample.pages[: -(-(sample.start - 1) // self.rows)]
    for page in pages:
      self.caches[part].pool.share(page)
    request.held[part] = pages
    self._release_held(request)

  def _release_held(self, request: Request) -> None:
    """Lets go of the prompt's pages when no sample is left to begin."""
    waits = lambda s: s.part < 0 and s.stop is None and not s.drawn
    if not any(map(waits, request.samples)):
      self._drop(request)

  def _drop(self, request: Request, part: int | None = None) -> int:
    """Releases what is held for a request (in one part); returns how many pages that were."""
    parts = list(request.held) if part is None else [part]
    pages = [(i, page) for i in parts for page in reversed(request.held.pop(i, []))]
    for i, page in pages:
      self.caches[i].pool.release(page)
    return len(pages)

  def reserve(self, samples: Sequence[Sample], steps: int, ends: dict[Sample, int]) -> int:
    """Gives each of these samples of one part pages for its next tokens.

    Args:
      samples: of one part; one that has to be preempted is no longer in `running` afterwards.
      steps: tokens that are wanted.
      ends: tokens that a sample may have in the end.

    Returns how many tokens there are pages for, 1 to `steps`.
    """
    part = samples[0].part
    pool = self.caches[part].pool
    alive = lambda: [s for s in samples if s.part == part]

    def need(steps: int) -> int:
      return sum(self._missing(s, min(s.computed + steps, ends[s])) for s in alive())

    while steps > 1 and need(steps) > pool.available:
      steps //= 2
    while need(steps) > pool.available:
      self._make_room(part)
    for sample in alive():
      self._grow(sample, min(sample.computed + steps, ends[sample]))
    return steps

  def _missing(self, sample: Sample, tokens: int) -> int:
    """Pages that the sample lacks to have its next tokens up to `tokens` written."""
    missing = -(-tokens // self.rows) - len(sample.pages)
    return max(missing, 0) + self._shares_next(sample)

  def _shares_next(self, sample: Sample) -> bool:
    """Whether the page that the sample writes to next is held by others, too."""
    index = sample.computed // self.rows
    pool = self.caches[sample.part].pool
    return index < len(sample.pages) and pool.references(sample.pages[index]) > 1

  def _grow(self, sample: Sample, tokens: int) -> None:
    pool = self.caches[sample.part].pool
    if self._shares_next(sample):
      index = sample.computed // self.rows
      sample.copied_from, sample.pages[index] = sample.pages[index], pool.take()
    while len(sample.pages) * self.rows < tokens:
      sample.pages.append(pool.take())

  def copied(self, sample: Sample) -> None:
    """The copy of a shared page has been written."""
    if sample.copied_from is not None:
      self.caches[sample.part].pool.release(sample.copied_from)
      sample.copied_from = None

  def _make_room(self, part: int) -> None:
    """Frees pages that are held for samples that wait, or else those of the youngest sample."""
    for sample in self.waiting:
      if self._drop(sample.request, part):
        return
    self.preempt(self.running[part][-1])

  def preempt(self, sample: Sample) -> None:
    """Back to the front of the queue, with its tokens and without its pages."""
    self._leave(sample)
    self.waiting.appendleft(sample)
    self.preemptions += 1

  def finish(self, sample: Sample) -> None:
    """A sample has ended, or is not wanted any more."""
    if sample.part < 0:
      self.waiting.remove(sample)
    else:
      self._leave(sample)
    self._release_held(sample.request)

  def _leave(self, sample: Sample) -> None:
    part = sample.part
    self.running[part].remove(sample)
    self.copied(sample)
    self._pending[part].difference_update(sample.chain)
    for page in reversed(sample.pages):  # the end of a sequence is the first to be reused
      self.caches[part].pool.release(page)
    sample.pages, sample.computed, sample.part, sample.row = [], 0, -1, -1
    if sample.request.leader.get(part) is sample:
      del sample.request.leader[part]

  def clear(self) -> None:
    """The weights are others: what runs is computed again, and no page is known any more."""
    for part, cache in enumerate(self.caches):
      for sample in self.running[part][::-1]:
        self.preempt(sample)
      for sample in self.waiting:
        self._drop(sample.request, part)
      cache.clear()
