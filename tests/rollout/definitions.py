"""What may be drawn, and how often, by the definitions of softmax, top-k, min-p and top-p."""

import numpy as np
from scipy import stats


def softmax(logits, temperature=1.0):
  z = np.asarray(logits, np.float64) / temperature
  p = np.exp(z - z.max())
  return p / p.sum()


def kept(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """The tokens that may be drawn: by the words of the three papers, one token at a time."""
  p = dict(enumerate(softmax(logits, temperature)))
  if top_k:
    worst = sorted(p.values(), reverse=True)[: min(top_k, len(p))][-1]
    p = {token: x for token, x in p.items() if x >= worst}
  if min_p:
    best = max(p.values())
    p = {token: x for token, x in p.items() if x >= min_p * best}
  if top_p < 1:
    total, mass = sum(p.values()), 0.0
    for x in sorted(p.values(), reverse=True):
      mass, worst = mass + x / total, x
      if mass >= top_p:
        break
    p = {token: x for token, x in p.items() if x >= worst}
  return set(p)


def chi_square(tokens, expected):
  """p-value of `tokens` being drawn from the distribution `expected`."""
  support = np.flatnonzero(expected)
  seen = np.bincount(tokens, minlength=len(expected))
  assert seen.sum() == seen[support].sum()  # nothing outside
  return stats.chisquare(seen[support], expected[support] * len(tokens)).pvalue


def cut(logits, **options):
  """The distribution of what the cuts leave, renormalised."""
  p = softmax(logits, options.get("temperature", 1.0))
  left = np.where(np.isin(np.arange(len(p)), [*kept(logits, **options)]), p, 0)
  return left / left.sum()
