"""A tiny model with opinions, prompts of mixed lengths, and what the trainer thinks of rollouts."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from pt_jax import sharding, weights
from pt_jax.data.batch import Batch
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.rollout.rollouts import Rollouts
from pt_jax.steps.policy import token_statistics

MODEL = ModelConfig(
  vocab_size=64,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=48,
  max_length=64,
  qk_norm=True,
  attention_bias=True,
  remat="none",
  vocab_chunk=32,
)
LENGTH = 48  # of the engines' window


@functools.cache
def params(seed: int = 0, config: ModelConfig = MODEL) -> weights.Params:
  """Random weights, matrices twice as wide: predictions are far from uniform, mistakes show."""
  made = jax.jit(lambda key: decoder.init(key, config, sharding.USE))(jax.random.key(seed))
  return weights.map_table(
    lambda row, w: np.asarray(w) * (1 + row.decay), decoder.table(config), made
  )


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
  """One random prompt of each length."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, MODEL.vocab_size, length).tolist() for length in lengths]


@functools.cache
def _score(temperature: float):
  def score(params: weights.Params, batch: Batch) -> jax.Array:
    return token_statistics(params, batch, MODEL, temperature).logprobs

  return jax.jit(score)


def trainer_logprobs(
  params: weights.Params, rollouts: Rollouts, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
  """Log-probs [B, S] of the training forward pass, and where the completions are."""
  rows, length = rollouts.tokens.shape
  tokens = np.zeros((-(-rows // 8) * 8, LENGTH), np.int32)
  tokens[:rows, :length] = rollouts.tokens
  index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  ends = np.zeros(len(tokens), np.int32)
  ends[:rows] = rollouts.length
  segments = np.where(index < ends[:, None], 0, -1).astype(np.int32)
  unread = np.zeros(tokens.shape, np.float32)
  batch = Batch(tokens, index, segments, unread, unread)
  logprobs = np.asarray(_score(temperature)(params, batch))[:rows, :length]
  index = index[:rows, :length]
  return logprobs, (index >= rollouts.prompt_length[:, None]) & (index < rollouts.length[:, None])
