"""Bad input: one line that names what is wrong, before anything is compiled or written."""

import dataclasses
import functools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pt_jax import recipes, sharding
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import EarlyStop, MeshShape, SupervisedData
from pt_jax.loops import checks
from pt_jax.models import decoder, hf
from pt_jax.steps.optimizer import Group
from tests.loops import tiny
from tests.loops.runs import run, snapshot


def chats(tmp_path, *lines, **changes):
  """A stage on a JSONL file of these lines, behind one good one unless `only` says otherwise."""
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(line + "\n" for line in lines))
  options = {
    "train": str(path),
    "messages": messages,
    "fields": ("question", "answer"),
    "template": "plain",
    "held_out": 1,
    "held_out_path": str(path),
  }
  return tiny.stage(
    sample_every=0, data=functools.partial(recipes.conversations, **options | changes)
  )


def messages(row):
  return [
    {"role": "user", "content": row["question"]},
    {"role": "assistant", "content": row["answer"]},
  ]


def row(question="2 + 2", answer="4"):
  return json.dumps({"question": question, "answer": answer})


def nothing_to_train(row):
  tokens, mask, _ = tiny.encode(row)
  return Example(tokens, 0 * mask)


def masked_out(tokenizer):
  return dataclasses.replace(tiny.data(tokenizer), encode=nothing_to_train)


def without_prompts(tokenizer):
  return dataclasses.replace(tiny.data(tokenizer), prompts=())


def long_prompt(tokenizer):
  return dataclasses.replace(tiny.data(tokenizer), prompts=[[1] * 60])


def checkpoint(tmp_path, change):
  """A checkpoint in HF format of the tiny model, after `change(tensors)` of its file."""
  import safetensors.numpy

  folder = tmp_path / "model"
  shapes = decoder.table(tiny.MODEL)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    zeros = lambda r: jax.numpy.zeros(r.shape)
    hf.save(folder, sharding_free(shapes, zeros), tiny.MODEL)
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return tiny.experiment(model=None, checkpoint=str(folder))


def sharding_free(table, make):
  from pt_jax import weights

  return weights.map_table(make, table)


NORM = "model.norm.weight"
AdamW = functools.partial(dataclasses.replace, tiny.ADAM)

