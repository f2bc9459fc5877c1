"""The program of a sandbox worker: `python -P worker.py KIND SECONDS BYTES`. See `sandbox.py`.

Reads pickled argument tuples (8 bytes of length before each) from standard input and answers each
with one float64, NaN if the scorer raised. It imports nothing of ours, so it starts without JAX.
"""

import functools
import logging
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any


def _load_math() -> Callable[..., float]:
  import math_verify

  def equal(reference: str, answer: str) -> float:
    """1 if the two LaTeX or plain expressions mean the same (math_verify's rules)."""
    # Its own timeouts are off: the process above kills us.
    gold, found = (
      math_verify.parse(f"${text}$", parsing_timeout=0) for text in (reference, answer)
    )
    return float(math_verify.verify(gold, found, timeout_seconds=0))

  return equal


def _load_family() -> Callable[..., float]:
  import reasoning_gym

  @functools.cache
  def data_set(family: str, config: bytes) -> Any:
    return reasoning_gym.create_dataset(family, seed=0, size=1, **pickle.loads(config))

  def score(family: str, config: dict[str, Any], entry: dict[str, Any], answer: str) -> float:
    """The family's own `score_answer`."""
    return float(data_set(family, pickle.dumps(config)).score_answer(answer, entry))

  return score


SCORERS = {"math": _load_math, "family": _load_family}


def main(kind: str, seconds: float, memory: int) -> None:
  """Answers requests on standard input, one score each, until it is closed or a limit kills it.

  Args:
    kind: of scorer, a key of `SCORERS`.
    seconds: of a score at most.
    memory: bytes of address space.
  """
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  replies = os.dup(1)
  os.dup2(2, 1)  # what a library prints must not be taken for a reply
  score = SCORERS[kind]()
  logging.disable(logging.CRITICAL)
  quiet = os.open(os.devnull, os.O_WRONLY)
  os.dup2(quiet, 1)
  os.dup2(quiet, 2)
  os.write(replies, struct.pack("<d", 0.0))  # ready
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # some scorers evaluate text: write no files
  while header := sys.stdin.buffer.read(8):
    arguments = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
    # The default action of SIGALRM ends the process, in C code too: if the parent is gone and
    # cannot kill us, the kernel does.
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    try:
      value = score(*arguments)
    except Exception:  # the text is arbitrary, and so is what a parser makes of it
      value = float("nan")
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(replies, struct.pack("<d", value))


if __name__ == "__main__":
  main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
