"""Scores of completions by a reward model: packed rows, one jitted pass, few shapes.

Letters: N completions, W positions of a rollout, E members of an ensemble, A microbatches.

The parameters of a finished stage `Reward` named S with M members are
`context.left_by(S, heads.table(context.config, M))`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import sharding
from pt_jax.data import packing
from pt_jax.data.batch import PADDING_SEGMENT
from pt_jax.models import heads
from pt_jax.models.config import ModelConfig
from pt_jax.rollout.rollouts import Rollouts
from pt_jax.weights import Params


def score_completions(
  params: Params,
  config: ModelConfig,
  rollouts: Rollouts,
  *,
  mesh: jax.sharding.Mesh,
  rows: int,
  row_length: int,
) -> np.ndarray:
  """The reward of each completion by each member: the value at its last token, whatever ended it.

  Args:
    params: of `heads.table(config, E)`.
    config: the model under the head.
    rollouts: N of them, NumPy arrays, the same on every process.
    mesh: the one in context, where `params` are.
    rows: packed rows of one microbatch; the mesh divides them.
    row_length: tokens of a row; no prompt and completion together are longer.

  Returns:
    [N, E] float32; `pessimistic_mean` makes one number of the members.

  Raises:
    ValueError: a completion is longer than a row.
  """
  values = _values(params, config, rollouts, mesh, rows, row_length)
  last = np.asarray(rollouts.length) - 1
  return values[np.arange(len(values)), last]


def score_steps(
  params: Params,
  config: ModelConfig,
  rollouts: Rollouts,
  marks: np.ndarray,
  *,
  mesh: jax.sharding.Mesh,
  rows: int,
  row_length: int,
) -> np.ndarray:
  """The value of a process reward model at each step mark, by each member.

  Args:
    marks: [N, W] bool, where a step of the completion ends; W is that of `rollouts.tokens`.
    params, config, rollouts, mesh, rows, row_length: as for `score_completions`.

  Returns:
    [N, W, E] float32, 0 where there is no mark. Its sigmoid is the probability that the step is
    right; `pessimistic_mean` makes [N, W] of it.

  Raises:
    ValueError: a completion is longer than a row, or a mark is on a prompt or on padding.
  """
  index = np.arange(np.shape(rollouts.tokens)[1])
  prompt, length = np.asarray(rollouts.prompt_length), np.asarray(rollouts.length)
  inside = (index >= prompt[:, None]) & (index < length[:, None])
  marks = np.asarray(marks, bool)
  if marks.shape != inside.shape or (marks & ~inside).any():
    raise ValueError(
      f"marks: expected {inside.shape} and none outside the completions, found {marks.shape} and "
      f"{int((marks & ~inside).sum()) if marks.shape == inside.shape else 'unknown'} outside"
    )
  values = _values(params, config, rollouts, mesh, rows, row_length)
  return np.where(marks[..., None], values, 0).astype(np.float32)


def pessimistic_mean(values: np.ndarray, pessimism: float = 0.0) -> np.ndarray:
  """mean - pessimism * std over the members of [..., E]: [...] float32.

  What members disagree on is worth less (arXiv 2310.02743, whose uncertainty weight multiplies the
  variance). One member has no std: pessimism changes nothing.

  Raises ValueError for a pessimism below 0.
  """
  if pessimism < 0:
    raise ValueError(f"pessimism: expected a number >= 0, found {pessimism}")
  values = np.asarray(values, np.float64)
  return (values.mean(-1) - pessimism * values.std(-1)).astype(np.float32)


def _values(
  params: Params,
  config: ModelConfig,
  rollouts: Rollouts,
  mesh: jax.sharding.Mesh,
  rows: int,
  row_length: int,
) -> np.ndarray:
  """[N, W, E] after each token of prompt and completion, 0 behind.

  The number of microbatches is the next power of two of what is needed, and those that hold nothing
  are not computed: few programs for any number of completions.
  """
  tokens, length = np.asarray(rollouts.tokens), np.asarray(rollouts.length)
  name = "completion {}".format
  plan = packing.pack(length, row_length, rows_multiple=rows, names=name)
  microbatches = 1 << (plan.rows // rows - 1).bit_length()
  plan = dataclasses.replace(plan, rows=microbatches * rows)
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  laid = (
    packing.lay_out(plan, tokens, 0, np.int32),
    packing.lay_out(plan, positions, 0, np.int32),
    packing.spread(plan, plan.segment, PADDING_SEGMENT, np.int32),
  )
  split = lambda x: x.reshape(microbatches, rows, row_length)
  batch = sharding.put(jax.tree.map(split, laid), sharding.batch_spec(1), mesh)
  found = np.asarray(_compiled(config)(params, *batch)).reshape(plan.rows, row_length, -1)
  values = np.zeros((*tokens.shape, found.shape[-1]), np.float32)
  for i, row, slot in plan.slots():
    values[i, : length[i]] = found[row, slot]
  return values


@functools.cache
def _compiled(config: ModelConfig) -> Any:
  """The jitted (params, tokens, positions, segment_ids [A, B, S]) -> values [A, B, S, E], the same
  on all devices."""

  def values(
    params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
  ) -> jax.Array:
    fields = (tokens, positions, segment_ids)
    at = lambda i: [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in fields]

    def one(i: jax.Array, found: jax.Array) -> jax.Array:
      value = heads.values(params, config, *at(i))
      return found.at[i].set(jax.reshard(value, jax.P()))

    held = (segment_ids >= 0).any((1, 2))
    count = jnp.max(jnp.where(held, jnp.arange(1, len(held) + 1), 0))
    members = params[heads.HEAD].shape[0]
    nothing = jnp.zeros((*tokens.shape, members), jnp.float32)
    return jax.lax.fori_loop(0, count, one, nothing)

  return jax.jit(values)
