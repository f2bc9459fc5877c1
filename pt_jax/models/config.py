"""`ModelConfig`: what distinguishes one dense decoder from another (Llama 3, Qwen 2.5, Qwen 3)."""

import dataclasses
import typing
from typing import Literal

Remat = Literal["none", "block", "attention", "heads", "projections", "offload"]


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """Llama 3.1's stretch of RoPE wavelengths to longer contexts (`rope_type: llama3`)."""

  factor: float = 8.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer with RMS norms, rotary positions, grouped queries and SwiGLU."""

  vocab_size: int
  width: int  # D, the residual stream
  layers: int
  heads: int  # query heads
  kv_heads: int  # key and value heads; each serves heads // kv_heads query heads
  head_dim: int
  hidden: int  # F, MLP hidden units
  max_length: int = 4096  # the longest position the model is meant for
  rope_theta: float = 10_000.0
  rope_scaling: Llama3Rope | None = None
  norm_epsilon: float = 1e-6
  qk_norm: bool = False  # RMS norm on each query and key head (Qwen 3)
  attention_bias: bool = False  # bias on q, k and v (Qwen 2.5)
  tied_embeddings: bool = False
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Remat = "block"  # what a block keeps for its backward pass, see `models.remat`
  unroll: bool = False  # blocks unrolled instead of scanned: longer compile, faster on CPU
  vocab_chunk: int = 8192  # logits that exist at once per token when log-probs are computed

  def __post_init__(self):
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden"):
      if getattr(self, name) < 1:
        raise ValueError(f"model config: {name} must be positive, found {getattr(self, name)}")
    if self.heads % self.kv_heads:
      raise ValueError(
        f"model config: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
      )
    if self.remat not in typing.get_args(Remat):
      names = ", ".join(typing.get_args(Remat))
      raise ValueError(f"model config: remat: expected one of {names}, found {self.remat!r}")
    if self.head_dim % 2:
      raise ValueError(f"model config: head_dim must be even for RoPE, found {self.head_dim}")


# Fields that change what is computed; the others say how, and how long a row may be.
ARCHITECTURE = (
  *("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "rope_theta"),
  *("rope_scaling", "norm_epsilon", "qk_norm", "attention_bias", "tied_embeddings"),
)
