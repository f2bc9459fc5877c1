"""Every experiment runs: two steps of each stage, on a width that costs nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from experiments import grpo_arithmetic, grpo_gsm8k, online_dpo_arithmetic, quickstart
from pt_jax import recipes, sharding
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Evaluate, Online, OnlinePreference
from pt_jax.loops.pipeline import run_experiment
from pt_jax.models import decoder, hf
from pt_jax.models.config import ModelConfig

TOKENIZER = Path(__file__).parent / "oracles" / "chat" / "byte_level"
QUESTIONS = [{"question": f"What is {i} plus {i}?", "answer": f"#### {2 * i}"} for i in range(12)]


def shortened(experiment):
  """With evaluations and periodic samples of 4 problems."""

  def shorter(stage):
    if isinstance(stage, Online | OnlinePreference):
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


def test_online_preference_on_sums(tmp_path):
  """KTO, whose rows hold the most; and what its relatives change."""
  config = online_dpo_arithmetic.config(algorithm="kto", sft_steps=2, steps=2, prompts=2)
  small = recipes.small_decoder(config.model.vocab_size, width=64, layers=1, max_length=256)
  config = shortened(dataclasses.replace(config, model=small))
  finished = run_experiment(config, runs=tmp_path, id="0", quiet=True)
  assert {"cold_start", "preference", "sft"} == set(finished.results)
  assert 0 <= finished.results["preference"]["eval/pass@1"] <= 1
  ablations = (getattr(online_dpo_arithmetic, f"online_{name}")() for name in ("dpo", "ipo", "kto"))
  last = [ablation.stages[-1] for ablation in ablations]
  assert [stage.objective.loss for stage in last] == ["sigmoid", "ipo", "kto"]
  assert (
    dataclasses.replace(last[1], problems=last[0].problems, objective=last[0].objective) == last[0]
  )
  with pytest.raises(ValueError, match="algorithm: expected one of dpo, ipo, kto, found 'x'"):
    online_dpo_arithmetic.config(algorithm="x")  # type: ignore[arg-type]


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
