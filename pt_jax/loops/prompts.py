"""The stream of problems that an online stage trains on."""

import numpy as np

from pt_jax.data.tasks import Problem, Task


class Prompts:
  """An endless stream of problems, every epoch in an order of its own; its state is one number."""

  def __init__(self, task: Task, seed: int):
    self.drawn = 0  # problems taken so far; set it to go on elsewhere
    self._task, self._seed = task, seed
    self._epoch, self._order = -1, np.zeros(0, int)

  def take(self, count: int) -> list[Problem]:
    """The next `count` problems."""
    problems = []
    for i in range(self.drawn, self.drawn + count):
      epoch, index = divmod(i, len(self._task))
      if epoch != self._epoch:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._task))
        self._epoch, self._order = epoch, order
      problems.append(self._task[int(self._order[index])])
    self.drawn += count
    return problems

  def state(self) -> dict[str, int]:
    """JSON-able."""
    return {"drawn": self.drawn}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on from a former `state()`."""
    self.drawn = state["drawn"]
