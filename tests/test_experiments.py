"""Every experiment runs: two steps of each stage, on a width that costs nothing."""

import dataclasses
import gzip
import json
import shutil
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import (
  arithmetic,
  dpo_instructions,
  grpo_arithmetic,
  grpo_gsm8k,
  gspo_arithmetic,
  online_dpo_arithmetic,
  ppo_arithmetic,
  quickstart,
  reinforce_arithmetic,
  rloo_arithmetic,
  rm_hh,
  sft_instructions,
  vapo_arithmetic,
)
from pt_jax import recipes, sharding
from pt_jax.data.tokenizers import load_tokenizer
from pt_jax.experiment import Evaluate, Online, OnlinePreference, ValueHead
from pt_jax.loops.pipeline import run_experiment
from pt_jax.loops.record import plain
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


def test_supervised_ablations_differ_in_the_objective_alone():
  together = sft_instructions.objectives()
  first, *stages = together.stages
  assert len({stage.objective for stage in stages}) == len(stages) == 5
  for name in ("psft", "psft_clipped", "dft", "label_smoothed"):
    alone = getattr(sft_instructions, name)()
    assert plain(alone.stages[0]) == plain(first) and len(alone.stages) == 2
    assert plain(alone.stages[1]) == plain(next(s for s in stages if s.name == name))
  nll = stages[0]
  for stage in stages:
    same = dataclasses.replace(stage, name=nll.name, objective=nll.objective)
    assert plain(same) == plain(nll) and stage.start == "sft"


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


POLICY = {  # what each experiment of one algorithm takes from `arithmetic`
  "ppo_arithmetic": (ppo_arithmetic.config, "ppo"),
  "vapo_arithmetic": (vapo_arithmetic.config, "vapo"),
  "gspo_arithmetic": (gspo_arithmetic.config, "gspo"),
  "rloo_arithmetic": (rloo_arithmetic.config, "rloo"),
  "rloo_arithmetic_remax": (rloo_arithmetic.remax, "remax"),
  "reinforce_arithmetic": (reinforce_arithmetic.config, "reinforce_plus_plus"),
  "reinforce_arithmetic_baseline": (
    reinforce_arithmetic.baseline,
    "reinforce_plus_plus_baseline",
  ),
}


@pytest.mark.parametrize("name", POLICY)
def test_experiments_of_one_algorithm(name):
  make, algorithm = POLICY[name]
  base = arithmetic.config(algorithm=algorithm)
  assert plain(make()) == plain(dataclasses.replace(base, name=name))
  assert base.stages[-1].objective == arithmetic.PRESETS[algorithm]()


def test_ablations_of_ppo_and_gspo():
  shared, base = ppo_arithmetic.value_head().stages[-1], ppo_arithmetic.config().stages[-1]
  assert plain(shared) == plain(dataclasses.replace(base, critic=ValueHead()))
  token, base = gspo_arithmetic.gspo_token().stages[-1], gspo_arithmetic.config().stages[-1]
  ratio = dataclasses.replace(base.objective, ratio="sequence_token")
  assert plain(token) == plain(dataclasses.replace(base, objective=ratio))


def test_ppo_from_what_another_run_left(tmp_path):
  """A cold start of two steps, then two steps of PPO from it: with and without `initial`."""
  tiny = lambda experiment: dataclasses.replace(
    shortened(experiment), model=recipes.small_decoder(272, width=64, layers=1, max_length=256)
  )
  cold = tiny(arithmetic.cold_start(sft_steps=2))
  left = run_experiment(cold, runs=tmp_path, id="0", quiet=True)
  initial = str(left.folder / "params" / "sft")
  options = {"steps": 2, "prompts": 2, "group_size": 2, "minibatches": 1, "sft_steps": 2}
  ends = []
  for start in (None, initial):
    experiment = tiny(arithmetic.config(algorithm="ppo", initial=start, **options))
    ends.append(run_experiment(experiment, runs=tmp_path, id=str(len(ends)), quiet=True))
  assert set(ends[0].results) == {"sft", "cold_start", "rl"} and set(ends[1].results) == {"rl"}
  assert ends[0].results["rl"] == ends[1].results["rl"]
  jax.tree.map(np.testing.assert_array_equal, ends[0].params, ends[1].params)


