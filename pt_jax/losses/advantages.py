"""From one reward a completion to one advantage a completion.

NumPy, on the host: rewards are born there, and advantages go to the packer, which is there too. A
group is the set of completions of one prompt; groups may differ in size and stand in any order.
"""

import typing
from typing import Literal

import numpy as np

Scale = Literal["group", "batch", "none"]
SCALES: tuple[str, ...] = typing.get_args(Scale)


def group_relative(
  rewards: np.ndarray, groups: np.ndarray, *, scale: Scale, epsilon: float, ddof: int = 1
) -> np.ndarray:
  """(R - mean of the group) / (std + epsilon).

  Args:
    rewards: [B].
    groups: [B] int, which group a completion belongs to.
    scale: where the std comes from: the `group` (GRPO), all rewards given (`batch`), or `none`, the
      difference alone (Dr. GRPO, arXiv 2503.20783: dividing favours prompts that are too easy or
      too hard).
    epsilon: added to the std, in units of reward. TRL takes 1e-4, verl 1e-6.
    ddof: the std divides by n - ddof: 1 as in TRL and verl, 0 for the std of just these rewards.

  Returns:
    [B] float32; exactly 0 for a group of one and for a group of equal rewards.

  Raises:
    ValueError: for a reward that is not finite, naming its position.

  Source: arXiv 2402.03300, section 4.1.2.
  """
  rewards, centred, group_std, _ = _group_statistics(rewards, groups, ddof)
  if scale == "none":
    return centred.astype(np.float32)
  std = group_std if scale == "group" else np.std(rewards, ddof=min(ddof, len(rewards) - 1))
  return (centred / np.where(centred == 0, 1, std + epsilon)).astype(np.float32)


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """R - mean of the other rewards of the group = (R - mean of the group) n / (n - 1).

  Args:
    rewards: [B].
    groups: [B] int.

  Returns:
    [B] float32; 0 for a group of one, which has no others.

  Source: arXiv 2402.14740, eq. 9.
  """
  _, centred, _, size = _group_statistics(rewards, groups)
  return (centred * size / np.maximum(size - 1, 1)).astype(np.float32)


def informative(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """[B] bool, whether the rewards of a completion's group differ; if not, its advantages are all 0.

  DAPO's dynamic sampling (arXiv 2503.14476, eq. 11) draws other prompts in place of such groups.
  """
  return _group_statistics(rewards, groups)[2] > 0


def overlong_penalty(lengths: np.ndarray, *, max_length: int, buffer: int) -> np.ndarray:
  """DAPO's soft overlong punishment, to be added to the reward.

  0 up to `max_length - buffer` tokens, from there linear down to -1 at `max_length`, -1 beyond.

  Args:
    lengths: [B] int, completion tokens.
    max_length: tokens at which the penalty is whole.
    buffer: tokens over which it grows, 0 < buffer <= max_length.

  Returns:
    [B] float32 in [-1, 0].

  Source: arXiv 2503.14476, eq. 13.
  """
  return np.clip((max_length - buffer - lengths) / buffer, -1, 0).astype(np.float32)


def _group_statistics(
  rewards: np.ndarray, groups: np.ndarray, ddof: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Rewards, rewards less the mean of their group, its std, its size; [B] float64 each.

  Float64 sums of float32 rewards are exact, so equal rewards differ from their mean by exactly 0.
  """
  rewards = np.asarray(rewards, np.float32).astype(np.float64)
  groups = np.asarray(groups)
  if rewards.ndim != 1 or rewards.shape != groups.shape:
    raise ValueError(
      f"rewards and groups: expected equal shapes [B], found {rewards.shape} and {groups.shape}"
    )
  if not np.isfinite(rewards).all():
    row = int(np.argmin(np.isfinite(rewards)))
    raise ValueError(f"rewards[{row}]: expected a finite number, found {rewards[row]}")
  _, index, size = np.unique(groups, return_inverse=True, return_counts=True)
  centred = rewards - (np.bincount(index, rewards) / size)[index]
  variance = np.bincount(index, centred**2) / np.maximum(size - ddof, 1)
  return rewards, centred, np.sqrt(variance)[index], size[index]
