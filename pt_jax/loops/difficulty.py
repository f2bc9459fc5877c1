"""How difficult the problems are that a step of reinforcement learning draws: a curriculum over
levels, and those whose pass rate leaves something to learn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pt_jax.data.tasks import Problem, Task
from pt_jax.experiment import Curriculum, Online, PassRate, Problems
from pt_jax.loops.context import Context
from pt_jax.loops.prompts import Prompts
from pt_jax.loops.rollouts import CORRECT, Judged

CHUNK = 256  # problems that are answered at once when pass rates are measured


class Levels:
  """A curriculum: a stream for every level, of which one is the current one.

  After every step the level goes up one when the mean rate of its latest `window` problems is over
  the band, down one when it is under it, `patience` steps in a row. A level that it comes to, it
  judges anew. At an end it stays.
  """

  def __init__(self, levels: Sequence[Task], options: Curriculum, seed: int):
    self._options, self._seed = options, seed
    self._streams = [Prompts(task, (seed, 1 + i)) for i, task in enumerate(levels)]
    self.level = options.first
    self._rates: list[float] = []  # latest ones of the current level
    self._out = 0  # steps in a row over (> 0) or under (< 0) the band
    self._waiting: list[int] = []  # levels of the problems that await their rates

  def take(self, count: int) -> list[Problem]:
    """The next `count` problems: of the current level, and the shares of its neighbours."""
    problems = []
    for _ in range(count):
      level = self._draw()
      problems += self._streams[level].take(1)
      self._waiting.append(level)
    return problems

  def update(self, rates: Sequence[float]) -> dict[str, float]:
    """Takes the rate of each problem taken since the last update, in that order; may move the
    level. Returns the level of those problems and its solve rate."""
    if len(rates) != len(self._waiting):
      raise ValueError(f"solve rates: expected {len(self._waiting)}, found {len(rates)}")
    of_level = [float(r) for r, at in zip(rates, self._waiting) if at == self.level]
    self._waiting = []
    self._rates = (self._rates + of_level)[-self._options.window :]
    metrics = {"difficulty/level": float(self.level)}
    if self._rates:
      metrics["difficulty/solve_rate"] = float(np.mean(self._rates))
    self._move()
    return metrics

  def state(self) -> dict[str, Any]:
    """The level, its latest rates, steps out of the band, problems drawn per level.

    JSON-able; to be asked for when no problem awaits its rate.
    """
    assert not self._waiting
    drawn = [stream.drawn for stream in self._streams]
    return {"level": self.level, "rates": list(self._rates), "out": self._out, "drawn": drawn}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    self.level, self._out = state["level"], state["out"]
    self._rates, self._waiting = list(state["rates"]), []
    for stream, drawn in zip(self._streams, state["drawn"], strict=True):
      stream.drawn = drawn

  def _draw(self) -> int:
    """The level that the next problem comes from. Where there is no neighbour the current one has
    its share."""
    options, number = self._options, sum(stream.drawn for stream in self._streams)
    share = np.random.default_rng((self._seed, 0, number)).random()
    if share < options.below:
      return max(self.level - 1, 0)
    if share < options.below + options.above:
      return min(self.level + 1, len(self._streams) - 1)
    return self.level

  def _move(self) -> None:
    options = self._options
    if len(self._rates) < options.window:
      return
    rate = np.mean(self._rates)
    side = int(rate > options.high) - int(rate < options.low)
    self._out = self._out + side if side * self._out > 0 else side
    level = min(max(self.level + side, 0), len(self._streams) - 1)
    if abs(self._out) >= options.patience and level != self.level:
      self.level, self._rates, self._out = level, [], 0


def open_stream(stage: Online, task: Problems, seed: int) -> Prompts | Levels:
  """What a stage draws from: the levels of its curriculum, or the problems to train on."""
  if stage.curriculum:
    return Levels(task.levels, stage.curriculum, seed)
  return Prompts(task.train, seed)


def solve_rates(judged: Judged) -> list[float]:
  """The mean score of the component "correct" of each problem, in the order of `groups`."""
  scores = judged.rewards.components[CORRECT]
  _, group = np.unique(judged.groups, return_inverse=True)
  return (np.bincount(group, scores) / np.bincount(group)).tolist()


def pass_rates(
  task: Task, options: PassRate, seed: int, answer: Callable[[list[Problem], int], Judged]
) -> tuple[np.ndarray, np.ndarray]:
  """Which problems are tried, and their pass rates: ([N] indices ascending, [N] in 0..1).

  Args:
    task: of the problems.
    options: how many to try.
    seed: of the choice.
    answer: (problems, number of the call) -> `options.samples` completions of each, judged.
  """
  count = min(options.problems or len(task), len(task))
  tried = np.sort(np.random.default_rng(seed).permutation(len(task))[:count])
  rates: list[float] = []
  for call, start in enumerate(range(0, count, CHUNK)):
    problems = [task[int(i)] for i in tried[start : start + CHUNK]]
    rates += solve_rates(answer(problems, call))
  return tried, np.array(rates)


def within(options: PassRate, tried: np.ndarray, rates: np.ndarray) -> np.ndarray:
  """The indices of the problems whose pass rate lies in the band.

  Raises ValueError when there are none.
  """
  kept = tried[(rates >= options.low) & (rates <= options.high)]
  if not len(kept):
    raise ValueError(
      f"pass_rate: expected problems with a pass rate in {options.low:g}..{options.high:g}, found "
      f"none of {len(tried)}: {int((rates < options.low).sum())} below, "
      f"{int((rates > options.high).sum())} above"
    )
  return kept


def sift(
  prompts: Prompts | Levels,
  task: Task,
  options: PassRate,
  context: Context,
  judge: Callable[..., Judged],
) -> int:
  """Makes `prompts` draw only the problems of `task` whose pass rate lies in the band.

  Logs how many these are, and the pass rates. Returns how many tokens were sampled for that.

  Args:
    prompts: of `task`.
    task: problems to train on.
    options: the band.
    context: of the stage, before its first step.
    judge: (problems, PRNG key, n=) -> n completions of each, by the policy that it starts from.
  """
  assert isinstance(prompts, Prompts)  # see `Online`
  key, tokens = context.key("pass rates", 0), 0

  def answer(problems: list[Problem], call: int) -> Judged:
    nonlocal tokens
    judged = judge(problems, jax.random.fold_in(key, call), n=options.samples)
    tokens += sum(completion.tokens for completion in judged.completions)
    return judged

  tried, rates = pass_rates(task, options, context.seed, answer)
  kept = within(options, tried, rates)
  prompts.keep(kept.tolist())
  figures = {"kept": len(kept), "tried": len(tried), "pass_rate": float(rates.mean())}
  context.stage.log(0, {f"difficulty/{name}": value for name, value in figures.items()})
  context.stage.histogram(0, "difficulty/pass_rate", rates)
  return tokens
