"""Policy objectives written from the papers, in float64, one token at a time; nothing of ours.

Gradients are by hand, by the log-prob of the sampled token.
"""

import math

import numpy as np


def token(lp, old, ref, advantage, *, low, high, beta, estimator, weighted) -> tuple[float, float]:
  """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a KL term; its value and derivative."""
  r = math.exp(lp - old)
  if (advantage > 0 and r > 1 + high) or (advantage < 0 and r < 1 - low):
    bound = 1 + high if advantage > 0 else 1 - low
    loss, slope = -bound * advantage, 0.0
  else:
    loss, slope = -r * advantage, -r * advantage
  kl, kl_slope = divergence(lp, ref, estimator)
  if weighted:
    kl, kl_slope = r * kl, r * kl + r * kl_slope
  return loss + beta * kl, slope + beta * kl_slope


def divergence(lp, ref, estimator) -> tuple[float, float]:
  """k1, k2, k3 of http://joschu.net/blog/kl-approx.html and their derivatives."""
  x = math.exp(ref - lp)
  return {
    "k1": (-math.log(x), 1.0),
    "k2": (math.log(x) ** 2 / 2, -math.log(x)),
    "k3": (x - 1 - math.log(x), 1 - x),
  }[estimator]


def objective(made, reduction, constant_length=None, **options) -> tuple[float, list[np.ndarray]]:
  """Loss over samples and its gradient per sample.

  segment_mean: 1/G sum_i 1/|o_i| sum_t (arXiv 2402.03300, eq. 3); token_mean: 1/(sum |o_i|) sum_i
  sum_t (arXiv 2503.14476, eq. 8); constant: 1/G sum_i 1/L sum_t (arXiv 2503.20783, section 3.2 with
  the constant of its code). G counts samples that are masked whole.
  """
  all_tokens = sum(float(sample["mask"].sum()) for sample in made)
  loss, gradients = 0.0, []
  for sample in made:
    trained = float(sample["mask"].sum())
    weight = {
      "segment_mean": 1 / (len(made) * trained) if trained else 0.0,
      "token_mean": 1 / all_tokens,
      "constant": 1 / (len(made) * (constant_length or math.inf)),
    }[reduction]
    gradient = np.zeros(len(sample["mask"]))
    for t in np.flatnonzero(sample["mask"]):
      names = ("logprobs", "old_logprobs", "reference_logprobs", "advantages")
      value, slope = token(*(float(sample[name][t]) for name in names), **options)
      loss += weight * value
      gradient[t] = weight * slope
    gradients.append(gradient)
  return loss, gradients
