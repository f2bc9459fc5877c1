"""HF checkpoints against transformers: logits, exports, dtypes, config.json in both forms.

The checkpoints and logits are transformers' (tests/oracles/make_hf_models.py).
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pt_jax import sharding, weights
from pt_jax.models import decoder, hf, zoo
from pt_jax.models.hf import config as hf_config
from pt_jax.models.hf import names

ORACLES = pathlib.Path(__file__).parent.parent / "oracles"
HF = ORACLES / "hf"
MODELS = ("llama3", "qwen2", "qwen3")
LAYOUTS = ("right", "left", "packed")


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def load(folder, c=None, **changes):
  c = dataclasses.replace(c or hf.read_config(folder), **changes)
  return hf.load(folder, c, one_device(), sharding.USE)


def tensors_of(folder):
  """Every tensor of a checkpoint as it lies in the files."""
  return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def segments_and_positions(segment_ids):
  """Positions counted from the first token of each segment, 0 on padding (id -1)."""
  positions = np.zeros_like(segment_ids)
  for row, ids in zip(positions, segment_ids):
    for i in range(1, len(ids)):
      row[i] = row[i - 1] + 1 if ids[i] == ids[i - 1] >= 0 else 0
  return positions


@functools.cache
def expected(name):
  """All three layouts as one batch: tokens, positions, segment_ids [8, S], logits [8, S, V]."""
  golden = np.load(HF / name / "expected.npz")
  ids = [golden[f"{k}_mask"].astype(np.int32) - 1 for k in ("right", "left")]
  ids = np.concatenate([*ids, golden["packed_segment_ids"].astype(np.int32)])
  tokens, logits = (
    np.concatenate([golden[f"{k}_{x}"] for k in LAYOUTS]) for x in ("tokens", "logits")
  )
  return tokens, segments_and_positions(ids), ids, logits


@functools.cache
def compiled(c):
  return jax.jit(lambda params, *batch: decoder.forward(params, c, *batch))


def logits_of(params, c, *batch):
  """float32 logits [B, S, V], 0 on padding."""
  with jax.set_mesh(one_device()):
    hidden = np.asarray(compiled(c)(params, *batch))
  matrix = np.asarray(params["embed" if c.tied_embeddings else "unembed"])
  return np.where(batch[2][..., None] >= 0, hidden @ matrix.T, 0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
  *batch, want = expected(name)
  c, params = hf.read_config(HF / name), load(HF / name)
  got = logits_of(params, c, *batch)
  rows = {"right": slice(0, 3), "left": slice(3, 6), "packed": slice(6, 8)}
  worst = {layout: np.abs(got[at] - want[at]).max() for layout, at in rows.items()}
  assert max(worst.values()) <= 2e-5, worst
  # The features that set the families apart all matter: without one, logits are far away.
  blocks = dict(params["blocks"])
  if name == "llama3":
    c = dataclasses.replace(c, rope_scaling=None)
  for leaf, plain in (("q_bias", 0), ("k_bias", 0), ("v_bias", 0), ("q_norm", 1), ("k_norm", 1)):
    if leaf in blocks:
      without = {**params, "blocks": blocks | {leaf: jnp.full_like(blocks[leaf], plain)}}
      assert np.abs(logits_of(without, c, *batch) - want).max() > 0.05, leaf
  if name == "llama3":
    assert np.abs(logits_of(params, c, *batch) - want).max() > 0.05


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9])
def test_round_trip_is_bitwise(tmp_path, name, max_shard_bytes):
  c, params = hf.read_config(HF / name), load(HF / name)
  out = tmp_path / "deep" / "export"
  hf.save(out, params, c, max_shard_bytes=max_shard_bytes, extra={"eos_token_id": 7})
  files = sorted(p.name for p in out.iterdir())
  assert ("model.safetensors" in files) == (max_shard_bytes == 10**9)
  assert not list(out.parent.glob("*.partial"))
  assert max(p.stat().st_size for p in out.glob("*.safetensors")) < max_shard_bytes + 10_000
  original, exported = tensors_of(HF / name), tensors_of(out)
  assert original.keys() == exported.keys()
  for key, value in original.items():
    np.testing.assert_array_equal(value, exported[key], err_msg=key, strict=True)
  assert hf.read_config(out) == c
  assert json.loads((out / "config.json").read_text())["eos_token_id"] == 7
  again = load(out)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_files_in_other_dtypes_are_cast(tmp_path):
  original = tensors_of(HF / "qwen2")
  for dtype in (np.float16, jnp.bfloat16):
    folder = tmp_path / np.dtype(dtype).name
    folder.mkdir()
    (folder / "config.json").write_text((HF / "qwen2" / "config.json").read_text())
    save_file({k: v.astype(dtype) for k, v in original.items()}, folder / "model.safetensors")
    got = load(folder)["embed"]
    assert got.dtype == np.float32
    cast = original["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, cast)
  # bfloat16 parameters come from float32 files, and go to bfloat16 files and back unchanged.
  c = dataclasses.replace(hf.read_config(HF / "qwen2"), param_dtype="bfloat16")
  params = load(HF / "qwen2", c)
  hf.save(tmp_path / "out", params, c)
  assert {v.dtype for v in tensors_of(tmp_path / "out").values()} == {np.dtype(jnp.bfloat16)}
  assert jax.tree.all(jax.tree.map(np.array_equal, params, load(tmp_path / "out", c)))


def test_tied_matrix_may_be_in_the_file_twice(tmp_path, monkeypatch):
  monkeypatch.setattr("pt_jax.models.hf.read.ROWS_AT_ONCE", 40)  # 96 rows: 40, 40 and 16
  tensors = tensors_of(HF / "qwen2")
  (tmp_path / "config.json").write_text((HF / "qwen2" / "config.json").read_text())
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  save_file(tensors, tmp_path / "model.safetensors")
  assert "unembed" not in load(tmp_path)
  tensors["lm_head.weight"][-1, -1] += 1
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.embed"):
    load(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_every_part_of_every_tensor_can_be_read_alone(name):
  """What a device reads is the slice of what one device would read: halves of each of our axes."""
  original = tensors_of(HF / name)
  for key, tensor in names.tensors(hf.read_config(HF / name)).items():
    whole = tuple(slice(0, tensor.sizes[axis]) for axis in tensor.ours_axes)
    all_of_it = names.to_ours(original[key], tensor, whole)
    np.testing.assert_array_equal(names.to_theirs(all_of_it, tensor), original[key])
    for axis, cut in enumerate(whole):
      half = (*whole[:axis], slice(cut.stop // 2, cut.stop), *whole[axis + 1 :])
      part = names.to_ours(original[key][names.slices_of(tensor, half)], tensor, half)
      np.testing.assert_array_equal(part, all_of_it[half], err_msg=f"{key} axis {axis}")


PUBLISHED_LLAMA = {  # of meta-llama/Llama-3.1-8B, in the form of transformers 4
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "vocab_size": 128256,
}
PUBLISHED_QWEN2 = {  # of Qwen/Qwen2.5-14B
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "hidden_size": 5120,
  "intermediate_size": 13824,
  "max_position_embeddings": 131072,
  "max_window_layers": 48,
  "model_type": "qwen2",
  "num_attention_heads": 40,
  "num_hidden_layers": 48,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_theta": 1000000.0,
  "sliding_window": 131072,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "vocab_size": 152064,
}
PUBLISHED_QWEN3 = {  # of Qwen/Qwen3-4B
  "attention_bias": False,
  "attention_dropout": 0,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 2560,
  "intermediate_size": 9728,
  "max_position_embeddings": 40960,
  "max_window_layers": 36,
  "model_type": "qwen3",
  "num_attention_heads": 32,
  "num_hidden_layers": 36,
  "num_key_value_heads": 8,
  "rms_norm_eps": 0.000001,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}


def test_published_configs_are_those_of_the_zoo(tmp_path):
  published = {
    "llama3.1-8b": PUBLISHED_LLAMA,
    "qwen2.5-14b": PUBLISHED_QWEN2,
    "qwen3-4b": PUBLISHED_QWEN3,
  }
  for name, raw in published.items():
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert hf.read_config(tmp_path) == zoo.ZOO[name]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_zoo(tmp_path, name):
  counts = json.loads((HF / "parameter_counts.json").read_text())
  c = zoo.ZOO[name]
  assert weights.count(decoder.table(c)) == counts[name]
  (tmp_path / "config.json").write_text(json.dumps(hf_config.write_config(c, {})))
  assert hf.read_config(tmp_path) == c


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_export(tmp_path, name):
  """Set PT_JAX_ORACLE_PYTHON to the interpreter of the oracle environment."""
  python = os.environ.get("PT_JAX_ORACLE_PYTHON")
  if not python:
    pytest.skip("PT_JAX_ORACLE_PYTHON does not name an interpreter with transformers")
  hf.save(tmp_path / "out", load(HF / name), hf.read_config(HF / name), max_shard_bytes=60_000)
  script = [python, ORACLES / "check_hf_export.py", HF / name, tmp_path / "out"]
  done = subprocess.run(script, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  assert json.loads(done.stdout)["largest_logit_difference"] == 0.0
