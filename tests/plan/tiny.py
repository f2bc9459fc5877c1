"""The model of the plans that tests compile: heads of 128, so that the kernels are in it."""

from pt_jax.models.config import ModelConfig

MODEL = ModelConfig(
  vocab_size=512,
  width=256,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=128,
  hidden=512,
  compute_dtype="bfloat16",
)
