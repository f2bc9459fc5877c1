"""The engine's thread: it alone touches JAX, and steps while there is something to do.

The event loop hands it `Job`s and aborts through a queue, and reads what it did from `Ticket`s. A
job of the engine's that goes wrong fails alone; an engine that goes wrong fails them all, and the
server with them.
"""

import asyncio
import collections
import dataclasses
import gc
import logging
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import jax

from pt_jax.rollout.rollouts import Output, SamplingParams
from pt_jax.serve.errors import ApiError, closing, failed, invalid
from pt_jax.serve.metrics import Metrics
from pt_jax.serve.score import Scorer, Scores

log = logging.getLogger("pt_jax.serve")
COLLECT = 10.0  # seconds between collections of garbage


@dataclasses.dataclass(frozen=True)
class Job:
  """One prompt's share of a request."""

  prompt: tuple[int, ...]
  sampling: SamplingParams
  n: int = 1  # completions; 0: none, only scores
  seed: int | None = None  # None: another one each time
  index: int = 0  # of the prompt in its request, folded into the seed
  score: bool = False  # whether log-probs of the prompt are wanted


Event = Output | Scores | ApiError


class Ticket:
  """A job on its way. It belongs to the event loop, but for what is said to be the worker's."""

  def __init__(self, job: Job):
    self.job = job
    self.request: int | None = None  # the engine's number; this and the next are the worker's own
    self.ended = 0  # completions that the engine has ended
    self.aborted = False  # set once, read by both
    self.arrived = time.monotonic()
    self.first: float | None = None  # when its first token came
    self.open = job.n  # completions that have not ended
    self.scored = not job.score
    self.samples: dict[int, list] = {}  # sample -> [when its first token came, tokens]
    self._events: asyncio.Queue[Event] = asyncio.Queue()

  @property
  def done(self) -> bool:
    """Whether nothing more will come."""
    return self.aborted or (not self.open and self.scored)

  def put(self, event: Event) -> None:
    """Takes what the worker sends."""
    if isinstance(event, ApiError):
      self.open, self.scored = 0, True
    elif isinstance(event, Scores):
      self.scored = True
    elif event.stop is not None:
      self.open -= 1
    self._events.put_nowait(event)

  async def events(self) -> AsyncIterator[Output | Scores]:
    """All that comes. Raises ApiError where the job failed."""
    while not self.done or not self._events.empty():
      event = await self._events.get()
      if isinstance(event, ApiError):
        raise event
      yield event


class Engine(Protocol):
  """What the worker asks of an engine; `rollout.engine.Engine` is one."""

  figures: Any  # counters, of which the numbers are shown

  @property
  def unfinished(self) -> bool:
    """Whether `step` has something to do."""
    ...

  def submit(
    self, prompt: Sequence[int], sampling: SamplingParams, *, key: jax.Array, n: int = 1
  ) -> int:
    """Takes a request and returns its number. Raises ValueError for what it cannot answer."""
    ...

  def step(self) -> Sequence[Output]:
    """One iteration; returns what is new."""
    ...

  def abort(self, request: int) -> None:
    """Ends a request, of which nothing more comes."""
    ...


Made = tuple[Engine, Scorer | None]


