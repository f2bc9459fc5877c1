"""What an `Objective` makes of the rewards of finished completions, on the host, before packing.

Letters: N completions, W places of their tokens, right-padded.
"""

import dataclasses

import numpy as np

from pt_jax.losses import advantages, gae
from pt_jax.losses.objective import Objective
from pt_jax.losses.options import Gae, Greedy, GroupRelative, LeaveOneOut, MonteCarlo, Returns

OF_COMPLETIONS = ("rewards", "truncated", "groups", "right", "greedy", "prompt_values")  # [N]


@dataclasses.dataclass(frozen=True)
class Episodes:
  """Finished completions. Fields that an objective does not read may be None."""

  rewards: np.ndarray  # [N], of the task
  truncated: np.ndarray  # [N] bool, cut by a limit
  groups: np.ndarray  # [N] int, which prompt a completion answers
  mask: np.ndarray  # [N, W] bool, the tokens that the policy chose
  right: np.ndarray | None = None  # [N] bool, the answer is right: `positive_nll`
  kl: np.ndarray | None = None  # [N, W] nats, for a KL in the reward
  values: np.ndarray | None = None  # [N, W], of the critic, before the token: `Gae`
  greedy: np.ndarray | None = None  # [N], reward of the prompt's greedy completion: `Greedy`
  step_ends: np.ndarray | None = None  # [N, W] bool, the last token of a step
  step_rewards: np.ndarray | None = None  # [N, W], read where a step ends: `process`
  step_values: np.ndarray | None = None  # [N, W], at its end, before the next step: `MonteCarlo`
  prompt_values: np.ndarray | None = None  # [N], before the first step: `MonteCarlo`


@dataclasses.dataclass(frozen=True)
class Credit:
  """What each completion brings to the policy batch."""

  rewards: np.ndarray  # [N] float32, with the overlong penalty and the KL, if it is in the reward
  advantages: np.ndarray  # [N, W] float32, 0 outside the mask
  returns: np.ndarray  # [N, W] float32, what a critic learns; 0 without one
  trained: np.ndarray  # [N] bool, False: the mask of the whole completion is 0
  positive: np.ndarray  # [N] bool, trained and right


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
  episodes: Episodes, *, objective: Objective, kl_coefficient: float | None = None
) -> Credit:
  """Advantages of the completions that are trained on in one update.

  Call it once, on the groups that were kept: what is normalised over the batch is so over what is
  given. A truncated completion stays in its group whether or not it is trained on.

  The reward of the outcome is that of the task and the overlong penalty, the KL in the reward is
  taken off token by token. Algorithms with a return for each token (`Gae`, `Returns`) see the
  outcome at the last token, times `process.outcome_weight`, and every step reward, times
  `process.weight`, where its step ends. The others add two advantages with these weights: that of
  the outcome, and for each token the sum of the group-normalised rewards of the steps that end
  there or later (arXiv 2402.03300, section 4.1.3).

  Args:
    episodes: the completions.
    objective: reads `advantage`, `process`, `overlong`, `filters.truncated`, `kl`.
    kl_coefficient: of a KL in the reward, where a controller moves it; None: the objective's.

  Raises:
    ValueError: for rewards, baselines or values that are not finite, shapes that differ, or a
      field that the objective needs and that is None.
  """
  rewards = np.asarray(episodes.rewards, np.float32)
  mask, trained = _check(episodes, objective), ~np.asarray(episodes.truncated, bool)
  trained |= not objective.filters.truncated
  if (o := objective.overlong) is not None:
    lengths = mask.sum(1)
    penalty = advantages.overlong_penalty(lengths, max_length=o.max_length, buffer=o.buffer)
    rewards = rewards + np.float32(o.weight) * penalty
  kl = _kl_penalty(episodes, objective, kl_coefficient)
  returns = np.zeros(mask.shape)
  if isinstance(objective.advantage, Gae | Returns):
    found, returns = _of_tokens(episodes, objective, rewards, kl, mask & trained[:, None])
  else:
    found = _of_completions(episodes, objective, rewards - kl.sum(1))
  return Credit(
    rewards=(rewards - kl.sum(1)).astype(np.float32),
    advantages=np.where(mask, found, 0).astype(np.float32),
    returns=np.where(mask, returns, 0).astype(np.float32),
    trained=trained,
    positive=trained & (False if episodes.right is None else episodes.right),
  )


def _check(episodes: Episodes, objective: Objective) -> np.ndarray:
  """The mask. Raises ValueError for what is missing or of another shape."""
  mask = np.asarray(episodes.mask, bool)
  kind, needed = objective.advantage, {"rewards", "truncated", "groups"}
  if objective.process or isinstance(kind, MonteCarlo):
    needed |= {"step_ends"}
  if objective.process:
    needed |= {"step_rewards"}
  if isinstance(kind, Gae):
    needed |= {"values"}
  if isinstance(kind, Greedy):
    needed |= {"greedy"}
  if isinstance(kind, MonteCarlo):
    needed |= {"step_values", "prompt_values"}
  if objective.kl is not None and objective.kl.where == "reward":
    needed |= {"kl"}
  if objective.positive_nll:
    needed |= {"right"}
  for field in dataclasses.fields(episodes):
    value = getattr(episodes, field.name)
    shape = mask.shape[:1] if field.name in OF_COMPLETIONS else mask.shape
    if value is None and field.name in needed:
      raise ValueError(f"episodes.{field.name}: the objective needs it, found None")
    if value is not None and np.shape(value) != shape:
      raise ValueError(f"episodes.{field.name}: expected {shape}, found {np.shape(value)}")
    if value is not None and field.name in needed:
      inside = np.asarray(value)[mask if shape == mask.shape else slice(None)]
      if not np.isfinite(inside).all():
        raise ValueError(f"episodes.{field.name}: expected finite numbers, found {inside}")
  return mask


