"""Policy objectives written from the papers, in float64, one token at a time; nothing of ours.

Gradients are by hand, by the log-prob of the sampled token.
"""

import math

import numpy as np

FIELDS = ("logprobs", "old_logprobs", "reference_logprobs", "advantages", "sampler_logprobs")


def ratios(lp, old, kind) -> tuple[np.ndarray, np.ndarray]:
  """The ratio of each of n trained tokens, and its derivatives [n, n] by every log-prob."""
  n, r = len(lp), np.exp(lp - old)
  if kind == "token":
    return r, np.diag(r)
  if kind == "product":  # RLOO: the ratio of whole completions
    whole = math.exp((lp - old).sum())
    return np.full(n, whole), np.full((n, n), whole)
  s = math.exp((lp - old).mean()) if n else 1.0  # GSPO, arXiv 2507.18071, eq. 7
  if kind == "sequence":
    return np.full(n, s), np.full((n, n), s / max(n, 1))
  return np.full(n, s), s * np.eye(n)  # GSPO-token, eq. 14: the gradient of each token alone


def clip(r, lp, a, *, low, high, dual=None) -> tuple[float, float, float]:
  """PPO (arXiv 1707.06347, eq. 7), dual clip (arXiv 1912.09729, eq. 5): loss, its derivative by the
  ratio, and by the log-prob."""
  if a < 0 and dual is not None and r > dual:
    return -dual * a, 0.0, 0.0
  if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low):
    return -(1 + high if a > 0 else 1 - low) * a, 0.0, 0.0
  return -r * a, -a, 0.0


def cispo(r, lp, a, *, low, high) -> tuple[float, float, float]:
  """arXiv 2506.13585, eq. 4: the clipped ratio is a constant weight on the log-prob."""
  weight = min(max(r, low), high)
  return -weight * a * lp, 0.0, -weight * a


def sapo(r, lp, a, *, positive, negative) -> tuple[float, float, float]:
  """arXiv 2511.20347, eq. 6: f(r) A with f(r) = 4 / tau * sigmoid(tau (r - 1))."""
  tau = positive if a > 0 else negative
  gate = 1 / (1 + math.exp(-tau * (r - 1)))
  return -4 / tau * gate * a, -4 * gate * (1 - gate) * a, 0.0


SURROGATES = {"clip": clip, "cispo": cispo, "sapo": sapo}


def divergence(lp, ref, estimator) -> tuple[float, float]:
  """k1, k2, k3 of http://joschu.net/blog/kl-approx.html and their derivatives."""
  x = math.exp(ref - lp)
  return {
    "k1": (-math.log(x), 1.0),
    "k2": (math.log(x) ** 2 / 2, -math.log(x)),
    "k3": (x - 1 - math.log(x), 1 - x),
  }[estimator]


def correction(old, sampler, *, level, mode, low, high) -> np.ndarray:
  """trainer / sampler probability of each token, or of the completion, kept within bounds."""
  w = np.exp(old - sampler)
  if level == "sequence":
    w = np.full(len(w), math.exp((old - sampler).sum()))
  return np.clip(w, low, high) if mode == "truncate" else w * ((w >= low) & (w <= high))


def sample_loss(
  sample,
  *,
  ratio="token",
  surrogate=("clip", {"low": 0.2, "high": 0.2}),
  beta=0.0,
  estimator="k3",
  weighted=False,
  corrected=None,
  entropy=0.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Losses [n] of the trained tokens of one completion, and their derivatives [n, n]."""
  places = np.flatnonzero(sample["mask"])
  lp, old, ref, a, sampler = (sample[name][places].astype(np.float64) for name in FIELDS)
  rho, slopes = ratios(lp, old, ratio)
  w = np.ones(len(lp)) if corrected is None else correction(old, sampler, **corrected)
  losses, gradients = np.zeros(len(lp)), np.zeros((len(lp), len(lp)))
  name, options = surrogate
  for t in range(len(lp)):
    value, by_ratio, by_lp = SURROGATES[name](rho[t], lp[t], a[t], **options)
    losses[t] = w[t] * value
    gradients[t] = w[t] * by_ratio * slopes[t]
    gradients[t, t] += w[t] * by_lp
    if estimator == "exact":
      kl, kl_slope = float(sample["exact_kl"][places[t]]), 0.0
    else:
      kl, kl_slope = divergence(lp[t], ref[t], estimator)
    losses[t] += beta * (rho[t] * kl if weighted else kl)
    gradients[t] += beta * kl * slopes[t] if weighted else 0.0
    gradients[t, t] += beta * (rho[t] * kl_slope if weighted else kl_slope)
    losses[t] -= entropy * float(sample["entropy"][places[t]]) if entropy else 0.0
  return losses, gradients


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
    losses, slopes = sample_loss(sample, **options)
    loss += weight * losses.sum()
    gradient = np.zeros(len(sample["mask"]))
    gradient[np.flatnonzero(sample["mask"])] = weight * slopes.sum(0)
    gradients.append(gradient)
  return loss, gradients


def gae(rewards, values, gamma, lam) -> np.ndarray:
  """arXiv 1506.02438, eq. 16, as the double sum that it is."""
  n = len(rewards)
  later = np.append(values[1:], 0.0)
  delta = rewards + gamma * later - values
  return np.array(
    [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)], np.float64
  )
