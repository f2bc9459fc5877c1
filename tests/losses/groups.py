"""Groups of completions of unequal length, the ways to lay them out, and their losses in float64.

The truth is written from the papers, one group at a time, with gradients by hand.
"""

import functools
import math

import jax
import numpy as np

from pt_jax.losses import bootstrap, reduce, reward

MEMBERS = 3
FIELDS = ("mask", "labels", "weights", "margins")
# A pair, a list of four, a lone completion, a pair of equal rewards, a list of three, a pair.
LENGTHS = ((3, 5), (2, 4, 1, 3), (4,), (2, 2), (1, 3, 2), (6, 2))
APART = ((0,), (1,), (2,), (3,), (4,), (5,), (), ())
PACKED = ((5, 2), (1, 3), (4, 0), ())


def groups(seed: int = 0, scale: float = 1.5) -> list[dict]:
  """Values of every member at every token; labels are soft, the first completion's is the best."""
  rng = np.random.default_rng(seed)
  made = []
  for number, lengths in enumerate(LENGTHS):
    completions = []
    for place, length in enumerate(lengths):
      values = rng.normal(scale=scale, size=(length, MEMBERS))
      if number == 3:
        values[-1] = 0.7  # ties
      completions.append(
        {
          "tokens": rng.integers(0, 50, length).astype(np.int32),
          "values": values.astype(np.float32),
          "labels": np.full(length, (0.95, 0.2, 0.1, 0.4)[place], np.float32),
          "mask": (rng.random(length) < 0.6).astype(np.float32),
        }
      )
      for name in ("labels", "mask"):
        completions[-1][name][0] = completions[-1][name][-1]
    weight, margin = (1.0, 0.5, 2.0, 1.0, 0.25, 1.5)[number], 0.1 * number
    made.append({"completions": completions, "weight": weight, "margin": margin})
  return made


def lay_out(made: list[dict], rows, width: int, junk: float = 0.0) -> dict[str, np.ndarray]:
  """Field -> [B, width]; `junk` stands in the values of padding."""
  batch = {k: np.zeros((len(rows), width), np.float32) for k in FIELDS}
  batch |= {k: np.full((len(rows), width), -1, np.int32) for k in ("segment_ids", "group_ids")}
  batch |= {k: np.zeros((len(rows), width), np.int32) for k in ("tokens", "positions")}
  batch["values"] = np.full((len(rows), width, MEMBERS), junk, np.float32)
  for row, place, segment, number, group, completion in _places(made, rows):
    for name in ("tokens", "values", "labels", "mask"):
      batch[name][row, place] = completion[name]
    batch["positions"][row, place] = np.arange(place.stop - place.start)
    batch["segment_ids"][row, place], batch["group_ids"][row, place] = segment, number
    batch["weights"][row, place], batch["margins"][row, place] = group["weight"], group["margin"]
  return batch


def take_back(values: np.ndarray, made: list[dict], rows) -> list[list[np.ndarray]]:
  """[B, S, ...] -> per group, per completion; fails when anything but 0 is left on padding."""
  taken: dict[int, list[np.ndarray]] = {}
  rest = np.array(values)
  for row, place, _, _, group, _ in _places(made, rows):
    taken.setdefault(id(group), []).append(np.array(values[row, place]))
    rest[row, place] = 0
  assert not rest.any(), "a value on padding"
  return [taken[id(group)] for group in made]


def _places(made, rows):
  for row, held in enumerate(rows):
    start = segment = 0
    for number, index in enumerate(held):
      for completion in made[index]["completions"]:
        stop = start + len(completion["tokens"])
        yield row, slice(start, stop), segment, number, made[index], completion
        start, segment = stop, segment + 1


@functools.partial(jax.jit, static_argnums=2)
def _sums(values, batch, objective):
  hashes = bootstrap.group_hashes(batch["tokens"], batch["positions"], batch["group_ids"])

  def total(values):
    names = ("segment_ids", "group_ids", *FIELDS)
    loss, counts, metrics = reward.reward_loss(
      values, *(batch[k] for k in names), objective=objective, hashes=hashes
    )
    mean = lambda x: reduce.reduce("token_mean", x, counts, batch["segment_ids"])
    return mean(loss).total, (mean(loss).weight, {k: mean(v) for k, v in metrics.items()})

  return jax.value_and_grad(total, has_aux=True)(values)


