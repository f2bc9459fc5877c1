"""Scoring in worker processes that can be killed.

Computer algebra on model output may run for ever or eat all memory ("9**9**9"), and the timeouts
of such libraries are signals, which do nothing off the main thread. A worker here is a fresh
interpreter (never a fork: JAX is threaded) with a memory limit; one that is late is killed.
"""

import os
import pickle
import queue
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, BinaryIO, cast

from pt_jax.rewards import worker as worker_program
from pt_jax.rewards.worker import SCORERS

_START_SECONDS = 120  # for the imports of a worker: 1 to 5 s, more on a busy machine


class _Died(Exception):
  """The worker ended before it answered."""


class Sandbox:
  """A pool of workers for one kind of scoring (the keys of `worker.SCORERS`). Thread-safe.

  Workers start when first needed. What goes wrong scores 0 and is counted: `timeouts`, `crashes`
  (the worker died, for instance over the memory limit) and `errors` (the scorer raised).

  Args:
    kind: which scorer the workers hold.
    workers: processes; calls beyond that wait.
    timeout: seconds for one call, start-up not counted. What takes nearly as long depends on load.
    memory: bytes of address space of one worker.
  """

  def __init__(self, kind: str, *, workers: int = 2, timeout: float = 10.0, memory: int = 4 << 30):
    if kind not in SCORERS:
      raise ValueError(f"Sandbox: no scorer {kind!r}, expected one of {sorted(SCORERS)}")
    if workers < 1 or timeout <= 0:
      raise ValueError(
        f"Sandbox: workers and timeout must be positive, found {workers} and {timeout}"
      )
    self.kind, self.timeout, self._memory = kind, timeout, memory
    self.timeouts = self.crashes = self.errors = 0
    self._count = threading.Lock()
    self._alive: set[subprocess.Popen] = set()
    self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
    for _ in range(workers):
      self._idle.put(None)  # a place for a worker that has not been started
    # Also runs at interpreter exit, so that no worker outlives the run.
    self._finalizer = weakref.finalize(self, _kill_all, self._alive)

  def score(self, *arguments: Any) -> float:
    """The scorer's value for `arguments` (picklable), 0 if there was none in time.

    Raises:
      RuntimeError: a worker could not start, for example because its library is missing.
    """
    worker = self._idle.get()
    try:
      if worker is None:
        worker = self._start()
      value = _ask(worker, arguments, self.timeout)
    except TimeoutError:
      value, worker = self._lose(worker, "timeouts"), None
    except _Died:
      value, worker = self._lose(worker, "crashes"), None
    finally:
      self._idle.put(worker)
    return self._tally("errors") if value != value else value

  def close(self) -> None:
    """Ends all workers. A later `score` starts new ones."""
    _kill_all(self._alive)

  def _start(self) -> subprocess.Popen:
    # -P keeps this directory off the worker's path, where our file names could hide a library's.
    command = [
      sys.executable,
      "-P",
      worker_program.__file__,
      self.kind,
      str(self.timeout),
      str(self._memory),
    ]
    # One BLAS thread: NumPy would reserve address space for each core.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    worker = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    )
    self._alive.add(worker)
    try:
      _read_value(worker, _START_SECONDS)
    except (_Died, TimeoutError) as error:
      self._lose(worker, "crashes")
      raise RuntimeError(
        f"reward worker {self.kind!r} did not start (exit status {worker.returncode})"
      ) from error
    return worker

  def _lose(self, worker: subprocess.Popen | None, reason: str) -> float:
    if worker is not None:
      _kill(worker)
      self._alive.discard(worker)
    return self._tally(reason)

  def _tally(self, reason: str) -> float:
    with self._count:
      setattr(self, reason, getattr(self, reason) + 1)
    return 0.0


def _ask(worker: subprocess.Popen, arguments: tuple, seconds: float) -> float:
  payload = pickle.dumps(arguments)
  try:
    cast(BinaryIO, worker.stdin).write(struct.pack("<Q", len(payload)) + payload)
  except BrokenPipeError:
    raise _Died from None
  return _read_value(worker, seconds)


def _read_value(worker: subprocess.Popen, seconds: float) -> float:
  """One float64 from the worker; TimeoutError or `_Died` if none comes."""
  stdout, received, end = cast(BinaryIO, worker.stdout), b"", time.monotonic() + seconds
  while len(received) < 8:
    if not select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
      raise TimeoutError
    chunk = stdout.read(8 - len(received))
    if not chunk:
      raise _Died
    received += chunk
  return struct.unpack("<d", received)[0]


def _kill(worker: subprocess.Popen) -> None:
  worker.kill()
  worker.wait()
  for pipe in (worker.stdin, worker.stdout):
    if pipe is not None:
      pipe.close()


def _kill_all(workers: set[subprocess.Popen]) -> None:
  while workers:
    _kill(workers.pop())
