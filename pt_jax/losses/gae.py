"""Returns and advantages of single tokens, in NumPy on the host.

Letters: N completions, W places of their tokens, right-padded. `mask` is True on the tokens that
the policy chose; where it is False (the output of a tool, padding) nothing is read, and rewards,
values and advantages are carried past to the next token that it chose.
"""

import numpy as np

WHITEN_EPSILON = 1e-8  # added to the variance


def generalized_advantage(
  rewards: np.ndarray,
  values: np.ndarray,
  mask: np.ndarray,
  *,
  gamma: float,
  lam: float | np.ndarray,
) -> np.ndarray:
  """A_t = sum_k (gamma lam)^k delta_(t + k), delta_t = r_t + gamma V_(t + 1) - V_t.

  V after the last token is 0: a completion that was cut at its limit counts as finished.

  Args:
    rewards: [N, W], given after the token.
    values: [N, W], the critic's estimate before the token was chosen.
    mask: [N, W] bool.
    gamma: discount per token.
    lam: 0 trusts the critic, 1 the rewards; one number, or [N].

  Returns:
    [N, W] float64, 0 outside the mask. The returns that a critic learns are A + V.

  Source: arXiv 1506.02438, eq. 16.
  """
  rewards, values = (np.where(mask, x, 0).astype(np.float64) for x in (rewards, values))
  advantages = np.zeros_like(rewards)
  later_value, later_advantage = np.zeros(len(rewards)), np.zeros(len(rewards))
  for t in reversed(range(rewards.shape[1])):
    delta = rewards[:, t] + gamma * later_value - values[:, t]
    advantage = delta + gamma * lam * later_advantage
    later_value = np.where(mask[:, t], values[:, t], later_value)
    later_advantage = np.where(mask[:, t], advantage, later_advantage)
    advantages[:, t] = np.where(mask[:, t], advantage, 0)
  return advantages


def discounted_returns(rewards: np.ndarray, mask: np.ndarray, *, gamma: float) -> np.ndarray:
  """G_t = sum_k gamma^k r_(t + k) over the tokens that the policy chose; [N, W] float64."""
  return generalized_advantage(rewards, np.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


def length_adaptive_lambda(lengths: np.ndarray, alpha: float) -> np.ndarray:
  """1 - 1 / (alpha * length), at least 0: [N] (arXiv 2504.05118, eq. 10)."""
  return np.maximum(1 - 1 / (alpha * np.maximum(lengths, 1)), 0.0)


def whiten(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """(x - mean) / sqrt(variance + 1e-8) over the masked values, variance with ddof 1.

  All of a step's tokens are whitened together, so the result depends on no microbatch.

  Args:
    values: [N, W].
    mask: [N, W] bool.

  Returns:
    [N, W] float64, 0 outside the mask; all 0 when the masked values are equal.
  """
  inside = values[mask]
  if not inside.size:
    return np.zeros(values.shape)
  mean = inside.mean(dtype=np.float64)
  variance = ((inside - mean) ** 2).sum() / max(inside.size - 1, 1)
  return np.where(mask, (values - mean) / np.sqrt(variance + WHITEN_EPSILON), 0)
