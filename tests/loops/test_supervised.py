"""The supervised loop on a byte model of one layer: it learns, resumes exactly, stops in time."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pt_jax import metrics, sharding
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.sources import MemorySource
from pt_jax.experiment import EarlyStop
from pt_jax.loops import pipeline, supervised
from pt_jax.loops import run as run_folder
from pt_jax.loops.batches import data_host
from pt_jax.loops.diagnostics import SAMPLE_METRICS
from pt_jax.models import decoder
from tests.loops import tiny
from tests.loops.runs import Interrupted, bits, interrupted_at, logged, run


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Reports have tests of their own; drawing one takes longer than these runs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted."""
  return run(tmp_path_factory.mktemp("whole"), tiny.experiment())


def test_it_learns(whole):
  rows = metrics.read_jsonl(whole.folder / "metrics.jsonl")
  steps = [row for row in rows if "loss" in row]
  held_out = [row for row in rows if "eval/nats_per_token" in row]
  assert [row["step"] for row in steps] == [*range(1, 13)]
  assert [row["step"] for row in held_out] == [0, 6, 12]
  uniform = math.log(272)
  assert abs(held_out[0]["eval/nats_per_token"] - uniform) < 1.5
  assert held_out[-1]["eval/nats_per_token"] < 0.5 * held_out[0]["eval/nats_per_token"]
  assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
  assert whole.results["sft"] == {
    "steps": 12.0,
    **{k: v for k, v in held_out[-1].items() if k.startswith("eval/")},
  }


def test_what_is_logged_has_the_names_that_early_stops_may_watch(whole):
  rows = metrics.read_jsonl(whole.folder / "metrics.jsonl")
  places = {"stage", "step"}
  found = {frozenset(row.keys() - places) for row in rows}
  plain = tiny.stage().objective
  names = (supervised.step_metrics(plain), supervised.evaluation_metrics(plain))
  expected = (*names, SAMPLE_METRICS)
  assert found == {frozenset(names) for names in expected}


def test_perplexity_is_the_exponential_of_the_nats(whole):
  for row in metrics.read_jsonl(whole.folder / "metrics.jsonl"):
    for kind in ("loss", "eval"):
      if f"{kind}/perplexity" in row:
        assert row[f"{kind}/perplexity"] == pytest.approx(math.exp(row[f"{kind}/nats_per_token"]))


def test_the_held_out_loss_is_the_mean_over_all_held_out_tokens(whole, one_device):
  """By NumPy from the logits of each row alone: no packing, no batches, no chunks."""
  params = jax.tree.map(np.asarray, whole.params)
  forward = jax.jit(functools.partial(decoder.forward, c=tiny.MODEL))
  nats, right, entropy, count = 0.0, 0, 0.0, 0
  for row in tiny.words(20, 2):
    tokens, mask, _ = tiny.encode(row)
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    segments = np.where(np.arange(32) < len(tokens), 0, -1)[None]
    hidden = forward(params, tokens=padded, positions=np.arange(32)[None], segment_ids=segments)
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["unembed"], np.float64).T
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for t in np.flatnonzero(mask):
      nats -= logprobs[t - 1, tokens[t]]
      right += logprobs[t - 1].argmax() == tokens[t]
      entropy -= np.sum(np.exp(logprobs[t - 1]) * logprobs[t - 1])
      count += 1
  found = whole.results["sft"]
  assert found["eval/nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
  assert found["eval/entropy"] == pytest.approx(entropy / count, rel=1e-5)
  assert found["eval/accuracy"] == pytest.approx(right / count, rel=1e-5)


def test_samples_are_written_with_their_prompts(whole):
  rows = metrics.read_jsonl(whole.folder / "samples.jsonl")
  assert [(row["step"], row["prompt"]) for row in rows] == [
    (step, prompt) for step in (6, 12) for prompt in ("ab>", "abc>", "dcba>", "a>")
  ]
  for row in rows:
    assert (row["stop"] == "token") == row["completion"].endswith("<|endoftext|>")


def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, monkeypatch):
  # Checkpoints are at 4, 8 and 12: the crashes come before the first, right behind one, after some
  # steps that are lost, and in the step before the last.
  for step in (3, 5, 3, 4):
    with monkeypatch.context() as patch:
      interrupted_at(step, patch)
      with pytest.raises(Interrupted):
        run(tmp_path, tiny.experiment())
  resumed = run(tmp_path, tiny.experiment())
  assert bits(resumed.params) == bits(whole.params)
  assert logged(resumed.folder) == logged(whole.folder)
  assert resumed.results == whole.results
  name = "samples.jsonl"
  assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_another_seed_is_another_run(whole, tmp_path):
  other = run(tmp_path, tiny.experiment(seed=1))
  assert bits(other.params) != bits(whole.params)
  assert logged(other.folder) != logged(whole.folder)


