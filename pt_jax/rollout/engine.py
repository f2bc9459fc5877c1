"""The rollout engine: prompts to completions, on the blocks of the training model.

Keys and values live in pages. Samples join and leave between launches (continuous batching),
prompts are computed in chunks, what two of them have in common is computed once, and a sample that
finds no page is preempted and computed again later. Every sample draws from its own key, folded
with the position, so what it samples does not depend on its slot, its pages or what sat beside it.

The host sees a sample only between launches; a launch decodes up to `LAUNCH` tokens, or until so
many samples have ended that a smaller launch is cheaper, or that those that wait can begin. Stop
tokens and limits are checked on the device, stop strings and guides on the host.

Left out on purpose: adapters. A request would name one, its number would go into the digests of its
pages (`prefix.extend` takes a salt) and into `Rows`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pt_jax import sharding
from pt_jax.models.config import ModelConfig
from pt_jax.rollout import batches, cache, guides, memory, programs, speculative
from pt_jax.rollout.constraints import Constraint
from pt_jax.rollout.figures import EngineFigures
from pt_jax.rollout.proposals import Speculation
from pt_jax.rollout.rollouts import Detokenizer, Output, Rollouts, SamplingParams, StopReason
from pt_jax.rollout.scheduler import Scheduler
from pt_jax.rollout.sequence import Request, Sample
from pt_jax.weights import Params

LAUNCH = 64  # tokens per sample and launch at most
BETWEEN = 8  # tokens per sample and launch while prompts are being computed
# A launch ends when one sample in REFILL has ended and others wait. 384 completions of 33 tokens,
# 64 slots on two CPU devices: 0.56 s with 2, 0.54 s with 3, 0.53 s with 4, 0.55 s with 5.
REFILL = 4
PAGE = 32  # tokens of a page
CHUNK = 512  # tokens of a prefill in each part of the batch axes


class Grammars(Protocol):
  """Makes the matchers of constraints; `constraints.Grammars` is one."""

  def matcher(self, constraint: Constraint, stop_tokens: Sequence[int]) -> guides.Matcher: ...


class Engine:
  """Generates completions under the weights given last."""

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    slots: int,
    max_length: int,
    detokenizer: Callable[[], Detokenizer] | None = None,
    grammars: Grammars | None = None,
    version: int = 0,
    pages: int | None = None,
    page: int = PAGE,
    chunk: int = CHUNK,
    launch: int | None = None,
    paged: bool | None = None,
    speculation: Speculation | None = None,
  ):
    """Call it, and everything else, inside `jax.set_mesh`.

    Args:
      config: of the model.
      params: of `decoder.table(config)`, wherever the trainer keeps them.
      slots: completions decoded at once; a multiple of the mesh's batch axes.
      max_length: tokens that a prompt and its completion may have together.
      detokenizer: makes an object with `push(token) -> str`; needed for stop strings and text.
      grammars: needed for constraints.
      version: of the weights.
      pages: in each part of the batch axes; by default enough that no sample is ever preempted.
      page: tokens of a page; on a TPU a multiple of 32.
      chunk: tokens of a prompt that are computed before samples that run go on.
      launch: tokens per sample and launch, `LAUNCH` where absent: fewer come earlier.
      paged: whether samples are decoded on their pages, and not on a view; by default on a TPU.
      speculation: guess several tokens ahead and verify them together; by default not.

    Raises ValueError for sizes that do not fit.
    """
    parts = cache.parts()
    _check_sizes(slots, parts, max_length, page, chunk, launch, pages)
    self._shapes = shapes_of(config, slots, max_length, parts, pages=pages, page=page)
    each, pages = self._shapes.slots, self._shapes.pages
    self.config, self.slots, self.max_length = config, slots, max_length
    self.figures = EngineFigures(pages=pages * parts)
    self._chunk, self._launch = chunk, launch
    self._detokenizer, self._grammars = detokenizer, grammars
    self._scheduler = Scheduler(parts=parts, slots=each, pages=pages, rows=page)
    paged = sharding.chip() is not None if paged is None else paged
    draft = None if speculation is None else speculation.draft
    models = (config,) if draft is None else (config, draft.config)
    self._memory = (memory.Paged if paged else memory.Viewed)(models, self._shapes)
    self._plan = None if speculation is None else speculation.plan(config)
    self._weights: tuple[Params, ...] = ()
    if draft is not None:
      self._weights = ({}, programs.prepare(draft.params, config=draft.config))
    self._caching, self._most = True, max_length
    self._requests: dict[int, Request] = {}
    self._number = 0
    self.update(params, version)

  def update(self, params: Params, version: int) -> None:
    """Takes new weights: a reshard from where the trainer keeps them to where they are used.

    Requests on their way pause; their tokens, log-probs and versions stay. What is computed of them
    is forgotten with all cached prefixes and computed again under the new weights, from which alone
    the tokens behind are drawn. A draft model keeps its weights.
    """
    draft, self._weights = self._weights[1:], ()  # the old ones make room for the new
    self._weights = (programs.prepare(params, config=self.config), *draft)
    self.version = version
    self._scheduler.clear()

  @property
  def unfinished(self) -> bool:
    """Whether `step` has something to do."""
    return self._scheduler.unfinished

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    key: jax.Array,
    n: int = 1,
  ) -> Rollouts:
    """n completions of every prompt; row i * n + j is sample j of prompt i.

    Cached prefixes are forgotten first: the arithmetic of a call, and so its every bit, depends on
    nothing that came before it.

    Args:
      prompts: token ids, each at least one.
      sampling: how to draw, and when to stop.
      key: PRNG key; the same key, weights and prompts give the same completions.
      n: completions per prompt.

    Raises ValueError for no prompts, an empty prompt, one that leaves no room for a token, stop
    strings without a detokenizer, a constraint without grammars, or while requests are on their
    way.
    """
    self._check("generate", prompts, sampling, n)
    if self.unfinished:
      raise ValueError(f"generate: expected no request on its way, found {len(self._requests)}")
    self._scheduler.clear()
    self._memory.clear()
    self._caching = False
    most = max(map(len, prompts)) + sampling.max_tokens
    self._most = min(most, self.max_length)
    data = np.asarray(jax.random.key_data(key))
    asked = [self._ask(p, sampling, data, n, i * n) for i, p in enumerate(prompts)]
    while self.unfinished:
      self._step()
    self._caching, self._most = True, self.max_length
    for request in asked:
      del self._requests[request.number]
    return _rollouts([sample for request in asked for sample in request.samples])

  def submit(
    self,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    key: jax.Array,
    n: int = 1,
    text: bool = False,
  ) -> int:
    """Takes a request and returns its number.

    Args:
      prompt, sampling, key, n: as of `generate` with one prompt, whose samples these are.
      text: whether outputs have text (it has where there are stop strings in any case).

    Raises ValueError as `generate` does.
    """
    self._check("submit", [prompt], sampling, n)
    if text and self._detokenizer is None:
      raise ValueError("submit: text needs an engine with a detokenizer")
    data = np.asarray(jax.random.key_data(key))
    return self._ask(prompt, sampling, data, n, 0, text).number

  def step(self) -> list[Output]:
    """One iteration: admits what fits, computes a chunk of prompts, draws tokens. Returns what is
    new of every sample, in the order in which they run."""
    changed = self._step()
    for request in {sample.request for sample in changed}:
      if all(sample.stop is not None for sample in request.samples):
        del self._requests[request.number]
    return [sample.output(self.version) for sample in changed]

  def abort(self, request: int) -> None:
    """Ends a request, of which nothing more comes. One that has ended is no error."""
    found = self._requests.pop(request, None)
    for sample in found.samples if found else ():
      if sample.stop is None:
        sample.stop = StopReason.ABORTED
        self._scheduler.finish(sample)

  def _check(
    self, where: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int
  ) -> None:
    if not prompts or n < 1:
      raise ValueError(f"{where}: expected prompts and n >= 1, found {len(prompts)} and n = {n}")
    if sampling.stop_strings and self._detokenizer is None:
      raise ValueError(f"{where}: stop strings need an engine with a detokenizer")
    if sampling.constraint is not None:
      if self._grammars is None:
        raise ValueError(f"{where}: a constraint needs an engine with grammars")
      self._grammars.matcher(sampling.constraint, sampling.stop_tokens)  # raises for a wrong one
    for i, prompt in enumerate(prompts):
      if not 0 < len(prompt) < self.max_length:
        raise ValueError(
          f"{where}: prompt {i} has {len(prompt)} tokens, expected 1 to {self.max_length - 1} "
          "(the engine's max_length, less one to draw)"
        )

  def _ask(
    self,
    prompt: Sequence[int],
    sampling: SamplingParams,
    key: np.ndarray,
    n: int,
    first: int,
    text: bool = False,
  ) -> Request:
    self._number += 1
    request = Request(self._number, tuple(prompt), sampling, key, first)
    for j in range(n):
      sample = Sample(request, j, list(prompt), guide=self._guide(sampling, j))
      if self._detokenizer is not None and (text or sampling.stop_strings):
        sample.detokenizer = self._detokenizer()
      request.samples.append(sample)
    self._requests[request.number] = request
    self._scheduler.add(request)
    return request

  def _guide(self, sampling: SamplingParams, sample: int) -> guides.Guide | None:
    capped = None
    if sampling.thinking is not None:
      capped = guides.Capped(sampling.thinking, sample, self.config.vocab_size)
    if sampling.constraint is None or self._grammars is None:
      return capped
    matcher = self._grammars.matcher(sampling.constraint, sampling.stop_tokens)
    return guides.Constrained(matcher, capped)

  def _step(self) -> list[Sample]:
    """Returns the samples that have something new."""
    start = time.perf_counter()
    for sample in self._scheduler.admit():
      if sample.seated_at is None:
        sample.seated_at = time.perf_counter() - sample.request.submitted
    computing = self._prefill()
    changed = []
    ready = [s for s in self._scheduler.samples() if s.ready]
    running = sum(1 for _ in self._scheduler.samples())
    if ready and (not computing or 2 * len(ready) >= running):
      for bound in (False, True):
        changed += self._decode(bound, computing)
    self._measure(time.perf_counter() - start)
    return changed

  def _prefill(self) -> bool:
    """Computes a chunk of what has to be; returns whether more has to be."""
    parts = self._scheduler.pieces(self._chunk)
    if any(parts):
      self._memory.prefill(self._weights, parts)
      self.figures.prefills += 1
      for piece in (piece for part in parts for piece in part):
        self._scheduler.computed(piece.sample, piece.count)
        self.figures.prefilled += piece.count
    return any(not sample.ready for sample in self._scheduler.samples())

  def _decode(self, bound: bool, computing: bool) -> list[Sample]:
    """One launch of the samples that are drawn under a mask, or of the others."""
    most = 1 if bound else self._launch or LAUNCH
    wanted = min(most, BETWEEN) if computing else most
    chosen = lambda: [
      [s for s in part if s.ready and s.bound == bound] for part in self._scheduler.running
    ]
    failed = [s for part in chosen() for s in part if bound and not s.look()]
    for sample in failed:
      self._end(sample)
    ends = {s: s.border(self.max_length) for part in chosen() for s in part}
    steps = wanted
    for part in chosen():
      steps = min(steps, self._scheduler.reserve(part, steps, ends)) if part else steps
    parts = chosen()
    if not any(parts):
      return failed
    ready = [[s for s in part if s.ready] for part in self._scheduler.running]
    steps = self._memory.sit(ready, parts, steps, self._most)
    for sample in (s for part in parts for s in part):
      self._scheduler.copied(sample)
    places, count = self._memory.places(parts)
    rows, needs = batches.rows(self._shapes, places, count, paged=self._memory.paged)
    until, plan = self._until(parts, count), self._plan
    needs = dataclasses.replace(needs, gumbel=plan is not None and plan.draft is not None)
    self.figures.launches += 1
    if plan is None or bound:
      drawn = self._memory.launch(self._weights, rows, steps, until, needs, most)
    else:
      history = batches.history(self._shapes, places, count, most)
      drawn, tally = self._memory.speculate(
        self._weights, rows, history, steps, until, plan, needs, most
      )
      self._speculated(drawn, tally)
    return failed + self._collect(places, drawn)

  def _speculated(self, drawn: programs.Drawn, tally: speculative.Tally) -> None:
    figures = self.figures
    figures.verified += int(tally.steps.sum())
    figures.speculated += int(drawn.count.sum())
    figures.proposed += int(tally.proposed.sum())
    figures.accepted += int(tally.accepted.sum())

  def _until(self, parts: Sequence[Sequence[Sample]], rows: int) -> tuple[int, int]:
    """A launch returns when so many samples have ended, or no more than so many of a part are
    left: others wait, or fewer rows are enough."""
    samples = sum(map(len, parts))
    if self._scheduler.waiting:
      return max(1, samples // REFILL), 0
    return samples, self._memory.fewer(parts, rows)

  def _collect(self, places: Sequence[tuple[int, Sample]], drawn: programs.Drawn) -> list[Sample]:
    """Hands tokens to their samples and frees what the ones that ended had."""
    tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
    self.figures.pages_peak = max(self.figures.pages_peak, self._held())
    changed = []
    for row, sample in places:
      count, before = int(drawn.count[row]), sample.drawn
      if not count:
        continue
      self.figures.prefilled += before == 0  # the launch read the last token of the prompt
      top = _top(drawn, row, count, sample.request.sampling.top_logprobs)
      sample.take(tokens[row][:count], logprobs[row][:count], top, self.version, self.max_length)
      sample.computed += sample.drawn - before
      self.figures.generated += sample.drawn - before
      if sample.first_at is None:
        sample.first_at = time.perf_counter() - sample.request.submitted
      changed.append(sample)
    ended = [sample for sample in changed if sample.stop is not None]
    if self._caching:
      self._memory.store(ended)
    for sample in ended:
      if self._caching:
        self._scheduler.publish(sample)
      self._end(sample)
    return changed

  def _end(self, sample: Sample) -> None:
    """Frees what a sample had that has ended, and counts it."""
    self._scheduler.finish(sample)
    figures = self.figures
    figures.finished += 1
    figures.queue_seconds += sample.seated_at or 0.0
    first = sample.first_at or 0.0
    figures.first_token_seconds += first
    figures.decode_seconds += time.perf_counter() - sample.request.submitted - first
    figures.decoded += max(sample.drawn - 1, 0)

  def _held(self) -> int:
    return sum(cache.pool.held for cache in self._scheduler.caches)

  def _measure(self, seconds: float) -> None:
    figures, scheduler = self.figures, self._scheduler
    figures.seconds += seconds
    figures.preemptions, figures.prefix_hits = scheduler.preemptions, scheduler.hits
    figures.pages_held = self._held()
    figures.compilations = len(self._memory.programs)


def shapes_of(
  config: ModelConfig,
  slots: int,
  max_length: int,
  parts: int,
  *,
  pages: int | None = None,
  page: int = PAGE,
) -> batches.Shapes:
  """What the arrays of an engine look like; see `Engine` for the arguments.

  Args:
    parts: of the mesh's batch axes.
  """
  each, most = slots // parts, -(-max_length // page)
  # A sample needs one page more while the last page of a shared prompt is copied.
  pages = (each + 1) * most + 1 if pages is None else pages
  return batches.Shapes(parts, each, pages, page, max_length, config.vocab_size)


def _check_sizes(
  slots: int,
  parts: int,
  max_length: int,
  page: int,
  chunk: int,
  launch: int | None,
  pages: int | None,
) -> None:
  if slots < 1 or slots % parts:
    raise ValueError(f"engine: expected slots in multiples of {parts} (the mesh), found {slots}")
  least = {"max_length": (max_length, 2), "page": (page, 1), "chunk": (chunk, 1)}
  least |= {"launch": (1 if launch is None else launch, 1)}
  if pages is not None:
    least["pages"] = (pages, -(-max_length // page) + 1)  # one sample, and a page to copy to
  for name, (found, expected) in least.items():
    if found < expected:
      raise ValueError(f"engine: expected {name} of at least {expected}, found {found}")


def _top(
  drawn: programs.Drawn, row: int, count: int, k: int
) -> list[tuple[tuple[int, float], ...]]:
  """The k most likely tokens in the place of each that was drawn."""
  if not k:
    return [()] * count
  which, best = drawn.top_tokens[row, :count, :k], drawn.top_logprobs[row, :count, :k]
  return [tuple(zip(a, b)) for a, b in zip(which.tolist(), best.tolist())]


def _rollouts(samples: Sequence[Sample]) -> Rollouts:
  """Finished samples as right-padded arrays, in NumPy."""
  start = np.array([s.start for s in samples], np.int32)
  length = np.array([len(s.tokens) for s in samples], np.int32)
  shape = (len(samples), int(length.max()))
  tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  version, forced = np.full(shape, -1, np.int32), np.zeros(shape, bool)
  for i, sample in enumerate(samples):
    tokens[i, : length[i]] = sample.tokens
    drawn = slice(start[i], length[i])
    logprobs[i, drawn], version[i, drawn] = sample.logprobs, sample.versions
    forced[i, sample.forced] = True
  stop = np.array([s.stop for s in samples], np.int8)
  fields: Any = (tokens, start, length, logprobs, version, stop, forced)
  return Rollouts(*fields)
