"""The bar on a terminal, lines elsewhere; speed and time left from a clock that the test owns."""

import io
import re

import pytest

from pt_jax.loops.progress import Progress, duration, human


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  seconds = 0.0

  def __call__(self):
    return self.seconds


def test_lines_without_a_terminal():
  stream, clock = io.StringIO(), Clock()
  with Progress("sft", 20, stream=stream, clock=clock) as progress:
    for step in range(1, 21):
      clock.seconds += 100 if step == 1 else 2  # the first step compiles
      progress.update(step, tokens=1000, loss=1 / step)
  lines = stream.getvalue().splitlines()
  assert lines[0] == "sft 1/20 loss 1 · 10 tokens/s · 31m40s left"
  assert lines[1] == "sft 6/20 loss 0.1667 · 500 tokens/s · 28s left"  # 10 s later
  assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
  assert lines[-1] == "sft 20/20 loss 0.05 · 500 tokens/s · done"


def test_a_resumed_loop_counts_from_where_it_was():
  stream, clock = io.StringIO(), Clock()
  with Progress("grpo", 100, start=90, stream=stream, clock=clock) as progress:
    assert progress.seconds_left is None and progress.tokens_per_second == 0
    clock.seconds += 3
    progress.update(91, tokens=6)
    assert (progress.seconds_left, progress.tokens_per_second) == (27, 2)
  assert stream.getvalue() == "grpo 91/100 2 tokens/s · 27s left\n"


def test_a_bar_on_a_terminal():
  stream = Terminal()
  with Progress("sft", 4, stream=stream) as progress:
    for step in range(1, 5):
      progress.update(step, tokens=10, reward=0.25)
  shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
  assert "sft" in shown and "4/4 reward 0.25" in shown and "tokens/s · done" in shown
  assert shown.count("\n") <= 2  # redrawn in place, not a line a step


def test_what_is_told_stays_in_a_line_of_its_own():
  stream = io.StringIO()
  with Progress("rl", 9, stream=stream, clock=Clock()) as progress:
    progress.update(1, tokens=1)
    progress.tell("step 2: [bad]")  # not only when a line is due
  assert stream.getvalue().splitlines()[-1] == "rl: step 2: [bad]"
  terminal = Terminal()
  with Progress("rl", 9, stream=terminal) as progress:
    progress.update(1, tokens=1)
    progress.tell("step 2: [bad]")
    progress.update(2, tokens=1)
  shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
  assert "rl: step 2: [bad]" in shown and "2/9" in shown.split("rl: step 2")[1]


def test_other_processes_are_silent(monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  for stream in (io.StringIO(), Terminal()):
    with Progress("sft", 1, stream=stream) as progress:
      progress.update(1, tokens=1, loss=1.0)
      progress.tell("step 1")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
  "number, text",
  [(0, "0"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (1.2e6, "1.2M"), (3e13, "30T")],
)
def test_human(number, text):
  assert human(number) == text


@pytest.mark.parametrize(
  "seconds, text", [(0.4, "0s"), (59.6, "1m00s"), (125, "2m05s"), (3725, "1h02m")]
)
def test_duration(seconds, text):
  assert duration(seconds) == text