def value_and_gradient(batch: dict, objective: reward.RewardObjective, microbatches: int = 1):
  """Loss, d loss / d values [B, S, E] and metrics, summed over microbatches, divided once."""
  total, weight, gradients, metrics = 0.0, 0.0, [], []
  for part in np.split(np.arange(len(batch["mask"])), microbatches):
    micro = {k: v[part] for k, v in batch.items()}
    (one, (of_one, sums)), gradient = _sums(micro["values"], micro, objective)
    total, weight = total + one, weight + of_one
    gradients.append(gradient)
    metrics.append(sums)
  added = {k: sum((m[k] for m in metrics[1:]), metrics[0][k]) for k in metrics[0]}
  means = {k: float(v.mean()) for k, v in added.items()}
  return float(total / weight), np.concatenate(gradients) / float(weight), means


def sigmoid(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
  return max(x, 0) + math.log1p(math.exp(-abs(x)))


def truth(made: list[dict], kind, *, margins=False, center=0.0, drawn=None):
  """Loss over groups and its gradient, per group, per completion [n, E].

  drawn: [groups, E] what each member weighs each group by; None is 1 everywhere.
  """
  gradients = [[np.zeros((len(c["tokens"]), MEMBERS)) for c in g["completions"]] for g in made]
  total = weight = 0.0
  for g, group in enumerate(made):
    counted = 0.0
    for e in range(MEMBERS):
      share = group["weight"] / MEMBERS * (1.0 if drawn is None else drawn[g][e])
      terms, counted = _terms(group, e, kind, group["margin"] * margins, center)
      for value, slopes in terms:
        total += share * value
        for completion, token, slope in slopes:
          gradients[g][completion][token, e] += share * slope
    weight += group["weight"] * counted
  return total / weight, [[x / weight for x in group] for group in gradients]


def _terms(group, e, kind, margin, center):
  """[(loss, [(completion, token, slope)])] of one member, and how many loss values count."""
  completions = group["completions"]
  last = [float(c["values"][-1, e]) for c in completions]
  if kind == "pairwise":
    if len(last) != 2:
      return [], 0
    d, s = last[0] - last[1] - margin, last[0] + last[1]
    slope = -sigmoid(-d)
    slopes = [(0, -1, slope + 2 * center * s), (1, -1, -slope + 2 * center * s)]
    return [(softplus(-d) + center * s * s, slopes)], 1
  if kind == "listwise":
    return [_plackett_luce(last)], int(len(last) > 1)
  terms = []
  for c, completion in enumerate(completions):
    marks = [len(completion["mask"]) - 1]
    if kind == "process":
      marks = np.flatnonzero(completion["mask"])
    for t in marks:
      v, y = float(completion["values"][t, e]), float(completion["labels"][t])
      terms.append((y * softplus(-v) + (1 - y) * softplus(v), [(c, t, sigmoid(v) - y)]))
  return terms, len(terms)


def _plackett_luce(rewards: list[float]):
  """-sum_i log(exp r_i / sum_{j >= i} exp r_j); d / d r_k = sum_{i <= k} p_i(k) - 1."""
  loss, slopes = 0.0, [-1.0] * len(rewards)
  for i in range(len(rewards)):
    top = max(rewards[i:])
    weights = [math.exp(r - top) for r in rewards[i:]]
    loss += top + math.log(sum(weights)) - rewards[i]
    for k, w in enumerate(weights):
      slopes[i + k] += w / sum(weights)
  return loss, [(k, -1, slope) for k, slope in enumerate(slopes)]


def drawn_weights(made: list[dict]) -> np.ndarray:
  """[groups, E] Poisson(1) numbers of each group's hash, with Python's integers."""
  cumulative = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(9)])
  out = np.zeros((len(made), MEMBERS))
  for g, group in enumerate(made):
    total = 0
    for completion in group["completions"]:
      for position, token in enumerate(completion["tokens"].tolist()):
        total += _mix(_mix(token + 1) + position)
    for e in range(MEMBERS):
      u = (_mix(total % 2**32 ^ 0x9E3779B9 * (e + 1) % 2**32) >> 8) / 2**24
      out[g, e] = (u >= cumulative).sum()
  return out


def _mix(x: int) -> int:
  x %= 2**32
  x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
  x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
  return x ^ x >> 16
