"""`ModelConfig`s of the published dense sizes of Llama 3, Qwen 2.5 and Qwen 3.

From the config.json files of the base models meta-llama/Llama-3.x, Qwen/Qwen2.5 and of Qwen/Qwen3.
Fine-tuned ones may differ in what does not change the parameters (max_length, norm_epsilon): where
there is a checkpoint, `hf.read_config` is the truth. These are for planning and for random weights.
"""

from pt_jax.models.config import Llama3Rope, ModelConfig


def _llama3(
  width: int,
  layers: int,
  heads: int,
  hidden: int,
  *,
  head_dim: int = 128,
  rope_factor: float = 8.0,
  tied: bool = False,
) -> ModelConfig:
  return ModelConfig(
    vocab_size=128_256,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=8,
    head_dim=head_dim,
    hidden=hidden,
    max_length=131_072,
    rope_theta=500_000.0,
    rope_scaling=Llama3Rope(factor=rope_factor),
    norm_epsilon=1e-5,
    tied_embeddings=tied,
  )


def _qwen2_5(
  width: int,
  layers: int,
  heads: int,
  kv_heads: int,
  hidden: int,
  *,
  max_length: int = 131_072,
  norm_epsilon: float = 1e-6,
  tied: bool = False,
) -> ModelConfig:
  return ModelConfig(
    vocab_size=151_936 if tied else 152_064,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=width // heads,
    hidden=hidden,
    max_length=max_length,
    rope_theta=1_000_000.0,
    norm_epsilon=norm_epsilon,
    attention_bias=True,
    tied_embeddings=tied,
  )


def _qwen3(width: int, layers: int, heads: int, hidden: int, *, tied: bool = False) -> ModelConfig:
  return ModelConfig(
    vocab_size=151_936,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=8,
    head_dim=128,
    hidden=hidden,
    max_length=40_960,
    rope_theta=1_000_000.0,
    norm_epsilon=1e-6,
    qk_norm=True,
    tied_embeddings=tied,
  )


ZOO = {
  "llama3.1-8b": _llama3(4096, 32, 32, 14336),
  "llama3.1-70b": _llama3(8192, 80, 64, 28672),
  "llama3.2-1b": _llama3(2048, 16, 32, 8192, head_dim=64, rope_factor=32.0, tied=True),
  "llama3.2-3b": _llama3(3072, 28, 24, 8192, rope_factor=32.0, tied=True),
  "qwen2.5-0.5b": _qwen2_5(896, 24, 14, 2, 4864, max_length=32_768, tied=True),
  "qwen2.5-1.5b": _qwen2_5(1536, 28, 12, 2, 8960, tied=True),
  "qwen2.5-3b": _qwen2_5(2048, 36, 16, 2, 11008, max_length=32_768, tied=True),
  "qwen2.5-7b": _qwen2_5(3584, 28, 28, 4, 18944),
  "qwen2.5-14b": _qwen2_5(5120, 48, 40, 8, 13824, norm_epsilon=1e-5),
  "qwen2.5-32b": _qwen2_5(5120, 64, 40, 8, 27648, norm_epsilon=1e-5),
  "qwen2.5-72b": _qwen2_5(8192, 80, 64, 8, 29568, norm_epsilon=1e-5),
  "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
  "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
  "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
  "qwen3-8b": _qwen3(4096, 36, 32, 12288),
  "qwen3-14b": _qwen3(5120, 40, 40, 17408),
  "qwen3-32b": _qwen3(5120, 64, 64, 25600),
}
