"""`config.json` of a HuggingFace checkpoint to `ModelConfig` and back.

Read: model types llama, qwen2 and qwen3, as transformers 4 writes them (`rope_theta`,
`rope_scaling`) and as transformers 5 does (`rope_parameters`). An option that changes what the
network computes and that this decoder lacks is an error, never ignored. Written: the form of
transformers 4, which both read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pt_jax.models.config import Llama3Rope, ModelConfig


class Family(NamedTuple):
  """What a model type implies that its config.json does not say."""

  architecture: str
  fixed: dict[str, Any]  # options with one supported value, which is also the default
  qk_norm: bool = False
  attention_bias: bool = False
  head_dim: int | None = None  # where the file has none; None is width / heads


NO_BIAS, NO_WINDOW = {"attention_bias": False}, {"use_sliding_window": False}
FAMILIES = {
  "llama": Family("LlamaForCausalLM", NO_BIAS | {"mlp_bias": False}),
  "qwen2": Family("Qwen2ForCausalLM", NO_WINDOW, attention_bias=True),
  "qwen3": Family("Qwen3ForCausalLM", NO_BIAS | NO_WINDOW, qk_norm=True, head_dim=128),
}
FIXED = {
  "hidden_act": "silu",
  "attention_dropout": 0,
  "partial_rotary_factor": 1,
  "quantization_config": None,
}
SIZES = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "hidden": "intermediate_size",
  "max_length": "max_position_embeddings",
}
LLAMA3_ROPE = {
  "factor": "factor",
  "low_frequency_factor": "low_freq_factor",
  "high_frequency_factor": "high_freq_factor",
  "original_length": "original_max_position_embeddings",
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", *LLAMA3_ROPE.values()}
DEFAULT_ROPE_THETA = 10_000.0  # transformers', for all three families


def read_config(folder: str | Path) -> ModelConfig:
  """The `ModelConfig` of the checkpoint in `folder`, with float32 parameters and compute.

  Choose dtypes, rematerialisation and so on with `dataclasses.replace`. Raises ValueError, naming
  the file and the key, for a model type or an option that the decoder does not implement.
  """
  path = Path(folder) / "config.json"
  raw = read_json(path)
  try:
    return _parse(raw)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def read_json(path: Path) -> Any:
  """The content of a JSON file. Raises ValueError when it is absent or not JSON."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file; expected the folder of a HF checkpoint") from None
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from None


def write_config(c: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json entries of a model; `extra` is added and wins (e.g. eos_token_id).

  Raises ValueError when no supported family has this combination of options.
  """
  flags = (c.qk_norm, c.attention_bias)
  kinds = [k for k, family in FAMILIES.items() if (family.qk_norm, family.attention_bias) == flags]
  if not kinds:
    raise ValueError("model config: no HF family has both qk_norm and attention_bias")
  family = FAMILIES[kinds[0]]
  scaling = None
  if c.rope_scaling:
    values = {theirs: getattr(c.rope_scaling, ours) for ours, theirs in LLAMA3_ROPE.items()}
    scaling = {"rope_type": "llama3", **values}
  return {
    "architectures": [family.architecture],
    "model_type": kinds[0],
    **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()},
    "head_dim": c.head_dim,
    "rms_norm_eps": c.norm_epsilon,
    "rope_theta": c.rope_theta,
    "rope_scaling": scaling,
    "tie_word_embeddings": c.tied_embeddings,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    **family.fixed,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": c.param_dtype,
    **extra,
  }


def _parse(raw: Mapping[str, Any]) -> ModelConfig:
  kind = raw.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, found {kind!r}")
  family = FAMILIES[kind]
  for key, value in (FIXED | family.fixed).items():
    if raw.get(key, value) != value:
      raise ValueError(f"{key}: only {value!r} is implemented, found {raw[key]!r}")
  other_layers = set(raw.get("layer_types") or ()) - {"full_attention"}
  if other_layers:
    raise ValueError(f"layer_types: only 'full_attention' is implemented, found {other_layers}")
  sizes = {ours: _number(raw, theirs, int) for ours, theirs in SIZES.items()}
  theta, scaling = _rope(raw)
  return ModelConfig(
    **sizes,
    head_dim=raw.get("head_dim") or family.head_dim or sizes["width"] // sizes["heads"],
    rope_theta=theta,
    rope_scaling=scaling,
    norm_epsilon=_number(raw, "rms_norm_eps", float),
    qk_norm=family.qk_norm,
    attention_bias=family.attention_bias,
    tied_embeddings=raw.get("tie_word_embeddings", False),
  )


def _rope(raw: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
  """Base and stretch of the rotary positions."""
  rope = {"rope_theta": raw.get("rope_theta", DEFAULT_ROPE_THETA)}
  rope |= (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
  unknown = sorted(set(rope) - ROPE_KEYS)
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise ValueError(f"rope_type: only 'default' and 'llama3' are implemented, found {kind!r}")
  if unknown:
    raise ValueError(f"RoPE parameter {unknown[0]!r} is not implemented")
  theta = _number(rope, "rope_theta", float)
  if kind == "default":
    return theta, None
  kinds = {"original_length": int}
  values = {o: _number(rope, theirs, kinds.get(o, float)) for o, theirs in LLAMA3_ROPE.items()}
  return theta, Llama3Rope(**values)


def _number(raw: Mapping[str, Any], key: str, kind: type) -> Any:
  """raw[key] as a positive int or float."""
  value = raw.get(key)
  accepted = int if kind is int else (int, float)
  if isinstance(value, bool) or not isinstance(value, accepted) or value <= 0:
    found = repr(value) if key in raw else "none"
    raise ValueError(f"{key}: expected a positive {kind.__name__}, found {found}")
  return kind(value)
