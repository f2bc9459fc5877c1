"""Sweeps, advice and closed forms, on plans of a small SFT stage that are compiled for a v5e."""

import dataclasses

import pytest

from experiments import grpo_qwen3, sft_qwen3
from pt_jax.models.zoo import ZOO
from pt_jax.plan import estimate
from pt_jax.plan.advice import advise, changes
from pt_jax.plan.choices import Choice, applied
from pt_jax.plan.depth import Line, extrapolated
from pt_jax.plan.findings import advice_text, sweep_text
from pt_jax.plan.forecast import forecast
from pt_jax.plan.memory import TEMPORARIES
from pt_jax.plan.sweep import Sweep, candidates, sweep
from pt_jax.plan.topology import mesh_on, open_slice
from tests.plan.test_plan import TINY

pytest.importorskip("libtpu")
MODEL = dataclasses.replace(TINY, layers=8)
FIXED = Choice(mesh={"data": 4}, zero=3, microbatches=1)


@pytest.fixture(scope="module")
def experiment():
  """8 rows of 1024 tokens."""
  base = sft_qwen3.config(batch_size=8, row_length=1024)
  return dataclasses.replace(base, model=MODEL)


@pytest.fixture(scope="module")
def found(experiment) -> Sweep:
  """The best remat policy by closed forms, compiled."""
  return sweep(experiment, experiment.stages[0], open_slice("v5e:2x2"), FIXED, 1)


def test_sweep_keeps_what_is_given_and_compiles_the_first(found, experiment):
  assert found.considered == found.roomy == 6  # remat policies
  (pick,) = found.picks
  assert pick.candidate.choice.remat == "projections"  # gains more time than it moves
  assert pick.plan.choice.microbatches == 1
  assert pick.plan.fits
  text = sweep_text(found)
  assert "--mesh data=4 --zero 3 --remat none --microbatches 1" in text
  assert "train step takes 100% of it, bound by" in text


def test_candidates_divide_and_are_in_order(experiment):
  piece = open_slice("v5e:2x2")
  every = candidates(experiment, experiment.stages[0], piece, Choice())
  times = [c.forecast.time for c in every]
  assert times == sorted(times, key=lambda t: round(t, 6))
  for one in every:
    mesh = one.choice.mesh
    assert MODEL.kv_heads % mesh["tensor"] == 0
    assert 8 // one.choice.microbatches % mesh["data"] == 0
  with pytest.raises(ValueError, match="sweep: no choice divides the model and the rows"):
    candidates(experiment, experiment.stages[0], piece, Choice(mesh={"tensor": 4}))


def test_closed_forms_are_near_what_is_compiled(found):
  (pick,) = found.picks
  closed, (step,) = pick.candidate.forecast, pick.plan.programs
  assert step.xla is not None
  parts, compiled = closed.parts, step.memory.parts
  assert parts["parameters"] == compiled["parameters"]
  assert parts["gradients"] == compiled["gradients"]
  assert parts["optimizer"] + 8 == compiled["optimizer"]  # two counters
  assert parts[TEMPORARIES] == pytest.approx(compiled[TEMPORARIES], rel=0.3)
  assert closed.binding["compute"] == pytest.approx(step.xla.roofline.compute, rel=0.3)
  assert closed.binding["ICI"] == pytest.approx(step.xla.roofline.ici, rel=0.5)


def test_advice_is_compiled(found, experiment):
  """On a chip with less memory than the plan needs, another remat policy is found."""
  (pick,) = found.picks
  stage, need = experiment.stages[0], pick.plan.worst.memory.total
  small = dataclasses.replace(pick.plan.piece.chip, usable_hbm=need * 3 // 4 + (256 << 20))
  memory = dataclasses.replace(pick.plan.worst.memory, usable=need * 3 // 4)
  programs = (dataclasses.replace(pick.plan.worst, memory=memory),)
  piece = dataclasses.replace(pick.plan.piece, chip=small)
  plan = dataclasses.replace(pick.plan, piece=piece, programs=programs)
  assert not plan.fits
  advice = advise(plan, experiment, stage, 1)
  assert advice.found is not None
  change, new = advice.found
  assert new.fits and change.count == 1
  assert new.worst.memory.total < need
  text = advice_text(advice, plan)
  assert f"advice: {change.options}" in text
  assert "the largest residents: activations and other temporaries" in text


def test_changes_differ_in_what_they_say(found, experiment):
  (pick,) = found.picks
  for change in changes(pick.plan, experiment, experiment.stages[0]):
    old, new = dataclasses.asdict(pick.plan.choice), dataclasses.asdict(change.choice)
    assert sum(old[name] != new[name] for name in old) == change.count
    assert change.options.count("--") == change.count


def test_figures_are_linear_in_layers(found):
  """A plan taken for two depths is itself at any third; with another, a line runs through both."""
  (pick,) = found.picks
  (one,) = pick.plan.programs
  assert one.xla is not None
  same = extrapolated(one.program, one, one, Line(1, 2, 9))
  assert same.xla == one.xla and same.memory == one.memory
  double = dataclasses.replace(one, xla=dataclasses.replace(one.xla, bytes=2 * one.xla.bytes))
  far = extrapolated(one.program, one, double, Line(1, 2, 4))
  assert far.xla is not None and far.xla.bytes == 4 * one.xla.bytes
  assert far.depths == (1, 2)


def test_closed_forms_of_an_online_stage():
  """Qwen3-0.6B: policy, reference, and an engine of 32 slots a device."""
  experiment = grpo_qwen3.small()
  piece, config = open_slice("v5e:2x4"), ZOO["qwen3-0.6b"]
  count = estimate.parameters(config)
  closed = forecast(*applied(experiment, experiment.stages[0], Choice()), piece, mesh_on(piece, {}))
  assert closed.parts["reference"] == closed.parts["parameters"]
  assert closed.parts["parameters"] == pytest.approx(4 * count / 8, rel=0.01)
  assert closed.parts["engine weights"] == 2 * (count + config.vocab_size * config.width)
  # 28 layers x 2 x 8 heads x 128 x 2 bytes, (33 x 64 + 2) pages of 32 tokens.
  assert closed.parts["KV cache pages"] == 114_688 * (33 * 64 + 2) * 32
  # 1,536 tokens of 2 waves of 256: weights and 1,280 tokens of 32 samples for each, at 819 GB/s.
  read = 2 * estimate.multiplied(config) + 32 * 114_688 * 1280
  assert closed.seconds["decode"] == pytest.approx(2 * 1536 * read / 819e9, rel=0.25)
