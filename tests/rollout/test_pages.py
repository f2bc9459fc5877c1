"""Pages and the scheduler under random operations: none leaked, freed twice, read by a stranger."""

import collections

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pt_jax.rollout import prefix
from pt_jax.rollout.pages import PagePool
from pt_jax.rollout.prefix import PrefixCache
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from pt_jax.rollout.scheduler import Scheduler
from pt_jax.rollout.sequence import Request, Sample

ROWS, PAGES, SLOTS, PARTS, WINDOW = 4, 11, 3, 2, 36


def test_a_page_goes_round():
  pool = PagePool(2)
  a = pool.take()
  pool.share(a)
  pool.release(a)
  assert pool.held == 1 and pool.references(a) == 1
  pool.release(a)
  assert pool.available == 2
  assert {pool.take(), pool.take()} == {0, 1}
  with pytest.raises(ValueError, match="all 2 pages are held"):
    pool.take()


def test_what_nobody_holds_cannot_be_released_shared_or_kept():
  pool = PagePool(2)
  page = pool.take()
  pool.release(page)
  for forbidden in (pool.release, pool.share, pool.keep):
    with pytest.raises(ValueError, match=f"page {page} "):
      forbidden(page)


def test_the_page_that_was_idle_longest_is_reused_first():
  cache = PrefixCache(3)
  chain: list[bytes] = []
  prefix.extend(chain, range(12), 4)
  pages = [cache.pool.take() for _ in chain]
  for digest, page in zip(chain, pages):
    cache.insert(digest, page)
  for page in pages[::-1]:  # the end of a sequence first
    cache.pool.release(page)
  assert cache.pool.available == 3 and cache.match(chain) == pages
  for page in pages[::-1]:
    cache.pool.release(page)
  assert cache.pool.take() == pages[2]
  assert cache.match(chain) == pages[:2]


def test_a_digest_is_of_all_that_stands_before():
  def chain(tokens, salt=b""):
    found: list[bytes] = []
    prefix.extend(found, tokens, 2, salt)
    return found

  assert chain([1, 2, 3, 4])[0] == chain([1, 2, 9, 9, 5])[0]
  assert chain([1, 2, 3, 4])[1] != chain([5, 2, 3, 4])[1]
  assert chain([1, 2]) != chain([1, 2], b"adapter 1") and chain([1]) == []


