"""Every experiment runs: two steps of each stage, on a width that costs nothing."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import jax
import pytest

from experiments import grpo_arithmetic, grpo_gsm8k, quickstart, rm_hh
from pt_jax import sharding
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Evaluate, Online
from pt_jax.loops.pipeline import run_experiment
from pt_jax.models import decoder, hf
from pt_jax.models.config import ModelConfig

TOKENIZER = Path(__file__).parent / "oracles" / "chat" / "byte_level"
QUESTIONS = [{"question": f"What is {i} plus {i}?", "answer": f"#### {2 * i}"} for i in range(12)]


def shortened(experiment):
  """With evaluations and periodic samples of 4 problems."""

  def shorter(stage):
    if isinstance(stage, Online):
      return dataclasses.replace(stage, evaluate_problems=4, slots=4)
    return dataclasses.replace(stage, count=4, slots=4) if isinstance(stage, Evaluate) else stage

  return dataclasses.replace(experiment, stages=tuple(map(shorter, experiment.stages)))


def test_quickstart(tmp_path):
  config = quickstart.config(sft_steps=2, grpo_steps=2, prompts=2, group_size=2, width=64, layers=1)
  finished = run_experiment(shortened(config), runs=tmp_path, id="0", quiet=True)
  assert {"cold_start", "grpo", "sft"} == set(finished.results)
  assert 0 <= finished.results["grpo"]["eval/pass@1"] <= 1
  assert (finished.folder / "report.md").exists()


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo"])
def test_ablations_differ_in_the_objective_alone(algorithm):
  ablation = getattr(grpo_arithmetic, algorithm)()
  base = grpo_arithmetic.config(algorithm=algorithm)
  assert ablation.name == f"grpo_arithmetic_{algorithm}"
  online = [stage for stage in base.stages if isinstance(stage, Online)]
  others = [s for s in grpo_arithmetic.config(algorithm="grpo").stages if isinstance(s, Online)]
  assert [ablation.stages[-1].objective] == [stage.objective for stage in online]
  for stage, other in zip(online, others):
    assert (stage.objective == other.objective) == (algorithm == "grpo")
    assert stage.optimizer == other.optimizer and stage.sampling == other.sampling


def test_an_unknown_algorithm_is_named():
  with pytest.raises(ValueError, match="algorithm: expected one of grpo, dr_grpo, dapo, found 'x'"):
    grpo_arithmetic.config(algorithm="x")  # type: ignore[arg-type]


def test_grpo_gsm8k_from_a_checkpoint(tmp_path, one_device):
  folder = tmp_path / "checkpoint"
  vocab = load_tokenizer(TOKENIZER).vocab_size
  model = ModelConfig(
    vocab_size=vocab, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=32, qk_norm=True
  )
  params = jax.jit(lambda key: decoder.init(key, model, sharding.USE))(jax.random.key(0))
  hf.save(folder, params, model)
  for file in TOKENIZER.iterdir():
    shutil.copy(file, folder)
  data = tmp_path / "questions.jsonl"
  data.write_text("\n".join(map(json.dumps, QUESTIONS)))
  held_out = tmp_path / "held_out.jsonl"
  held_out.write_text("\n".join(map(json.dumps, QUESTIONS[:4])))
  experiment = grpo_gsm8k.config(
    checkpoint=str(folder),
    train=str(data),
    test=str(held_out),
    template="chatml",
    steps=2,
    prompts=2,
    group_size=2,
    max_tokens=8,
    row_length=128,
    rows=2,
    slots=4,
    held_out=4,
  )
  finished = run_experiment(experiment, runs=tmp_path, id="0", quiet=True)
  before, after = (jax.tree.leaves(tree)[0] for tree in (params, finished.params))
  assert before.shape == after.shape
  assert 0 <= finished.results["grpo"]["eval/pass@1"] <= 1


def hh_rows(count):
  """Transcripts whose chosen answers decline, some of two turns."""
  rows = []
  for i in range(count):
    start = f"\n\nHuman: question {i}?\n\nAssistant: answer.\n\nHuman: more" * (i % 2)
    start = start or f"\n\nHuman: question {i}"
    rows.append({side: f"{start}\n\nAssistant: {text} {i}" for side, text in HH.items()})
  return [*rows, {"chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"]}]


HH = {"chosen": "I am sorry, no.", "rejected": "Yes, you could do that in many ways."}


def test_rm_hh(tmp_path):
  file = tmp_path / "rows.jsonl.gz"
  rows = hh_rows(60)
  file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
  config = rm_hh.config(
    path=str(file), sft_steps=2, steps=2, batch_size=2, row_length=256, vocab_size=300, width=64
  )
  results = run_experiment(config, runs=tmp_path, id="0", quiet=True).results
  assert 0 <= results["reward"]["eval/accuracy_low"] <= results["reward"]["eval/accuracy_high"] <= 1
  parts = [rm_hh.rows_of(str(file), part) for part in ("train", "validation", "held_out")]
  assert sum(map(len, parts)) == 60, "the last row is no pair"
  opening = lambda row: rm_hh.messages(row["chosen"])[0]["content"]
  seen = [{opening(part[i]) for i in range(len(part))} for part in parts]
  assert not seen[0] & seen[2] and not seen[1] & seen[2] and all(seen)
  assert results["reward"]["eval/slice/chosen_shorter/count"] == len(parts[2])


def test_ablations_of_rm_hh_differ_in_what_they_say(tmp_path, monkeypatch):
  file = tmp_path / "rows.jsonl.gz"
  file.write_bytes(gzip.compress("\n".join(map(json.dumps, hh_rows(60))).encode()))
  monkeypatch.setattr(
    rm_hh.config, "__kwdefaults__", {**rm_hh.config.__kwdefaults__, "path": str(file)}
  )
  base, single, centered = rm_hh.config(), rm_hh.single(), rm_hh.centered()
  reward = lambda experiment: experiment.stages[-1]
  assert (reward(single).members, reward(single).objective.bootstrap) == (1, False)
  assert reward(centered).objective == dataclasses.replace(reward(base).objective, center=0.01)
  assert {e.name for e in (base, single, centered)} == {"rm_hh", "rm_hh_single", "rm_hh_centered"}
