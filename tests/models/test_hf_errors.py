"""Bad checkpoints stop with one line that names the file and the tensor or key."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pt_jax import sharding
from pt_jax.models import hf

HF = pathlib.Path(__file__).parent.parent / "oracles" / "hf"
Q = "model.layers.1.self_attn.q_proj.weight"


def load(folder):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return hf.load(folder, hf.read_config(folder), mesh, sharding.USE)


def copy(tmp_path, name):
  folder = tmp_path / name
  shutil.copytree(HF / name, folder)
  return folder


def edit_tensors(folder, edit, file="model.safetensors"):
  tensors = load_file(folder / file)
  edit(tensors)
  save_file(tensors, folder / file)


def fails(call, *fragments):
  """The call raises ValueError with one line that has all the fragments."""
  with pytest.raises(ValueError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  for fragment in fragments:
    assert str(fragment) in message, message


def test_unknown_tensor(tmp_path):
  folder = copy(tmp_path, "qwen2")
  edit_tensors(folder, lambda t: t.update({"model.rotary_emb.inv_freq": np.ones(4, np.float32)}))
  fails(lambda: load(folder), folder, "'model.rotary_emb.inv_freq' has no place in the model")


def test_unknown_layer_of_another_config(tmp_path):
  folder = copy(tmp_path, "llama3")
  raw = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
  (folder / "config.json").write_text(json.dumps(raw))
  fails(lambda: load(folder), "'model.layers.2.", "(and 8 more) has no place in the model")


def test_missing_tensor(tmp_path):
  folder = copy(tmp_path, "qwen2")
  edit_tensors(folder, lambda t: t.pop(Q))
  fails(lambda: load(folder), folder, f"tensor {Q!r} is missing")


def test_misshapen_tensor(tmp_path):
  folder = copy(tmp_path, "llama3")
  edit_tensors(folder, lambda t: t.update({Q: t[Q][:-1].copy()}))
  fails(lambda: load(folder), "model.safetensors", repr(Q), "(47, 48), expected (48, 48)")


def test_unsupported_dtype(tmp_path):
  folder = copy(tmp_path, "llama3")
  edit_tensors(folder, lambda t: t.update({Q: t[Q].astype(np.int8)}))
  fails(lambda: load(folder), "model.safetensors", repr(Q), "is I8, expected one of F32, F16, BF16")


def test_tensor_in_two_files(tmp_path):
  folder = copy(tmp_path, "qwen3")
  first, second = sorted(folder.glob("*.safetensors"))[:2]
  name, value = next(iter(load_file(first).items()))
  edit_tensors(folder, lambda t: t.update({name: value}), second.name)
  fails(lambda: load(folder), repr(name), first.name, second.name)


def test_index_and_files_disagree(tmp_path):
  folder = copy(tmp_path, "qwen3")
  index = folder / "model.safetensors.index.json"
  raw = json.loads(index.read_text())
  files = sorted(set(raw["weight_map"].values()))
  elsewhere = next(file for file in files if file != raw["weight_map"][Q])
  wrong = raw | {"weight_map": raw["weight_map"] | {Q: elsewhere}}
  index.write_text(json.dumps(wrong))
  fails(lambda: load(folder), index, f"places tensor {Q!r} in {elsewhere}, which lacks it")
  index.write_text(json.dumps({"metadata": {}}))
  fails(lambda: load(folder), index, "weight_map")
  index.write_text("{")
  fails(lambda: load(folder), index, "not JSON")
  index.write_text(json.dumps(raw))
  (folder / files[-1]).unlink()
  fails(lambda: load(folder), index, f"names {files[-1]}, which does not exist")


def test_neither_or_both_kinds_of_files(tmp_path):
  folder = copy(tmp_path, "qwen3")
  shutil.copy(HF / "qwen2" / "model.safetensors", folder)
  fails(lambda: load(folder), folder, "model.safetensors.index.json, found both")
  for file in folder.glob("model*"):
    file.unlink()
  fails(lambda: load(folder), folder, "model.safetensors.index.json, found neither")


def test_truncated_file(tmp_path):
  folder = copy(tmp_path, "qwen2")
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  fails(lambda: load(folder), file, "not a whole safetensors file")


def test_no_config(tmp_path):
  fails(lambda: hf.read_config(tmp_path), tmp_path / "config.json", "no such file")
  (tmp_path / "config.json").write_text("{")
  fails(lambda: hf.read_config(tmp_path), tmp_path / "config.json", "not JSON")


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.mark.parametrize(
  ("name", "entries", "message"),
  [
    (
      "qwen3",
      {"model_type": "qwen3_moe"},
      "expected one of llama, qwen2, qwen3, found 'qwen3_moe'",
    ),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window: only False is implemented"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
    ("llama3", {"attention_bias": True}, "attention_bias: only False is implemented, found True"),
    ("llama3", {"mlp_bias": True}, "mlp_bias: only False is implemented, found True"),
    ("llama3", {"hidden_act": "gelu"}, "hidden_act: only 'silu' is implemented, found 'gelu'"),
    ("qwen2", {"attention_dropout": 0.1}, "attention_dropout: only 0 is implemented, found 0.1"),
    ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config: only None"),
    ("qwen2", {"rope_parameters": YARN}, "rope_type: only 'default' and 'llama3' are"),
    ("qwen2", {"rope_parameters": NESTED}, "RoPE parameter 'full_attention' is not implemented"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3"}}, "factor: expected a positive float"),
    ("qwen2", {"hidden_size": "48"}, "hidden_size: expected a positive int, found '48'"),
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads: expected a positive int"),
    ("qwen2", {"num_key_value_heads": 4}, "heads (6) must be a multiple of kv_heads (4)"),
    ("qwen2", {"rms_norm_eps": 0}, "rms_norm_eps: expected a positive float, found 0"),
  ],
)
def test_config_that_the_decoder_does_not_implement(tmp_path, name, entries, message):
  raw = json.loads((HF / name / "config.json").read_text()) | entries
  (tmp_path / "config.json").write_text(json.dumps(raw))
  fails(lambda: hf.read_config(tmp_path), tmp_path / "config.json", message)


def test_export_overwrites_nothing(tmp_path):
  folder = copy(tmp_path, "qwen2")
  c, params = hf.read_config(folder), load(folder)
  before = {file.name: file.read_bytes() for file in folder.iterdir()}
  fails(lambda: hf.save(folder, params, c), folder, "already exists")
  assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_export_of_parameters_that_are_not_the_models(tmp_path):
  folder, out = HF / "qwen2", tmp_path / "out"
  c, params = hf.read_config(folder), load(folder)
  untied = dataclasses.replace(c, tied_embeddings=False)
  fails(lambda: hf.save(out, params, untied), "parameter unembed is missing")
  fails(lambda: hf.save(out, params | {"value_head": params["embed"]}, c), "parameter value_head")
  wider = dataclasses.replace(c, vocab_size=97)
  fails(lambda: hf.save(out, params, wider), "embed has shape (96, 48), expected (97, 48)")
  both = dataclasses.replace(c, qk_norm=True)
  fails(lambda: hf.save(out, params, both), "no HF family has both qk_norm and attention_bias")
  assert not list(tmp_path.iterdir())
