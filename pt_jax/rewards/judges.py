"""Judges: functions that score the completions of several prompts, with all of them in view.

A verifier sees one completion; a judge sees its rivals too, as a reward model or a model that is
asked which of two answers is better. What it returns only has to order the completions of one
prompt, and for unpaired objectives to be over or under the stage's threshold.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pt_jax.rewards.verifiers import Completion

# (B completions, [B] int number of the prompt of each) -> [B] scores, higher is better
Judge = Callable[[Sequence[Completion], np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class WinRates:
  """A judge from pairwise verdicts: the mean over all rivals of the verdict, 0.5 without a rival.

  Every two completions of a prompt are asked about in both orders, since judges favour a place
  (arXiv 2306.05685), and the two verdicts are averaged. n completions are n (n - 1) questions.
  """

  prefers: Callable[[Completion, Completion], float]  # probability that the first is the better one

  def __call__(self, completions: Sequence[Completion], groups: np.ndarray) -> np.ndarray:
    scores = np.full(len(completions), 0.5, np.float32)
    for group in np.unique(groups):
      members = np.flatnonzero(groups == group).tolist()
      if len(members) == 1:
        continue
      asked = np.full((len(members), len(members)), 0.5)
      for (a, i), (b, j) in itertools.permutations(enumerate(members), 2):
        asked[a, b] = self._ask(completions[i], completions[j])
      wins = (asked + 1 - asked.T) / 2
      scores[members] = (wins.sum(1) - 0.5) / (len(members) - 1)
    return scores

  def _ask(self, first: Completion, second: Completion) -> float:
    verdict = float(self.prefers(first, second))
    if not 0 <= verdict <= 1:
      raise ValueError(
        f"judge: problem {first.problem.id}: expected a probability in 0..1, found {verdict}"
      )
    return verdict


def judged(judge: Judge, completions: Sequence[Completion], groups: np.ndarray) -> np.ndarray:
  """The judge's scores [B] float32.

  Raises ValueError unless there is a finite one for each completion.
  """
  scores = np.asarray(judge(completions, groups), np.float32)
  if scores.shape != (len(completions),):
    raise ValueError(f"judge: expected {len(completions)} scores, found shape {scores.shape}")
  if not np.isfinite(scores).all():
    bad = int(np.flatnonzero(~np.isfinite(scores))[0])
    raise ValueError(
      f"judge: problem {completions[bad].problem.id}: expected a finite score, found {scores[bad]}"
    )
  return scores
