"""Reward stacks: named, weighted components, added up and all kept for the log."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from pt_jax.rewards.verifiers import Completion


@dataclasses.dataclass(frozen=True)
class Component:
  """One part of a reward."""

  name: str  # in metrics, unique in its stack
  weight: float  # multiplies the score in the total
  verify: Callable[[Completion], float]  # must be thread-safe; verifiers give [0, 1]


@dataclasses.dataclass(frozen=True)
class Rewards:
  """Scores of B completions, in their order."""

  total: np.ndarray  # [B] float32, sum over components of weight * score
  components: dict[str, np.ndarray]  # name -> [B] float32, scores before weighting


class RewardStack:
  """`total = sum_c weight_c * score_c`, for a batch of completions.

  Args:
    components: at least one, with distinct non-empty names and finite weights.
    threads: completions scored at once, so that those that wait for worker processes overlap.

  Raises:
    ValueError: on construction, a component that breaks these rules; when called, a score that is
      not finite or a verifier that raised, with the names of the component and the problem.
  """

  def __init__(self, components: Sequence[Component], *, threads: int = 4):
    if not components:
      raise ValueError("RewardStack: no components, expected at least one")
    names = [component.name for component in components]
    for component in components:
      if not component.name:
        raise ValueError(f"RewardStack: a component has no name (weight {component.weight})")
      if names.count(component.name) > 1:
        raise ValueError(f"RewardStack: two components are named {component.name!r}")
      if not math.isfinite(component.weight):
        raise ValueError(
          f"RewardStack: weight of {component.name!r} is {component.weight}, expected finite"
        )
    if threads < 1:
      raise ValueError(f"RewardStack: threads must be at least 1, found {threads}")
    self.components, self._threads = tuple(components), threads

  def __call__(self, completions: Sequence[Completion]) -> Rewards:
    with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
      scores = {
        component.name: np.fromiter(
          pool.map(lambda completion, c=component: _score(c, completion), completions), np.float32
        )
        for component in self.components
      }
    total = np.zeros(len(completions), np.float32)
    for component in self.components:
      total += np.float32(component.weight) * scores[component.name]
    return Rewards(total, scores)


def _score(component: Component, completion: Completion) -> float:
  where = f"reward component {component.name!r}, problem {completion.problem.id!r}"
  try:
    score = float(component.verify(completion))
  except Exception as error:
    raise ValueError(f"{where}: {error}") from error
  if not math.isfinite(score):
    raise ValueError(f"{where}: score is {score}, expected a finite number")
  return score
