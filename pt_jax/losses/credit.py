"""What an `Objective` makes of the rewards of finished completions, on the host, before packing."""

import dataclasses

import numpy as np

from pt_jax.losses import advantages
from pt_jax.losses.objective import Objective


@dataclasses.dataclass(frozen=True)
class Credit:
  """What each completion brings to the policy batch."""

  rewards: np.ndarray  # [B] float32, with the overlong penalty
  advantages: np.ndarray  # [B] float32
  trained: np.ndarray  # [B] bool, False: the mask of the whole completion is 0


def kept_groups(rewards: np.ndarray, groups: np.ndarray, *, objective: Objective) -> np.ndarray:
  """[B] bool: False where the objective asks for another group in place of the completion's own.

  Args:
    rewards: [B] of the task, before any penalty: DAPO (eq. 11) asks whether the answers differ, and
      a group of right answers stays useless when their lengths differ.
    groups: [B] int.
    objective: reads `filters.zero_variance`.
  """
  useful = advantages.informative(rewards, groups)
  return useful | (not objective.filters.zero_variance)


def assign_credit(
  rewards: np.ndarray,
  lengths: np.ndarray,
  truncated: np.ndarray,
  groups: np.ndarray,
  *,
  objective: Objective,
) -> Credit:
  """Advantages of the completions that are trained on in one update.

  Call it once, on the groups that were kept: the std of `scale="batch"` is that of what is given. A
  truncated completion stays in the mean of its group whether or not it is trained on.

  Args:
    rewards: [B] of the task.
    lengths: [B] int, completion tokens.
    truncated: [B] bool, the completion was cut by a limit.
    groups: [B] int, which prompt a completion answers.
    objective: reads `advantage`, `overlong`, `filters.truncated`.

  Raises:
    ValueError: for rewards that are not finite or shapes that differ.
  """
  rewards = np.asarray(rewards, np.float32)
  if not rewards.shape == np.shape(lengths) == np.shape(truncated):
    raise ValueError(
      f"rewards, lengths, truncated: expected equal shapes [B], found {rewards.shape}, "
      f"{np.shape(lengths)}, {np.shape(truncated)}"
    )
  if (o := objective.overlong) is not None:
    penalty = advantages.overlong_penalty(lengths, max_length=o.max_length, buffer=o.buffer)
    rewards = rewards + np.float32(o.weight) * penalty
  option = objective.advantage
  return Credit(
    rewards=rewards,
    advantages=advantages.group_relative(
      rewards, groups, scale=option.scale, epsilon=option.epsilon
    ),
    trained=~(np.asarray(truncated, bool) & objective.filters.truncated),
  )
