"""One update of a tiny model on any mesh, of every kind, and the samples that it is done on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import sharding, weights
from pt_jax.data.batch import Batch, PolicyBatch
from pt_jax.losses import objective, supervised
from pt_jax.losses.supervised import ReferenceKl, SupervisedObjective
from pt_jax.models import decoder, heads
from pt_jax.models.config import ModelConfig
from pt_jax.steps.critic import value_step
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.policy import policy_step
from pt_jax.steps.state import TrainState, Updater
from pt_jax.steps.supervised import sft_step

# Every axis that a mesh splits is a multiple of 8. A chunk of 16 gives 4 chunks of the vocabulary
# on one device and 1 on a tensor axis of 8.
MODEL = ModelConfig(
  vocab_size=64,
  width=32,
  layers=2,
  heads=16,
  kv_heads=8,
  head_dim=4,
  hidden=64,
  qk_norm=True,
  attention_bias=True,
  vocab_chunk=16,
)
LENGTH = 16
SAMPLES = 64  # one a row: 64 rows; two a row: 32, which 8 devices and 4 microbatches divide
# Adam divides by sqrt(v) + epsilon: with the usual 1e-8 a gradient of 1e-9, which is rounding
# noise, moves its parameter as far as any other. 1e-3 keeps the update as well conditioned as the
# gradient.
ADAM = AdamW(1e-2, steps=10, weight_decay=0.1, epsilon=1e-3, clip_norm=0.5)

# The exact KL and label smoothing read the whole vocabulary, which a tensor axis splits.
WEIGHED = SupervisedObjective(label_smoothing=0.1, kl=ReferenceKl(0.5), reduction="segment_mean")


# Every option of the policy step at once: ratios of sequences, exact KL, entropy, NLL of right
# completions, a correction of sequences, a value head.
EVERYTHING = objective.Objective(
  advantage=objective.Gae(),
  ratio="sequence",
  surrogate=objective.Clip(0.1, 0.15, dual=1.3),
  kl=objective.Kl(0.2, "exact"),
  entropy=0.1,
  positive_nll=0.3,
  correction=objective.Correction("sequence", "truncate", 0.5, 1.5),
  reduction="segment_mean",
)


class Case(NamedTuple):
  """One way to run the update; the result must not depend on anything but `kind`."""

  kind: str  # sft, psft, grpo, all (of the policy step's options) or critic
  mesh: tuple[int, int, int, int]  # data, context, expert, tensor
  zero: int
  microbatches: int
  layout: str  # packed, unpacked, or shared: packed, with prompts as prefixes of completions


class Outcome(NamedTuple):
  """What an update leaves behind."""

  state: TrainState
  metrics: dict[str, jax.Array]


def samples() -> list[dict[str, np.ndarray]]:
  """Token fields of samples of 2 to 8 tokens; the first token or more is the prompt."""
  rng, others = np.random.default_rng(0), np.random.default_rng(1)
  made = []
  for index in range(SAMPLES):
    size = 2 + index % 7
    mask = (np.arange(size) >= rng.integers(1, size)).astype(np.float32)
    noise = lambda scale: (rng.normal(scale=scale, size=size) * mask).astype(np.float32)  # noqa: B023
    uniform = -np.log(MODEL.vocab_size) * mask
    made.append(
      {
        "tokens": rng.integers(0, MODEL.vocab_size, size, dtype=np.int32),
        "positions": np.arange(size, dtype=np.int32),
        "mask": mask,
        "weights": np.full(size, 1 + index % 3, np.float32),
        "advantages": noise(1.0),
        "old_logprobs": (uniform + noise(0.3)).astype(np.float32),
        "sampler_logprobs": (uniform + noise(0.3)).astype(np.float32),
        "reference_logprobs": (uniform + noise(0.3)).astype(np.float32),
        "returns": (others.normal(size=size) * mask).astype(np.float32),
        "old_values": (others.normal(size=size) * mask).astype(np.float32),
        "positive": mask * np.float32(index % 3 == 0),
      }
    )
  return made


def lay_out(per_row: int) -> dict[str, np.ndarray]:
  """Field -> [B, S], `per_row` samples in each row, and their segment ids."""
  made = samples()
  rows = SAMPLES // per_row
  batch = {k: np.zeros((rows, LENGTH), v.dtype) for k, v in made[0].items()}
  batch["segment_ids"] = np.full((rows, LENGTH), -1, np.int32)
  for row in range(rows):
    start = 0
    for segment, sample in enumerate(made[row::rows]):
      place = slice(start, start + len(sample["tokens"]))
      for name, values in sample.items():
        batch[name][row, place] = values
      batch["segment_ids"][row, place] = segment
      start = place.stop
  return batch


def split_prompts(segments: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
  """Ids of the same rows, where all of a prompt but its last token is a prefix."""
  ahead = np.pad(mask, ((0, 0), (0, 1)))[:, 1:]
  later = np.where(segments < 0, -1, 2 * segments + np.maximum(mask, ahead).astype(np.int32))
  return {
    "segment_ids": np.where(later % 2 == 1, later, -1).astype(np.int32),
    "prefix_ids": np.where(later < 0, -1, 2 * segments).astype(np.int32),
  }


def make_batch(case: Case) -> Batch | PolicyBatch:
  """The samples as [A, B, S], laid out and split as the case says, on the mesh in context."""
  fields = lay_out(1 if case.layout == "unpacked" else 2)
  if case.layout == "shared":
    fields |= split_prompts(fields["segment_ids"], fields["mask"])
  kind = Batch if case.kind in ("sft", "psft") else PolicyBatch
  batch = kind(**{k: fields[k] for k in kind.__dataclass_fields__ if k in fields})
  batch = jax.tree.map(lambda x: x.reshape(case.microbatches, -1, LENGTH), batch)
  return jax.device_put(batch, sharding.batch_spec(1))


def make_mesh(shape: tuple[int, int, int, int]) -> jax.sharding.Mesh:
  """A mesh over as many of the devices as it needs."""
  return sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def make_table(kind: str) -> weights.Table:
  """The parameters of a kind: a critic's trunk and head, a policy with a head, or a policy."""
  if kind == "critic":
    return heads.table(MODEL)
  head = {heads.HEAD: heads.head_row(MODEL)} if kind == "all" else {}
  return {**decoder.table(MODEL), **head}