CASES = {
  "config: vocabulary smaller than the tokenizer's": (
    lambda _: tiny.experiment(model=dataclasses.replace(tiny.MODEL, vocab_size=256)),
    r"model: vocab_size: expected at least 272 \(tokenizer bytes\), found 256",
  ),
  "config: row longer than the model": (
    lambda _: tiny.experiment(tiny.stage(layout=Layout(4, 128))),
    "stage sft: row_length: expected at most the model's max_length 64, found 128",
  ),
  "config: microbatches": (
    lambda _: tiny.experiment(tiny.stage(microbatches=3)),
    r"stage sft: microbatches \(3\) must divide batch_size \(4\)",
  ),
  "config: early stop on what is never logged": (
    lambda _: tiny.experiment(tiny.stage(stop=(EarlyStop("entropy", below=1.0),))),
    r"stage sft: early stop: expected a metric among .*loss/entropy.*, found 'entropy'",
  ),
  "config: parameter group without parameters": (
    lambda _: tiny.experiment(tiny.stage(optimizer=AdamW(groups=(Group("lora"),)))),
    "stage sft: optimizer: group pattern 'lora' matches no parameter",
  ),
  "config: ZeRO stage": (
    lambda _: tiny.experiment(zero=4),
    "zero stage: expected 1, 2 or 3, found 4",
  ),
  "config: two stages of one name": (
    lambda _: tiny.experiment(tiny.stage(), tiny.stage()),
    "experiment tiny: stages need distinct names",
  ),
  "config: neither model nor checkpoint": (
    lambda _: tiny.experiment(model=None),
    "experiment tiny: give model or checkpoint",
  ),
  "config: samples without prompts": (
    lambda _: tiny.experiment(tiny.stage(data=without_prompts)),
    "stage sft: sample_every: expected data with prompts, found none",
  ),
  "config: prompt longer than the model": (
    lambda _: tiny.experiment(tiny.stage(data=long_prompt)),
    r"stage sft: prompt 0: expected 1 to 56 tokens \(8 of 64 are for the completion\), found 60",
  ),
  "mesh: more devices than there are": (
    lambda _: tiny.experiment(mesh=MeshShape(data=1, tensor=3)),
    r"mesh 1x1x1x3 \(data, context, expert, tensor\) needs 3 devices, found \d",
  ),
  "tokenizer: no such file": (
    lambda _: tiny.experiment(tokenizer=functools.partial(load_tokenizer, "nowhere.json")),
    "tokenizer nowhere.json: no such file or folder",
  ),
  "tokenizer: another kind of file": (
    lambda p: tiny.experiment(
      chats(p, row()), tokenizer=functools.partial(load_tokenizer, p / "rows.jsonl")
    ),
    r"tokenizer .*rows.jsonl: expected a .json or .model file",
  ),
  "path: no such data": (
    lambda p: tiny.experiment(chats(p, row(), train=str(p / "nowhere.jsonl"))),
    r"stage sft: .*nowhere.jsonl",
  ),
  "path: no such checkpoint": (
    lambda _: tiny.experiment(model=None, checkpoint="nowhere"),
    r"nowhere.*config.json",
  ),
  "data row: not JSON": (
    lambda p: tiny.experiment(chats(p, "{question: 2}", row())),
    r"stage sft: .*rows.jsonl:1: ",
  ),
  "data row: a field is missing": (
    lambda p: tiny.experiment(chats(p, '{"question": "2 + 2"}')),
    r"stage sft: .*rows.jsonl:1: .*'answer'",
  ),
  "data row: a field of another type": (
    lambda p: tiny.experiment(chats(p, '{"question": "2 + 2", "answer": 4}')),
    r"stage sft: .*rows.jsonl:1: .*content",
  ),
  "data row: longer than the window": (
    lambda p: tiny.experiment(chats(p, row(answer="4" * 40))),
    r"stage sft: .*rows.jsonl:1 has 47 tokens, a row holds 32",
  ),
  "data row: nothing to train on": (
    lambda _: tiny.experiment(tiny.stage(data=masked_out)),
    r"stage sft: train\[0\]: no token to train on",
  ),
  "template: unknown": (
    lambda p: tiny.experiment(chats(p, row(), template="chatlm")),
    "stage sft: no chat template 'chatlm'",
  ),
  "template: writes a token that the tokenizer lacks": (
    lambda p: tiny.experiment(chats(p, row(), template="llama3")),
    r"stage sft: .*rows.jsonl:1: .*bos_token, which the tokenizer lacks",
  ),
  "template: drops what the assistant wrote": (
    lambda p: tiny.experiment(chats(p, row(), template="{{ messages[0].content }}\n")),
    r"stage sft: .*rows.jsonl:1: ",
  ),
  "checkpoint: a tensor that the model has no place for": (
    lambda p: checkpoint(p, lambda t: t.update(extra=np.zeros(3, np.float32))),
    r"model: tensor 'extra' has no place in the model",
  ),
  "checkpoint: a tensor is missing": (
    lambda p: checkpoint(p, lambda t: t.pop(NORM)),
    rf"model: tensor '{NORM}' is missing",
  ),
  "checkpoint: a tensor of another shape": (
    lambda p: checkpoint(p, lambda t: t.update({NORM: np.zeros(17, np.float32)})),
    rf"tensor '{NORM}' has shape \(17,\), expected \(16,\)",
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_before_anything_is_compiled_or_written(case, tmp_path, monkeypatch):
  make, expected = CASES[case]
  compiled = []
  monkeypatch.setattr(checks.supervised, "compiled_step", lambda *_: compiled.append(1))
  with pytest.raises(ValueError) as caught:
    run(tmp_path / "runs", make(tmp_path))
  message = str(caught.value)
  assert re.search(expected, message), message
  assert "\n" not in message
  assert not (tmp_path / "runs").exists()
  assert not compiled


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The folder of runs with one that is finished."""
  folder = tmp_path_factory.mktemp("runs")
  run(folder, tiny.experiment(tiny.stage(sample_every=0)))
  return folder


def test_a_folder_of_another_config_is_not_touched(finished, tmp_path):
  shutil.copytree(finished / "tiny", tmp_path / "tiny")
  before = snapshot(tmp_path)
  changed = tiny.stage(sample_every=0, optimizer=AdamW(learning_rate=0.5))
  expected = "stages.0.optimizer.learning_rate: recorded 0.02, given 0.5; another run needs another"
  with pytest.raises(ValueError, match=expected):
    run(tmp_path, tiny.experiment(changed))
  assert snapshot(tmp_path) == before


def test_a_checkpoint_that_does_not_fit_is_not_touched(finished, tmp_path):
  """Somebody edited the model's width in config.json and in the experiment, and forgot the rest."""
  shutil.copytree(finished / "tiny", tmp_path / "tiny")
  shutil.rmtree(tmp_path / "tiny" / "0" / "params")
  config = tmp_path / "tiny" / "0" / "config.json"
  config.write_text(config.read_text().replace('"hidden": 32', '"hidden": 48'))
  checkpoints = tmp_path / "tiny" / "0" / "checkpoints"
  before = snapshot(checkpoints)
  wider = dataclasses.replace(tiny.MODEL, hidden=48)
  with pytest.raises(
    ValueError, match=r"expected float32\[1, .*48.*\], found float32\[1, .*32.*\]"
  ):
    run(tmp_path, tiny.experiment(tiny.stage(sample_every=0), model=wider))
  assert snapshot(checkpoints) == before


def bad_from(number, row):
  if row["number"] >= number:
    raise KeyError("answer")
  return tiny.encode(row)


def bad_later(tokenizer):
  rows = [{**r, "number": i} for i, r in enumerate(tiny.words(200, 1))]
  train = Mixture({"words": MemorySource(rows, "train")}, seed=None)
  held_out = MemorySource([{"word": "ab", "number": 0}])
  return SupervisedData(train, held_out, functools.partial(bad_from, 100))


def test_a_bad_row_further_on_stops_the_run_and_keeps_its_checkpoint(tmp_path):
  stage = tiny.stage(data=bad_later, sample_every=0)
  with pytest.raises(ValueError, match=r"^stage sft: train\[100\]: KeyError: 'answer'$"):
    run(tmp_path, tiny.experiment(stage))
  saved = sorted(p.name for p in (tmp_path / "tiny" / "0" / "checkpoints" / "sft").iterdir())
  assert saved == ["4"]
  assert not (tmp_path / "tiny" / "0" / "params").exists()


def mesh(**sizes):
  """A mesh that is only asked for its shape."""
  return SimpleNamespace(shape={name: sizes.get(name, 1) for name in sharding.MESH_AXES})


@pytest.mark.parametrize(
  "sizes, expected",
  [
    (
      {"tensor": 2},
      "parameter blocks.k: axis 'kv_heads' of size 1 does not divide into the 2 parts",
    ),
    ({"data": 32}, "parameter .*: axis 'embed' of size 16 does not divide into the 32 parts"),
  ],
)
def test_a_mesh_that_does_not_divide_the_model(sizes, expected):
  table, layout = decoder.table(tiny.MODEL), sharding.zero(1)
  with pytest.raises(ValueError, match=expected):
    checks.check_model(tiny.MODEL, table, layout, load_tokenizer("bytes"), mesh(**sizes))


@pytest.mark.parametrize(
  "sizes, expected",
  [
    (
      {"data": 8},
      "stage sft: a microbatch: axis 'batch' of size 4 does not divide into the 8 parts",
    ),
    ({"context": 3}, "stage sft: a microbatch: axis 'seq' of size 32 does not divide into the 3"),
  ],
)
def test_a_mesh_that_does_not_divide_the_batch(sizes, expected):
  table = decoder.table(tiny.MODEL)
  with pytest.raises(ValueError, match=expected):
    checks.check_stage(tiny.stage(), tiny.MODEL, table, load_tokenizer("bytes"), mesh(**sizes))
