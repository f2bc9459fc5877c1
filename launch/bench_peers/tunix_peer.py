"""What the Tunix peers share: the model, a tokenizer without files, the report."""

import importlib.metadata
import json
import os
import sys

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3_model

PAD, EOS = 0, 1


def start() -> dict:
  """The spec from standard input. XLA has a thread for every core that the process may use."""
  spec = json.load(sys.stdin)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
  return spec


def mesh() -> jax.sharding.Mesh:
  """One device under the axis names that Tunix's models use."""
  kinds = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=kinds, devices=jax.devices()[:1])


def config(spec: dict) -> qwen3_model.ModelConfig:
  """The model's shape; float32, no rematerialisation."""
  m = spec["model"]
  return qwen3_model.ModelConfig(
    num_layers=m["layers"],
    vocab_size=m["vocab_size"],
    embed_dim=m["width"],
    hidden_dim=m["hidden"],
    num_heads=m["heads"],
    head_dim=m["head_dim"],
    num_kv_heads=m["kv_heads"],
    rope_theta=int(m["rope_theta"]),
    norm_eps=m["norm_epsilon"],
    use_tied_embedding=True,
  )


def qwen3(spec: dict) -> qwen3_model.Qwen3:
  """The model, randomly initialised."""
  return qwen3_model.Qwen3(config(spec), rngs=nnx.Rngs(0))


def optimizer(spec: dict) -> optax.GradientTransformation:
  """AdamW behind a clip by global norm, as a transformers `Trainer` has it."""
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(spec["learning_rate"]))


class WordTokenizer:
  """One token a word: "t5" is token 5."""

  def encode(self, text: str, **_) -> list[int]:
    return [int(word[1:]) for word in text.split()]

  def decode(self, ids: list[int], **_) -> str:
    return " ".join(f"t{i}" for i in ids)

  def bos_id(self) -> int:
    return 0  # Tunix prepends nothing when this is 0

  def eos_id(self) -> int:
    return EOS

  def pad_id(self) -> int:
    return PAD


def random_tokens(spec: dict, rows: int, length: int, seed: int = 0) -> np.ndarray:
  """[rows, length] ordinary tokens."""
  rng = np.random.default_rng(seed)
  return rng.integers(2, spec["model"]["vocab_size"], (rows, length), dtype=np.int32)


def random_prompts(spec: dict, rows: int, length: int, seed: int = 0) -> list[str]:
  """Texts of `length` tokens."""
  return [WordTokenizer().decode(row) for row in random_tokens(spec, rows, length, seed)]


def report(task: str, seconds: list[float], tokens: int, settings: str) -> None:
  """The line that `launch.bench` reads."""
  version = importlib.metadata.version("google-tunix")
  line = {"peer": "tunix", "task": task, "seconds": seconds, "tokens": tokens}
  print(json.dumps(line | {"settings": f"tunix {version} {settings}; jax {jax.__version__}"}))
