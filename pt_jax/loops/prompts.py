"""The stream of problems that an online stage trains on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pt_jax.data.tasks import Problem, Subset, Task


class Prompts:
  """An endless stream of the problems of a task, every epoch in an order of its own."""

  def __init__(self, task: Task, seed: int | tuple[int, ...]):
    self.drawn = 0  # problems taken so far
    self._whole, self._task = task, task
    self._seed = seed if isinstance(seed, tuple) else (seed,)
    self._kept: list[int] | None = None
    self._epoch, self._order = -1, np.zeros(0, int)

  def keep(self, indices: Sequence[int]) -> None:
    """From now on draws only the problems of the task at these indices."""
    self._kept = [int(i) for i in indices]
    self._task, self._epoch = Subset(self._whole, tuple(self._kept)), -1

  def take(self, count: int) -> list[Problem]:
    """The next `count` problems."""
    problems = []
    for i in range(self.drawn, self.drawn + count):
      epoch, index = divmod(i, len(self._task))
      if epoch != self._epoch:
        order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._task))
        self._epoch, self._order = epoch, order
      problems.append(self._task[int(self._order[index])])
    self.drawn += count
    return problems

  def update(self, rates: Sequence[float]) -> dict[str, float]:
    """Takes solve rates as `difficulty.Levels` does; here they change nothing."""
    return {}

  def state(self) -> dict[str, Any]:
    """How many were drawn, and the indices of those that are."""
    return {"drawn": self.drawn, "kept": self._kept}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    self.drawn = state["drawn"]
    if state["kept"] is not None:
      self.keep(state["kept"])
