"""Samples of unequal length, and the many ways to lay them out in rows [B, S]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.losses import policy, reduce
from pt_jax.losses.objective import Objective

Sample = dict[str, np.ndarray]  # field -> [length], prompt and completion
Rows = tuple[tuple[int, ...], ...]  # the samples that each row holds, in order
SCORES = ("old_logprobs", "reference_logprobs", "sampler_logprobs", "exact_kl", "entropy")
FIELDS = ("logprobs", *SCORES, "advantages", "mask")

# Six samples, one masked whole (its completion was cut) and one of a single trained token.
PROMPTS = (2, 1, 3, 2, 1, 2)
COMPLETIONS = (5, 7, 1, 3, 4, 2)
CUT = 4
APART: Rows = ((0,), (1,), (2,), (3,), (4,), (5,), (), ())  # two rows of nothing: 8 divides by 4
PACKED: Rows = ((1, 2), (0, 3), (4, 5), ())


def samples(seed: int = 0, spread: float = 0.6) -> list[Sample]:
  """Log-ratios within +-spread; what stands on the prompt is junk that nothing may read."""
  rng = np.random.default_rng(seed)
  made = []
  for index, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
    length = prompt + completion
    logprobs = -rng.uniform(0.1, 6, length)
    sample = {
      "logprobs": logprobs,
      "old_logprobs": logprobs - rng.uniform(-spread, spread, length),
      "reference_logprobs": logprobs + rng.uniform(-spread, spread, length),
      "sampler_logprobs": logprobs - rng.uniform(-spread, spread, length),
      "exact_kl": rng.uniform(0, 2, length),
      "entropy": rng.uniform(0, 3, length),
      "advantages": np.full(length, (1.3, -0.7, 0.4, -1.6, 0.9, -0.2)[index]),
      "mask": (np.arange(length) >= prompt) * float(index != CUT),
    }
    made.append({k: v.astype(np.float32) for k, v in sample.items()})
  return made


def lay_out(made: list[Sample], rows: Rows, width: int, junk: float = 0.0) -> Sample:
  """Field -> [B, width] with `segment_ids`; padding holds `junk`, and 0 in the mask."""
  batch = {k: np.full((len(rows), width), junk, np.float32) for k in FIELDS}
  batch["mask"] = np.zeros((len(rows), width), np.float32)
  batch["segment_ids"] = np.full((len(rows), width), -1, np.int32)
  for row, place, segment, index in _places(made, rows):
    for field in FIELDS:
      batch[field][row, place] = made[index][field]
    batch["segment_ids"][row, place] = segment
  return batch


def take_back(values: np.ndarray, made: list[Sample], rows: Rows) -> list[np.ndarray]:
  """[B, S] -> per sample [length]; fails when anything but 0 is left on padding."""
  taken: list[np.ndarray] = [np.empty(0)] * len(made)
  rest = np.array(values)
  for row, place, _, index in _places(made, rows):
    taken[index] = np.array(values[row, place])
    rest[row, place] = 0
  assert not rest.any(), "a value on padding"
  return taken


def _places(made: list[Sample], rows: Rows):
  for row, held in enumerate(rows):
    start = 0
    for segment, index in enumerate(held):
      length = len(made[index]["mask"])
      yield row, slice(start, start + length), segment, index
      start += length


def total(logprobs: jax.Array, batch: Sample, objective: Objective) -> reduce.Sum:
  """What a step does with one microbatch."""
  loss, _ = policy.policy_loss(
    logprobs,
    batch["old_logprobs"],
    batch["advantages"],
    batch["mask"],
    batch["segment_ids"],
    objective=objective,
    reference_logprobs=batch["reference_logprobs"],
    sampler_logprobs=batch["sampler_logprobs"],
    exact_kl=batch["exact_kl"],
    entropy=batch["entropy"],
  )
  return reduce.reduce(
    objective.reduction,
    loss,
    batch["mask"],
    batch["segment_ids"],
    constant_length=objective.constant_length,
  )


@functools.partial(jax.jit, static_argnums=2)
def _sums_and_gradient(logprobs, batch, objective):
  both = lambda lp: (lambda whole: (whole.total, whole.weight))(total(lp, batch, objective))
  return jax.value_and_grad(both, has_aux=True)(logprobs)


def value_and_gradient(
  batch: Sample, objective: Objective, microbatches: int = 1
) -> tuple[float, np.ndarray]:
  """Loss and d loss / d logprobs [B, S], summed over microbatches and divided once."""
  added, gradients = reduce.Sum(jnp.zeros(()), jnp.zeros(())), []
  for part in np.split(np.arange(len(batch["mask"])), microbatches):
    micro = {k: v[part] for k, v in batch.items()}
    (value, weight), gradient = _sums_and_gradient(micro["logprobs"], micro, objective)
    added += reduce.Sum(value, weight)
    gradients.append(gradient)
  return float(added.mean()), np.concatenate(gradients) / float(added.weight)
