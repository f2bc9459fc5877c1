"""The sandbox: workers that are late or dead cost one score, and none outlives the run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pt_jax.rewards.sandbox import Sandbox


def _pids(sandbox: Sandbox) -> list[int]:
  return [worker.pid for worker in sandbox._alive]


def _gone(pid: int, seconds: float) -> bool:
  """Whether the process ends within so many seconds (a zombie has ended)."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    try:
      with open(f"/proc/{pid}/stat") as stat:
        if stat.read().rpartition(")")[2].split()[0] == "Z":
          return True
    except FileNotFoundError:
      return True
    time.sleep(0.05)
  return False


def test_late_and_dead_workers_are_replaced():
  sandbox = Sandbox("math", workers=1, timeout=1.0)
  assert _pids(sandbox) == []  # nothing starts before it is needed
  assert sandbox.score("5", "5") == 1
  (first,) = _pids(sandbox)
  assert sandbox.score("5", "6") == 0
  assert _pids(sandbox) == [first]  # a worker serves many calls

  assert sandbox.score("5", "2^{2^{40}}") == 0
  assert (sandbox.timeouts, sandbox.crashes) == (1, 0)
  assert _gone(first, 1)

  assert sandbox.score("5", "5") == 1
  (second,) = _pids(sandbox)
  assert second != first
  os.kill(second, signal.SIGKILL)
  assert _gone(second, 5)
  assert sandbox.score("5", "5") == 0
  assert (sandbox.timeouts, sandbox.crashes, sandbox.errors) == (1, 1, 0)

  assert sandbox.score("5", "5") == 1
  (third,) = _pids(sandbox)
  sandbox.close()
  assert _gone(third, 1)


def test_a_scorer_that_raises_is_counted():
  sandbox = Sandbox("family", workers=1, timeout=5.0)
  assert sandbox.score("no_such_family", {}, {}, "5") == 0
  assert (sandbox.timeouts, sandbox.crashes, sandbox.errors) == (0, 0, 1)
  entry = {"question": "?", "answer": "5", "metadata": {}}
  assert sandbox.score("gcd", {"max_value": 9}, entry, "5") == 1  # the same worker goes on
  assert len(_pids(sandbox)) == 1
  sandbox.close()


def test_workers_are_limited_in_memory_and_write_no_files():
  sandbox = Sandbox("math", workers=1, memory=3 << 30)
  assert sandbox.score("5", "5") == 1
  with open(f"/proc/{_pids(sandbox)[0]}/limits") as limits:
    rows = {line[:26].strip(): line[26:].split()[:2] for line in limits}
  assert rows["Max address space"] == [str(3 << 30)] * 2
  assert rows["Max file size"] == ["0", "0"]
  sandbox.close()


def test_a_worker_that_cannot_start_is_an_error():
  sandbox = Sandbox("math", workers=1, memory=1 << 20)
  with pytest.raises(RuntimeError, match="reward worker 'math' did not start"):
    sandbox.score("5", "5")
  assert _pids(sandbox) == []


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ({"kind": "maths"}, r"no scorer 'maths', expected one of \['family', 'math'\]"),
    ({"kind": "math", "workers": 0}, "must be positive, found 0 and 10.0"),
    ({"kind": "math", "timeout": 0}, "must be positive, found 2 and 0"),
  ],
)
def test_bad_arguments(arguments, expected):
  with pytest.raises(ValueError, match=expected):
    Sandbox(**arguments)


def test_no_worker_outlives_a_killed_run():
  """The parent is killed while its worker computes; the worker's own alarm ends it."""
  program = (
    "import threading\n"
    "from pt_jax.rewards.sandbox import Sandbox\n"
    "sandbox = Sandbox('math', workers=1, timeout=1.5)\n"
    "sandbox.score('5', '5')\n"
    "threading.Thread(target=sandbox.score, args=('5', '2^{2^{40}}'), daemon=True).start()\n"
    "print(next(iter(sandbox._alive)).pid, flush=True)\n"
    "threading.Event().wait()\n"
  )
  run = subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  pid = int(run.stdout.readline())
  time.sleep(0.5)  # into the computation
  run.kill()
  run.wait()
  assert _gone(pid, 10)
