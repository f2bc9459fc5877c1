"""Preference losses written from the papers, in float64, one pair at a time; nothing of ours.

`c` and `j` are scores of the chosen and the rejected completion, b is beta. Each function returns
the loss and its derivatives by c and by j, worked by hand.
"""

import math


def sigma(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
  return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def dpo(c, j, b, smoothing=0.0, gamma=0.0):
  """Smoothed cross-entropy of sigma(b (c - j) - gamma): DPO, cDPO, SimPO, CPO."""
  h = b * (c - j) - gamma
  slope = -(1 - smoothing) * sigma(-h) + smoothing * sigma(h)
  return -(1 - smoothing) * log_sigma(h) - smoothing * log_sigma(-h), b * slope, -b * slope


def rdpo(c, j, b, smoothing):
  """arXiv 2403.00409 eq. 12."""
  h = b * (c - j)
  loss = -(1 - smoothing) * log_sigma(h) + smoothing * log_sigma(-h)
  slope = (-(1 - smoothing) * sigma(-h) - smoothing * sigma(h)) / (1 - 2 * smoothing)
  return loss / (1 - 2 * smoothing), b * slope, -b * slope


def hinge(c, j, b):
  h = b * (c - j)
  return max(0.0, 1 - h), -b * (h < 1), b * (h < 1)


def ipo(c, j, b):
  """arXiv 2310.12036 eq. 17, tau = b."""
  error = c - j - 1 / (2 * b)
  return error**2, 2 * error, -2 * error


def exo(c, j, b, smoothing):
  """KL(q || p), q = (sigma(h), sigma(-h)), p = (1 - s, s): arXiv 2402.00856 eq. 16."""
  h = b * (c - j)
  right, wrong = log_sigma(h) - math.log1p(-smoothing), log_sigma(-h) - math.log(smoothing)
  slope = sigma(h) * sigma(-h) * (right - wrong)  # what is left of each q log q cancels
  return sigma(h) * right + sigma(-h) * wrong, b * slope, -b * slope


def discopop(c, j, b, tau):
  """arXiv 2406.08414 eq. 5."""
  h = b * (c - j)
  share = sigma(h / tau)
  moved = share * (1 - share) / tau
  slope = moved * (math.exp(-h) + log_sigma(h)) - share * math.exp(-h) - (1 - share) * sigma(-h)
  return -(1 - share) * log_sigma(h) + share * math.exp(-h), b * slope, -b * slope


def nca(c, j, b):
  """arXiv 2402.05369, K = 2, reward 1 for the chosen."""
  loss = -log_sigma(b * c) - log_sigma(-b * c) / 2 - log_sigma(-b * j) / 2
  return loss, b * (-sigma(-b * c) + sigma(b * c) / 2), b * sigma(b * j) / 2


def bco(c, j, b, shift=0.0):
  """arXiv 2404.04656 eq. 9, both completions of a pair."""
  loss = -log_sigma(b * c - shift) - log_sigma(-(b * j - shift))
  return loss, -b * sigma(shift - b * c), b * sigma(b * j - shift)


def sppo(c, j, b):
  """arXiv 2405.00675 eq. 4.7, eta = 1 / b, a win of probability 1."""
  return (
    (c - 1 / (2 * b)) ** 2 + (j + 1 / (2 * b)) ** 2,
    2 * (c - 1 / (2 * b)),
    2 * (j + 1 / (2 * b)),
  )


def apo_zero(c, j, b):
  """arXiv 2408.06266 eq. 7; sigma(-x) for 1 - sigma(x)."""
  loss = sigma(-b * c) + sigma(b * j)
  return loss, -b * sigma(b * c) * sigma(-b * c), b * sigma(b * j) * sigma(-b * j)


def apo_down(c, j, b):
  """arXiv 2408.06266 eq. 8."""
  d = b * (c - j)
  pull = b * sigma(d) * sigma(-d)
  return sigma(b * c) + sigma(-d), b * sigma(b * c) * sigma(-b * c) - pull, pull


def odds_ratio(c, j, b):
  """-b log sigma(log [odds(c) / odds(j)]), odds(x) = p / (1 - p), p = e^x: arXiv 2403.07691.

  d log odds / dx = 1 / (1 - p).
  """
  log_odds = lambda x: x - math.log(-math.expm1(x))
  h = log_odds(c) - log_odds(j)
  return -b * log_sigma(h), b * sigma(-h) / math.expm1(c), -b * sigma(-h) / math.expm1(j)


def beta_dpo(c, j, b, alpha, mean_margin, minimum):
  """DPO with beta_i = [1 + alpha (M_i - M_0)] b, a constant to the gradient: arXiv 2407.08639."""
  return dpo(c, j, max(minimum, (1 + alpha * (b * (c - j) - mean_margin)) * b))


def epsilon_dpo(c, j, b, limit):
  """DPO until the margin reaches the limit, a constant from there."""
  if b * (c - j) >= limit:
    return -log_sigma(limit), 0.0, 0.0
  return dpo(c, j, b)


def kto(c, right, b, baseline, weight):
  """v(x) of arXiv 2402.01306 eq. 8 as a loss, weight sigma(-+(b c - b z)), and its slope."""
  h = b * (c - max(0.0, baseline)) * (1 if right else -1)
  slope = -weight * b * sigma(h) * sigma(-h)
  return weight * sigma(-h), slope if right else -slope


def bco_single(c, right, b, shift, weight):
  """One half of `bco`."""
  sign = 1 if right else -1
  h = sign * (b * c - shift)
  return -weight * log_sigma(h), -weight * b * sign * sigma(-h)
