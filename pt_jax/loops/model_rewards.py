"""The rewards that a trained reward model gives to the completions of an online stage."""

import dataclasses

import numpy as np

from pt_jax.experiment import ModelReward
from pt_jax.loops.context import Context
from pt_jax.loops.rollouts import Judged
from pt_jax.models import heads
from pt_jax.rewards import model
from pt_jax.rewards.stack import Rewards

NAME = "model"  # of its component in metrics


class RewardModel:
  """A finished `Reward` stage, asked for scores."""

  def __init__(self, options: ModelReward, context: Context, rows: int, row_length: int):
    self._options = options
    self._params = context.left_by(options.stage, heads.table(context.config, options.members))
    self._how = {"mesh": context.mesh, "rows": rows, "row_length": row_length}
    self._config = context.config

  def judge(self, judged: Judged) -> Judged:
    """With its reward added to the total, and as a component. A model of steps changes nothing."""
    options = self._options
    if options.process:
      return judged
    members = model.score_completions(self._params, self._config, judged.rollouts, **self._how)
    scores = model.pessimistic_mean(members, options.pessimism)
    total = judged.rewards.total + np.float32(options.weight) * scores
    components = judged.rewards.components | {NAME: scores}
    return dataclasses.replace(judged, rewards=Rewards(total, components))

  def step_rewards(self, judged: Judged, ends: np.ndarray) -> np.ndarray:
    """[N, W] float32: the probability that a step is right where one ends, 0 elsewhere."""
    members = model.score_steps(self._params, self._config, judged.rollouts, ends, **self._how)
    scores = model.pessimistic_mean(members, self._options.pessimism)
    return np.where(ends, 1 / (1 + np.exp(-scores)), 0).astype(np.float32)