def test_a_start_that_is_not_there_is_named(tmp_path):
  experiment = arithmetic.config(algorithm="grpo", initial=str(tmp_path / "nothing"))
  with pytest.raises(FileNotFoundError, match="nothing: expected a checkpoint, found none"):
    run_experiment(experiment, runs=tmp_path / "runs", id="0", quiet=True)
  assert not (tmp_path / "runs").exists()


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
  other = dataclasses.replace(experiment, model=dataclasses.replace(model, rope_theta=5.0))
  with pytest.raises(ValueError, match=r"config.json: rope_theta: expected 5.0 .*, found 10000.0"):
    run_experiment(other, runs=tmp_path, id="1", quiet=True)
  experiment = dataclasses.replace(experiment, model=dataclasses.replace(model, remat="none"))
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


def test_ablations_of_rm_hh_differ_in_what_they_say(tmp_path):
  file = tmp_path / "rows.jsonl.gz"
  file.write_bytes(gzip.compress("\n".join(map(json.dumps, hh_rows(60))).encode()))
  made = [make(path=str(file)) for make in (rm_hh.config, rm_hh.single, rm_hh.centered)]
  base, single, centered = (experiment.stages[-1] for experiment in made)
  assert (single.members, single.objective.bootstrap) == (1, False)
  assert centered.objective == dataclasses.replace(base.objective, center=0.01)
  assert [e.name for e in made] == ["rm_hh", "rm_hh_single", "rm_hh_centered"]


@pytest.fixture
def every_loss(tmp_path):
  """Two steps of a cold start and of every preference loss, on pairs that are short."""
  rows = [
    {
      "instruction": f"Add {i}.",
      "input": "",
      "output": f"{i} it is.",
      "chosen": f"{i} it is.",
      "rejected": f"Fine, {i}.",
    }
    for i in range(12)
  ]
  path = tmp_path / "pairs.json"
  path.write_text(json.dumps(rows))
  small = {"batch_size": 2, "row_length": 128, "width": 64, "layers": 1, "held_out": 4}
  return dpo_instructions.every_loss(rows=str(path), sft_steps=2, steps=2, **small)


def test_preference_losses_of_each_kind(every_loss, tmp_path):
  """On pairs, on single completions, and without a reference; the others differ in the loss."""
  stages = [s for s in every_loss.stages if s.name in ("sft", "dpo", "kto", "orpo")]
  experiment = dataclasses.replace(every_loss, stages=tuple(stages))
  results = run_experiment(experiment, runs=tmp_path, id="0", quiet=True).results
  assert {*results} == {"sft", "dpo", "kto", "orpo"}
  changes = [results[name]["eval/margin"] for name in ("dpo", "kto", "orpo")]
  assert len({0.0, *changes}) == 4


@pytest.mark.slow
def test_every_preference_loss_runs(every_loss, tmp_path):
  results = run_experiment(every_loss, runs=tmp_path, id="0", quiet=True).results
  margins = {loss: results[loss]["eval/margin"] for loss in typing.get_args(dpo_instructions.Loss)}
  # In so few steps no pair gets beyond the limit of epsilon-DPO: until then it is DPO.
  assert results["epsilon"]["eval/beyond_limit"] == 0
  assert margins["epsilon"] == margins.pop("dpo")
  assert len(set(margins.values())) == len(margins) and 0 not in margins.values(), margins


def test_preference_ablations_differ_in_the_objective_alone(every_loss):
  losses = typing.get_args(dpo_instructions.Loss)
  base = dpo_instructions.config()
  objectives = set()
  for loss, stage in zip(losses, every_loss.stages[1:], strict=True):
    make = dpo_instructions.config if loss == "dpo" else getattr(dpo_instructions, loss)
    ablation = make()
    assert ablation.name.removeprefix("dpo_instructions").removeprefix("_") in (loss, "")
    assert plain(ablation.stages[0]) == plain(base.stages[0])
    changed = ablation.stages[1]
    assert changed.objective == stage.objective == dpo_instructions.OBJECTIVES[loss]()
    assert changed.data.keywords["unpaired"] == changed.objective.unpaired
    same = {"name": "dpo", "objective": base.stages[1].objective, "data": base.stages[1].data}
    assert plain(dataclasses.replace(changed, **same)) == plain(base.stages[1])
    objectives.add(changed.objective)
  assert len(objectives) == len(losses) == len(dpo_instructions.OBJECTIVES)
  assert dpo_instructions.config(beta=0.7).stages[1].objective.beta == 0.7