class Worker:
  """Owns the thread. Its methods are called from the event loop that called `start`."""

  def __init__(
    self, name: str, make: Callable[[], Made], mesh: jax.sharding.Mesh, metrics: Metrics
  ):
    """
    Args:
      name: of the model.
      make: makes the engine, and what scores prompts, in the thread.
      mesh: the mesh they live on.
      metrics: what is counted.
    """
    self.name = name
    self._make, self._mesh, self._metrics = make, mesh, metrics
    self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
    self._tickets: set[Ticket] = set()
    self._idle = asyncio.Event()
    self._idle.set()
    self._failure: BaseException | None = None
    self._ready = threading.Event()
    self._figures: dict[str, float] = {}
    self.draining = False
    self.on_failure: Callable[[], None] = lambda: None

  async def start(self) -> None:
    """Starts the thread and waits until the engine stands. Raises what making it raised."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()
    await asyncio.to_thread(self._ready.wait)
    if self._failure is not None:
      raise self._failure

  @property
  def healthy(self) -> bool:
    """Whether jobs are taken and done."""
    return self._failure is None and self._thread.is_alive() and not self.draining

  @property
  def samples(self) -> int:
    """Completions (and prompts to score) that run or wait."""
    return sum(max(1, ticket.open) for ticket in self._tickets)

  @property
  def waiting(self) -> int:
    """Those of which nothing has come yet."""
    return sum(max(1, ticket.open) for ticket in self._tickets if ticket.first is None)

  @property
  def figures(self) -> dict[str, float]:
    """The engine's own, as of its last step."""
    return self._figures

  def submit(self, jobs: Sequence[Job]) -> list[Ticket]:
    """Hands jobs to the engine. Raises ApiError when none are taken any more."""
    if self._failure is not None:
      raise failed("the engine has stopped after an error")
    if self.draining:
      raise closing()
    tickets = [Ticket(job) for job in jobs]
    self._tickets.update(tickets)
    self._idle.clear()
    for ticket in tickets:
      self._inbox.put(ticket)
    return tickets

  def close(self, tickets: Sequence[Ticket]) -> None:
    """Ends jobs, those that are not done by an abort in the engine. Closing twice is fine."""
    for ticket in tickets:
      if not ticket.done:
        ticket.aborted = True
        self._inbox.put(ticket)
        self._metrics.aborted.inc(max(1, ticket.open))
      self._tickets.discard(ticket)
    if not self._tickets:
      self._idle.set()

  async def drain(self, seconds: float) -> None:
    """Takes no more jobs and waits, at most so long, for those that are on their way."""
    self.draining = True
    try:
      async with asyncio.timeout(seconds):
        await self._idle.wait()
    except TimeoutError:
      log.warning("%d completions were not done after %g s", self.samples, seconds)

  async def stop(self) -> None:
    """Ends the thread, and every job with it."""
    self.draining = True
    self._inbox.put(None)
    await asyncio.to_thread(self._thread.join)

  def _receive(self, events: Sequence[tuple[Ticket, Event]], figures: dict[str, float]) -> None:
    """On the event loop: hands on what came out of one step."""
    self._figures = figures
    for ticket, event in events:
      if isinstance(event, Output):
        self._metrics.tokens(ticket, event)
      ticket.put(event)

  def _fail(self, error: BaseException) -> None:
    """On the event loop: the engine is gone."""
    self._failure = error
    for ticket in self._tickets:
      ticket.put(failed("the engine stopped after an error"))
    self.on_failure()

  # What follows runs on the engine's thread.

  def _main(self) -> None:
    try:
      with jax.set_mesh(self._mesh):
        engine, scorer = self._make()
        running = _Running(engine, scorer)
        gc.freeze()  # what is there now stays, and need not be looked at again
        collected = time.monotonic()
        self._ready.set()
        while running.take(self._inbox):
          # Requests are cycles. Python looks for cycles when a quarter of all objects is new, and
          # JAX has so many that tens of MiB of requests would come together.
          if time.monotonic() - collected > COLLECT:
            gc.collect()
            collected = time.monotonic()
          events = running.step()
          self._call(self._receive, events, running.figures())
    except BaseException as error:
      log.exception("the engine stopped")
      self._failure = error
      if self._ready.is_set():
        self._call(self._fail, error)
      self._ready.set()

  def _call(self, function: Callable[..., None], *args: Any) -> None:
    try:
      self._loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed: nobody is there to hear
      log.debug("nobody heard %s", function.__name__)


class _Running:
  """The engine with the tickets that it works on, all on its own thread."""

  def __init__(self, engine: Engine, scorer: Scorer | None):
    self._engine, self._scorer = engine, scorer
    self._tickets: dict[int, Ticket] = {}  # by the engine's number
    self._to_score: collections.deque[Ticket] = collections.deque()
    self._events: list[tuple[Ticket, Event]] = []

  @property
  def busy(self) -> bool:
    return bool(self._engine.unfinished or self._to_score or self._events)

  def take(self, inbox: queue.SimpleQueue[Ticket | None]) -> bool:
    """Takes what has come, waiting for something to do. False: it is time to stop."""
    while True:
      try:
        ticket = inbox.get(block=not self.busy)
      except queue.Empty:
        return True
      if ticket is None:
        return False
      self._take(ticket)

  def _take(self, ticket: Ticket) -> None:
    if ticket.aborted:
      if ticket.request is not None and self._tickets.pop(ticket.request, None):
        self._engine.abort(ticket.request)
      return
    job = ticket.job
    if job.score:
      self._to_score.append(ticket)
    if not job.n:
      return
    seed = secrets.randbits(32) if job.seed is None else job.seed
    key = jax.random.fold_in(jax.random.key(seed), job.index)
    try:
      ticket.request = self._engine.submit(job.prompt, job.sampling, key=key, n=job.n)
    except ValueError as error:
      self._events.append((ticket, invalid(None, " ".join(str(error).split()))))
    else:
      self._tickets[ticket.request] = ticket

  def step(self) -> list[tuple[Ticket, Event]]:
    """One batch of prompts scored, if any wait, and one step of the engine."""
    events, self._events = self._events, []
    if self._to_score and self._scorer is not None:
      events += self._score(self._scorer)
    if self._engine.unfinished:
      for output in self._engine.step():
        ticket = self._tickets.get(output.request)
        if ticket is not None:
          events.append((ticket, output))
          self._close(ticket, output)
    return events

  def _close(self, ticket: Ticket, output: Output) -> None:
    """Forgets a request whose last completion has ended."""
    if output.stop is None:
      return
    ticket.ended += 1
    if ticket.ended == ticket.job.n:
      self._tickets.pop(output.request)

  def _score(self, scorer: Scorer) -> list[tuple[Ticket, Event]]:
    batch: list[Ticket] = []
    while self._to_score and len(batch) < scorer.rows:
      ticket = self._to_score.popleft()
      if not ticket.aborted:
        batch.append(ticket)
    scores = scorer([ticket.job.prompt for ticket in batch]) if batch else []
    return list(zip(batch, scores))

  def figures(self) -> dict[str, float]:
    """Numbers that the engine keeps of itself."""
    kept = vars(self._engine.figures)
    return {name: float(value) for name, value in kept.items() if isinstance(value, int | float)}