def test_early_stop_ends_the_stage_and_a_resume_leaves_it_ended(tmp_path, monkeypatch):
  rule = EarlyStop("loss/entropy", below=100.0, patience=3)  # always out of bounds
  experiment = tiny.experiment(tiny.stage(stop=(rule,)))
  with monkeypatch.context() as patch:  # dies between the last checkpoint and the end of the stage
    patch.setattr(run_folder.Stage, "finish", die)
    with pytest.raises(Interrupted):
      run(tmp_path, experiment)
  stopped = run(tmp_path, experiment)
  # Seen three times after step 3, whose metrics were fetched when step 4 was under way.
  assert stopped.results["sft"]["steps"] == 4
  rows = metrics.read_jsonl(stopped.folder / "metrics.jsonl")
  assert max(row["step"] for row in rows) == 4
  assert rows[-1]["step"] == 4 and "samples/length" in rows[-1]
  assert [row["step"] for row in rows if "eval/nats_per_token" in row] == [0, 4]


def die(*_):
  raise Interrupted


def poisoned(row, after):
  """The loss of words from number `after` on is NaN."""
  tokens, mask, _ = tiny.encode(row)
  return Example(tokens, mask * (np.nan if row["number"] >= after else 1))


def poisoned_data(tokenizer, *, after):
  rows = [{**row, "number": i} for i, row in enumerate(tiny.words(200, 1))]
  train = Mixture({"words": MemorySource(rows)}, seed=None)
  held_out = MemorySource([row | {"number": 0} for row in tiny.words(20, 2)])
  encode = functools.partial(poisoned, after=after)
  return dataclasses.replace(tiny.data(tokenizer), train=train, held_out=held_out, encode=encode)


def test_a_loss_that_is_nan_stops_before_the_checkpoint(tmp_path):
  stage = tiny.stage(data=functools.partial(poisoned_data, after=80), evaluate_every=0)
  with pytest.raises(
    ValueError, match=r"^stage sft: step \d+: metric .*: expected a finite number"
  ):
    run(tmp_path, tiny.experiment(stage))
  folder = tmp_path / "tiny" / "0"
  assert sorted(p.name for p in (folder / "checkpoints" / "sft").iterdir()) == ["4"]
  assert not (folder / "params").exists()
  assert all(math.isfinite(row["loss"]) for row in metrics.read_jsonl(folder / "metrics.jsonl"))


def mesh_of(shape, processes):
  """What `data_host` reads of a mesh whose devices belong to these processes, in order."""
  devices = np.array([SimpleNamespace(process_index=p) for p in processes]).reshape(shape)
  names = sharding.MESH_AXES
  return SimpleNamespace(devices=devices, axis_names=names, shape=dict(zip(names, shape)))


@pytest.mark.parametrize(
  "shape, processes, expected",
  [
    ((4, 1, 1, 1), (1, 1, 0, 0), (1, 2)),  # process 0 (this one) has the second half
    ((2, 1, 1, 2), (0, 0, 1, 1), (0, 2)),  # tensor parallel within a host
    ((1, 1, 1, 4), (0, 0, 1, 1), (0, 1)),  # tensor parallel over hosts: each brings every row
    ((2, 1, 2, 1), (1, 0, 2, 3), (1, 4)),  # the batch is split over data and expert
    ((2, 2, 1, 1), (0, 1, 2, 3), (0, 2)),  # the sequence over hosts
  ],
)
def test_each_host_brings_the_rows_of_its_devices(shape, processes, expected):
  host = data_host(mesh_of(shape, processes))
  assert (host.index, host.count) == expected


def test_rows_of_a_host_must_be_a_block():
  with pytest.raises(ValueError, match="not a block"):
    data_host(mesh_of((4, 1, 1, 1), (0, 1, 0, 1)))