class Machine(RuleBasedStateMachine):
  """The scheduler, driven as the engine does; `content` is what pages of a device would hold."""

  steps = 0  # of all machines

  def __init__(self):
    super().__init__()
    self.scheduler = Scheduler(parts=PARTS, slots=SLOTS, pages=PAGES, rows=ROWS)
    self.content = [[[None] * ROWS for _ in range(PAGES)] for _ in range(PARTS)]
    self.requests, self.number, self.epoch = [], 0, 0

  @rule(
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=WINDOW - 2),
    n=st.integers(1, 4),
    tokens=st.integers(1, 20),
  )
  def submit(self, prompt, n, tokens):
    self.number += 1
    request = Request(self.number, tuple(prompt), SamplingParams(max_tokens=tokens), None)
    request.samples = [Sample(request, j, list(prompt)) for j in range(n)]
    self.scheduler.add(request)
    self.requests.append(request)

  @rule()
  def admit(self):
    for sample in self.scheduler.admit():
      self._check(sample)

  @rule(budget=st.integers(1, 16))
  def compute(self, budget):
    for part in self.scheduler.pieces(budget):
      assert sum(piece.count for piece in part) <= budget
      for piece in part:
        self._write(piece.sample, piece.sample.tokens, piece.start, piece.count)
        self.scheduler.computed(piece.sample, piece.count)
        self._check(piece.sample)

  @rule(steps=st.integers(1, 9), seed=st.randoms(use_true_random=False))
  def launch(self, steps, seed):
    for part in range(PARTS):
      ready = [s for s in self.scheduler.running[part] if s.ready]
      ends = {s: s.border(WINDOW) for s in ready}
      granted = self.scheduler.reserve(ready, steps, ends) if ready else 0
      for sample in [s for s in ready if s.part == part]:
        if sample.copied_from is not None:  # the launch reads one page and writes another
          index = sample.computed // ROWS
          copy = list(self.content[part][sample.copied_from])
          self.content[part][sample.pages[index]] = copy
        count = min(granted, ends[sample] - len(sample.tokens))
        drawn = [seed.randint(0, 1) for _ in range(seed.randint(1, max(count, 1)))]
        start = sample.computed
        self._write(sample, sample.tokens + drawn, start, len(drawn))
        sample.take(drawn, [-1.0] * len(drawn), [()] * len(drawn), 0, WINDOW)
        self.scheduler.copied(sample)
        self.scheduler.computed(sample, len(drawn))
        self._check(sample)
        if sample.stop is not None:
          self.scheduler.finish(sample)

  @rule(data=st.data())
  def abort(self, data):
    samples = [s for r in self.requests for s in r.samples if s.stop is None]
    if samples:
      request = data.draw(st.sampled_from(samples)).request
      for sample in request.samples:
        if sample.stop is None:
          sample.stop = StopReason.ABORTED
          self.scheduler.finish(sample)

  @rule()
  def update(self):
    self.scheduler.clear()
    self.epoch += 1
    assert all(cache.pool.held == 0 for cache in self.scheduler.caches)

  def _write(self, sample, tokens, start, count):
    """Entries are (epoch of the weights, everything up to that token)."""
    for position in range(start, start + count):
      page = sample.pages[position // ROWS]
      others = self.scheduler.caches[sample.part].pool.references(page) - 1
      assert others == 0, "a page that others hold is written"
      entry = (self.epoch, tuple(tokens[: position + 1]))
      self.content[sample.part][page][position % ROWS] = entry

  def _check(self, sample):
    """What is said to be computed stands in the sample's pages."""
    for position in range(sample.computed):
      page = sample.pages[position // ROWS]
      found = self.content[sample.part][page][position % ROWS]
      assert found == (self.epoch, tuple(sample.tokens[: position + 1]))

  @invariant()
  def pages_are_held_by_those_who_name_them(self):
    for part, cache in enumerate(self.scheduler.caches):
      names = collections.Counter(p for s in self.scheduler.running[part] for p in s.pages)
      for request in self.requests:
        names.update(request.held.get(part, []))
      pool = cache.pool
      assert [pool.references(p) for p in range(PAGES)] == [names[p] for p in range(PAGES)]
      assert pool.held == len(names) and pool.held + pool.available == PAGES

  @invariant()
  def every_sample_is_somewhere(self):
    alive = [s for r in self.requests for s in r.samples if s.stop is None]
    found = [*self.scheduler.waiting, *self.scheduler.samples()]
    assert len(found) == len(alive) and set(found) == set(alive)
    assert all(len(part) <= SLOTS for part in self.scheduler.running)
    self.requests = [r for r in self.requests if any(s.stop is None for s in r.samples)]
    Machine.steps += 1

  def teardown(self):
    """What is left comes to its end, and every page comes back."""
    alive = [s for request in self.requests for s in request.samples if s.stop is None]
    for _ in range(200 + 2 * sum(s.limit(WINDOW) for s in alive)):
      if not self.scheduler.unfinished:
        break
      self.scheduler.admit()
      self.compute(16)
      for part in range(PARTS):
        ready = [s for s in self.scheduler.running[part] if s.ready]
        ends = {s: s.border(WINDOW) for s in ready}
        if ready:
          self.scheduler.reserve(ready, 4, ends)
        for sample in [s for s in ready if s.part == part]:
          if sample.copied_from is not None:
            copy = list(self.content[part][sample.copied_from])
            self.content[part][sample.pages[sample.computed // ROWS]] = copy
          self._write(sample, [*sample.tokens, 0], sample.computed, 1)
          sample.take([0], [-1.0], [()], 0, WINDOW)
          self.scheduler.copied(sample)
          self.scheduler.computed(sample, 1)
          if sample.stop is not None:
            self.scheduler.finish(sample)
    assert not self.scheduler.unfinished, "a sample starves"
    assert all(cache.pool.held == 0 for cache in self.scheduler.caches)


def operations(examples, steps):
  """How many were run."""
  before = Machine.steps
  run_state_machine_as_test(
    Machine,
    settings=settings(
      max_examples=examples,
      stateful_step_count=steps,
      deadline=None,
      derandomize=True,
      suppress_health_check=list(HealthCheck),
    ),
  )
  return Machine.steps - before


def test_a_thousand_random_operations():
  assert operations(30, 40) >= 1000


@pytest.mark.slow
def test_ten_thousand_random_operations():
  assert operations(110, 100) >= 10_000
