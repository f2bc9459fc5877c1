"""Tiny random Llama 3, Qwen 2.5 and Qwen 3 checkpoints, and the logits that transformers computes.

Run in the oracle environment (tests/oracles/README.md), from the root of the repository:

  python tests/oracles/make_hf_models.py

Written to `tests/oracles/hf/<name>/`: config.json and the weights as `save_pretrained` leaves them,
and `expected.npz` with three layouts of random tokens: padded on the right, the same padded on the
left (attention mask, positions counted from the first real token), and packed, where every segment
was run alone. Logits at padding are 0. `hf/parameter_counts.json` has the number of parameters of
the published sizes, counted by transformers on models without storage. Nothing of pt_jax is
imported.

Weights are drawn so that a mistake shows: logits have a standard deviation of about 1.6, norm gains
and biases are random, and the Llama model sees positions far beyond the context that its RoPE was
stretched from (of its six frequencies one is kept, one interpolated, four are divided).
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "hf"
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}"
LENGTH = 72
ROWS = (72, 41, 5)  # the lengths of the padded rows
SEGMENTS = ((37, 20, 9), (64, 1, 4))  # the lengths of the segments of each packed row

COMMON = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MODELS = {
  "llama3": transformers.LlamaConfig(
    vocab_size=104,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_parameters={
      "rope_type": "llama3",
      "rope_theta": 10_000.0,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
    },
    tie_word_embeddings=False,
    **COMMON,
  ),
  "qwen2": transformers.Qwen2Config(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
    tie_word_embeddings=True,
    **COMMON,
  ),
  "qwen3": transformers.Qwen3Config(
    vocab_size=120,
    hidden_size=40,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # 4 heads of 16 are not the width, 40
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
    tie_word_embeddings=True,
    **COMMON,
  ),
}
SHARD_SIZE = {"qwen3": "40KB"}  # saved as several files with an index

# Published: model type, width, layers, heads, key heads, head width, hidden, vocabulary, tied.
PUBLISHED = {
  "llama3.1-8b": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
  "llama3.1-70b": ("llama", 8192, 80, 64, 8, 128, 28672, 128256, False),
  "llama3.2-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
  "llama3.2-3b": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
  "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
  "qwen2.5-1.5b": ("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True),
  "qwen2.5-3b": ("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, True),
  "qwen2.5-7b": ("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False),
  "qwen2.5-14b": ("qwen2", 5120, 48, 40, 8, 128, 13824, 152064, False),
  "qwen2.5-32b": ("qwen2", 5120, 64, 40, 8, 128, 27648, 152064, False),
  "qwen2.5-72b": ("qwen2", 8192, 80, 64, 8, 128, 29568, 152064, False),
  "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
  "qwen3-1.7b": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
  "qwen3-4b": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
  "qwen3-8b": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
  "qwen3-14b": ("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False),
  "qwen3-32b": ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False),
}


@torch.no_grad()
def random_model(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
  """A float32 model whose every parameter is drawn anew."""
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
  for name, weight in model.named_parameters():
    noise = torch.randn_like(weight)
    if "norm" in name:
      weight.copy_(1 + 0.3 * noise)
    elif name.endswith("bias"):
      weight.copy_(0.7 * noise)
    elif name in ("model.embed_tokens.weight", "lm_head.weight"):
      weight.copy_(1.5 * config.hidden_size**-0.5 * noise)
    else:
      weight.copy_(1.2 * weight.shape[1] ** -0.5 * noise)
  return model.eval()


@torch.no_grad()
def run(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Logits [B, S, V] with positions counted over the unmasked tokens, 0 where the mask is 0."""
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  out = model(
    input_ids=torch.from_numpy(tokens),
    attention_mask=torch.from_numpy(mask),
    position_ids=torch.from_numpy(positions),
  )
  return np.where(mask[..., None], out.logits.numpy(), np.float32(0))


def layouts(model: transformers.PreTrainedModel, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Tokens, masks or segment ids, and logits of the three layouts."""
  vocab = model.config.vocab_size
  right_mask = (np.arange(LENGTH) < np.array(ROWS)[:, None]).astype(np.int64)
  right = rng.integers(0, vocab, right_mask.shape) * right_mask
  left, left_mask = (
    np.stack([np.roll(row, LENGTH - n) for row, n in zip(x, ROWS)]) for x in (right, right_mask)
  )
  packed = np.zeros((len(SEGMENTS), LENGTH), np.int64)
  segment_ids = np.full(packed.shape, -1, np.int64)
  packed_logits = np.zeros((*packed.shape, vocab), np.float32)
  for b, lengths in enumerate(SEGMENTS):
    start = 0
    for segment, n in enumerate(lengths):
      at = (b, slice(start, start + n))
      packed[at] = rng.integers(0, vocab, n)
      segment_ids[at] = segment
      packed_logits[at] = run(model, packed[at][None], np.ones((1, n), np.int64))[0]
      start += n
  return {
    "right_tokens": right.astype(np.int32),
    "right_mask": right_mask.astype(np.int8),
    "right_logits": run(model, right, right_mask),
    "left_tokens": left.astype(np.int32),
    "left_mask": left_mask.astype(np.int8),
    "left_logits": run(model, left, left_mask),
    "packed_tokens": packed.astype(np.int32),
    "packed_segment_ids": segment_ids.astype(np.int8),
    "packed_logits": packed_logits,
    "versions": np.array(VERSIONS),
  }


def write_model(name: str, seed: int) -> None:
  """One checkpoint folder with its expected logits."""
  folder = HERE / name
  shutil.rmtree(folder, ignore_errors=True)
  model = random_model(MODELS[name], seed)
  model.save_pretrained(folder, max_shard_size=SHARD_SIZE.get(name, "1GB"))
  (folder / "generation_config.json").unlink()
  arrays = layouts(model, np.random.default_rng(seed))
  np.savez_compressed(folder / "expected.npz", **arrays)
  logits = arrays["right_logits"][arrays["right_mask"] == 1]
  print(name, "logits: std", logits.std(), "largest", np.abs(logits).max())


def count_parameters() -> dict[str, int]:
  """Parameters of the published sizes, a tied matrix counted once."""
  counts = {}
  for name, (kind, width, layers, heads, kv, head_dim, hidden, vocab, tied) in PUBLISHED.items():
    config = transformers.AutoConfig.for_model(
      kind,
      hidden_size=width,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=kv,
      head_dim=head_dim,
      intermediate_size=hidden,
      vocab_size=vocab,
      tie_word_embeddings=tied,
    )
    with torch.device("meta"):
      model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    counts[name] = sum(weight.numel() for weight in model.parameters())
  return counts


if __name__ == "__main__":
  for seed, name in enumerate(MODELS):
    write_model(name, seed)
  counts = {"versions": VERSIONS, **count_parameters()}
  (HERE / "parameter_counts.json").write_text(json.dumps(counts, indent=2) + "\n")