def make_updater(stage: int, kind: str) -> Updater:
  """What all cases of a kind share but the layout of the state."""
  return Updater(ADAM, make_table(kind), sharding.zero(stage))


@functools.cache
def initial_params(kind: str) -> weights.Params:
  """The weights that every case of a kind starts from, on the host."""
  with jax.set_mesh(make_mesh((1, 1, 1, 1))):
    init = lambda key: weights.init(key, make_table(kind), sharding.USE, jnp.dtype("float32"))
    return jax.device_get(jax.jit(init)(jax.random.key(0)))


def make_step(kind: str) -> Callable[..., Any]:
  """(state, batch, config=, updater=) -> (state, metrics)."""
  if kind == "sft":
    return functools.partial(sft_step, objective=supervised.sft())
  if kind == "psft":
    rng = np.random.default_rng(9)
    near = lambda w: (w * (1 + 0.3 * rng.normal(size=w.shape))).astype(np.float32)
    reference = jax.tree.map(near, initial_params("psft"))
    return functools.partial(sft_step, objective=WEIGHED, reference=reference)
  if kind == "critic":
    return functools.partial(value_step, clip=0.2)
  policy = functools.partial(policy_step, temperature=0.8, first_update=False)
  if kind == "grpo":
    return functools.partial(policy, objective=objective.grpo())
  reference = jax.tree.map(lambda x: 1.3 * x, initial_params("grpo"))
  return functools.partial(
    policy, objective=EVERYTHING, reference=reference, value_coefficient=0.5, value_clip=0.2
  )


@functools.cache
def update(case: Case) -> Outcome:
  """One update from the same initial weights."""
  with jax.set_mesh(make_mesh(case.mesh)):
    updater = make_updater(case.zero, case.kind)
    step = functools.partial(make_step(case.kind), config=MODEL, updater=updater)
    state = jax.jit(updater.create)(initial_params(case.kind))
    return Outcome(*jax.jit(step, donate_argnums=0)(state, make_batch(case)))