def _kl_penalty(episodes: Episodes, objective: Objective, coefficient: float | None) -> np.ndarray:
  """[N, W] float64, what the KL takes off each token's reward."""
  option = objective.kl
  if option is None or option.where != "reward":
    return np.zeros(episodes.mask.shape)
  coefficient = option.coefficient if coefficient is None else coefficient
  assert episodes.kl is not None  # see `_check`
  return coefficient * np.where(episodes.mask, episodes.kl, 0).astype(np.float64)


def _of_tokens(
  episodes: Episodes,
  objective: Objective,
  rewards: np.ndarray,
  kl: np.ndarray,
  trained: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Advantages [N, W] from a return for each token, and the returns of a critic [N, W]."""
  option, mask, process = objective.advantage, episodes.mask, objective.process
  assert isinstance(option, Gae | Returns)
  if isinstance(option, Returns) and option.baseline:
    rewards = advantages.group_relative(rewards, episodes.groups, scale="none", epsilon=0)
  places = np.arange(mask.shape[1])
  last = places == np.max(np.where(mask, places, -1), axis=1)[:, None]
  of_token = np.where(last, rewards[:, None].astype(np.float64), 0)
  if process is not None:
    assert episodes.step_ends is not None and episodes.step_rewards is not None
    steps = np.where(episodes.step_ends & mask, episodes.step_rewards, 0)
    of_token = process.outcome_weight * of_token + process.weight * steps
  of_token -= kl
  if isinstance(option, Returns):
    found, returns = gae.discounted_returns(of_token, mask, gamma=option.gamma), np.zeros_like(kl)
  else:
    found, returns = _gae(option, of_token, episodes.values, mask)
  return (gae.whiten(found, trained) if option.whiten else found), returns


def _gae(
  option: Gae, rewards: np.ndarray, values: np.ndarray | None, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Advantages, and what the critic learns: V plus the advantages under its own lambda."""
  assert values is not None  # see `_check`
  lam = option.lam
  if option.adaptive is not None:
    lam = gae.length_adaptive_lambda(mask.sum(1), option.adaptive)
  found = gae.generalized_advantage(rewards, values, mask, gamma=option.gamma, lam=lam)
  critic_lam = option.lam if option.critic_lam is None else option.critic_lam
  learned = gae.generalized_advantage(rewards, values, mask, gamma=option.gamma, lam=critic_lam)
  return found, learned + values


def _of_completions(episodes: Episodes, objective: Objective, rewards: np.ndarray) -> np.ndarray:
  """Advantages [N, W]: one for all tokens of a completion or of a step."""
  option, groups, process = objective.advantage, episodes.groups, objective.process
  if isinstance(option, MonteCarlo):
    return _step_differences(episodes, rewards)
  if isinstance(option, GroupRelative):
    found = advantages.group_relative(rewards, groups, **dataclasses.asdict(option))
  elif isinstance(option, LeaveOneOut):
    found = advantages.leave_one_out(rewards, groups)
  else:
    assert isinstance(option, Greedy)
    found = rewards - episodes.greedy
  found = np.broadcast_to(np.asarray(found, np.float64)[:, None], episodes.mask.shape)
  if process is None:
    return found
  return process.outcome_weight * found + process.weight * _of_steps(episodes, option)


def _of_steps(episodes: Episodes, option: GroupRelative | LeaveOneOut | Greedy) -> np.ndarray:
  """Of each token: the sum of the normalised rewards of the steps that end there or later."""
  assert episodes.step_rewards is not None
  ends = np.asarray(episodes.step_ends, bool) & episodes.mask
  if not isinstance(option, GroupRelative):
    option = GroupRelative(scale="none")
  groups = np.broadcast_to(np.asarray(episodes.groups)[:, None], ends.shape)[ends]
  normalised = np.zeros(ends.shape)
  normalised[ends] = advantages.group_relative(
    episodes.step_rewards[ends],
    groups,
    scale=option.scale,
    epsilon=option.epsilon,
    ddof=option.ddof,
  )
  return np.cumsum(normalised[:, ::-1], axis=1)[:, ::-1]


def _step_differences(episodes: Episodes, rewards: np.ndarray) -> np.ndarray:
  """V(after the step) - V(before it), for every token of the step; after the last step V is R."""
  ends, mask = np.asarray(episodes.step_ends, bool), episodes.mask
  assert episodes.step_values is not None and episodes.prompt_values is not None
  after, before = np.zeros(mask.shape), np.zeros(mask.shape)
  value = np.asarray(rewards, np.float64)
  for t in reversed(range(mask.shape[1])):
    inside = mask[:, t] & ends[:, t] & mask[:, t + 1 :].any(1)
    value = np.where(inside, episodes.step_values[:, t], value)
    after[:, t] = value
  value = np.asarray(episodes.prompt_values, np.float64)
  for t in range(mask.shape[1]):
    before[:, t] = value
    value = np.where(mask[:, t] & ends[:, t], episodes.step_values[:, t], value)
  return after - before
