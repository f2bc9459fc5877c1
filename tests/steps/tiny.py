"""A tiny model, packed rows for it, and its statistics in float64: what the step tests share."""

import functools

import jax
import numpy as np

from pt_jax import sharding, weights
from pt_jax.data.batch import Batch, PolicyBatch
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.state import Updater

MODEL = ModelConfig(
  vocab_size=32,
  width=16,
  layers=1,
  heads=2,
  kv_heads=1,
  head_dim=8,
  hidden=16,
  vocab_chunk=8,
  remat="none",
)
TEMPERATURE = 0.7
ROWS, LENGTH = 8, 12
UPDATER = Updater(
  AdamW(1e-2, steps=10, epsilon=1e-3, clip_norm=0.3), decoder.table(MODEL), sharding.zero(1)
)


@functools.cache
def params():
  """Initial weights, matrices twice as wide: predictions are far from uniform, mistakes show."""
  made = jax.jit(lambda key: decoder.init(key, MODEL, sharding.USE))(jax.random.key(3))
  return weights.map_table(lambda row, w: np.asarray(w) * (1 + row.decay), UPDATER.table, made)


@functools.cache
def state():
  """The state before the first update; the steps of these tests do not donate it."""
  return jax.jit(UPDATER.create)(params())


def fields() -> dict[str, np.ndarray]:
  """Every field of `Batch` and `PolicyBatch`: rows of two samples of unequal lengths
  and padding."""
  rng = np.random.default_rng(0)
  shape = (ROWS, LENGTH)
  batch = {
    "tokens": rng.integers(0, MODEL.vocab_size, shape, dtype=np.int32),
    "positions": np.zeros(shape, np.int32),
    "segment_ids": np.full(shape, -1, np.int32),
    "mask": np.zeros(shape, np.float32),
    "weights": np.zeros(shape, np.float32),
  }
  for row in range(ROWS):
    first, end = 3 + row % 4, 8 + row % 5
    for segment, (a, b) in enumerate(((0, first), (first, end))):
      batch["positions"][row, a:b] = np.arange(b - a)
      batch["segment_ids"][row, a:b] = segment
      batch["weights"][row, a:b] = 1
      batch["mask"][row, a + 1 + row % 2 : b] = 1
    batch["tokens"][row, end:] = 0
  zero = (("advantages", 0), ("returns", 0), ("old_values", 0))
  for name, center in (zero[0], *((f"{k}_logprobs", -3.5) for k in KINDS), *zero[1:]):
    values = center + rng.normal(scale=0.5, size=shape)
    batch[name] = (values * batch["mask"]).astype(np.float32)
  batch["positive"] = batch["mask"] * (batch["segment_ids"] == 0)
  return batch


KINDS = ("old", "sampler", "reference")


def batch(kind: type[Batch] | type[PolicyBatch], microbatches: int = 1, **changes):
  """A batch [A, B, S] on the mesh in context, with some fields replaced."""
  values = fields() | changes
  values = {k: values[k] for k in kind.__dataclass_fields__ if k in values}
  made = kind(**{k: v.reshape(microbatches, -1, LENGTH) for k, v in values.items()})
  return jax.device_put(made, sharding.batch_spec(1))


@functools.cache
def numpy_statistics(temperature: float):
  """Log-prob, entropy, top-1 [ROWS, LENGTH] in float64 from the model's hidden states."""
  b = fields()
  forward = jax.jit(lambda params, *rows: decoder.forward(params, MODEL, *rows))
  hidden = forward(params(), b["tokens"], b["positions"], b["segment_ids"])
  z = np.asarray(hidden, np.float64) @ np.asarray(params()["unembed"], np.float64).T / temperature
  log_p = z - z.max(-1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  entropy, top1 = -(np.exp(log_p) * log_p).sum(-1), z.argmax(-1)
  picked = np.take_along_axis(log_p[:, :-1], b["tokens"][:, 1:, None], -1)[..., 0]
  late = lambda x: np.pad(x, ((0, 0), (1, 0)))
  return late(picked), late(entropy[:, :-1]), late(top1[:, :-1])


def segments():
  """(row, place) of every sample."""
  ids = fields()["segment_ids"]
  return [(row, ids[row] == s) for row in range(ROWS) for s in range(2)]
