"""How far a loop is: a live bar on a terminal, one line every few seconds anywhere else.

with Progress("sft", total=200, start=saved_step) as progress:
  for step in ...:
    progress.update(step + 1, tokens=batch_tokens, loss=loss)
"""

import collections
import sys
import time
from collections.abc import Callable
from typing import TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

WINDOW = 50  # steps that the shown speed is averaged over
REDRAWS = 4.0  # of the bar per second
SECONDS_BETWEEN_LINES = 10.0  # without a terminal


class Progress:
  """Shows step/total, tokens/s, some metrics and the time left, on process 0 of a pod only."""

  def __init__(
    self,
    label: str,
    total: int,
    *,
    start: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Nothing is shown before `with`.

    Args:
      label: what is going on, e.g. the stage.
      total: steps of the whole loop, those before a resume included.
      start: steps already done.
      stream: where to, by default stderr, which leaves stdout to results.
      clock: seconds.
    """
    self._label, self._total, self._step = label, total, start
    self._stream = stream or sys.stderr
    self._clock = clock
    self._shown = jax.process_index() == 0
    self._bar: Bar | None = None
    self._history = collections.deque([(clock(), start, 0)], maxlen=WINDOW + 1)
    self._warm = False
    self._last_line = float("-inf")

  def __enter__(self) -> "Progress":
    if self._shown and self._stream.isatty():
      columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total} {task.fields[facts]}", markup=False),
      )
      console = Console(file=self._stream)
      self._bar = Bar(*columns, console=console, expand=True, refresh_per_second=REDRAWS)
      self._bar.add_task(self._label, total=self._total, completed=self._step, facts="")
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()

  @property
  def tokens_per_second(self) -> float:
    """Over the last steps; 0 before the first."""
    (then, _, before), (now, _, tokens) = self._history[0], self._history[-1]
    return (tokens - before) / (now - then) if now > then else 0.0

  @property
  def seconds_left(self) -> float | None:
    """At the speed of the last steps; None before the first."""
    (then, before, _), (now, step, _) = self._history[0], self._history[-1]
    return (self._total - step) * (now - then) / (step - before) if step > before else None

  def update(self, step: int, *, tokens: int = 0, **metrics: float) -> None:
    """Says that `step` steps are done.

    Args:
      step: how many, counted from the start of the run.
      tokens: processed since the last update.
      metrics: to show; Python numbers, so that nothing waits for a device.
    """
    self._step = step
    self._history.append((self._clock(), step, self._history[-1][2] + tokens))
    if not self._warm and len(self._history) == 3:  # the first step compiles: not typical
      self._warm = True
      self._history.popleft()
    if self._bar is not None:
      task = self._bar.task_ids[0]
      self._bar.update(task, completed=step, facts=self._facts(metrics))
    elif self._shown and self._line_is_due():
      self._last_line = self._clock()
      facts = self._facts(metrics)
      print(f"{self._label} {step}/{self._total} {facts}", file=self._stream, flush=True)

  def tell(self, line: str) -> None:
    """Says something once, in a line of its own that stays: above the bar on a terminal."""
    text = f"{self._label}: {line}"
    if self._bar is not None:
      self._bar.console.print(text, style="bold yellow", markup=False, highlight=False)
    elif self._shown:
      print(text, file=self._stream, flush=True)

  def _line_is_due(self) -> bool:
    waited = self._clock() - self._last_line >= SECONDS_BETWEEN_LINES
    return waited or self._step == self._total

  def _facts(self, metrics: dict[str, float]) -> str:
    facts = [f"{name} {value:.4g}" for name, value in metrics.items()]
    if speed := self.tokens_per_second:
      facts.append(f"{human(speed)} tokens/s")
    if (left := self.seconds_left) is not None:
      facts.append(f"{duration(left)} left" if self._step < self._total else "done")
    return " · ".join(facts)


def human(number: float) -> str:
  """Three digits and a unit: 950, 12.3k, 1.20M."""
  for unit in ("", "k", "M", "G"):
    if number < 999.5:
      return f"{number:.3g}{unit}"
    number /= 1000
  return f"{number:.3g}T"


def duration(seconds: float) -> str:
  """E.g. 8s, 2m05s, 1h02m."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  minutes, seconds = divmod(seconds, 60)
  if minutes < 60:
    return f"{minutes}m{seconds:02d}s"
  return f"{minutes // 60}h{minutes % 60:02d}m"
