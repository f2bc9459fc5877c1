"""The order of a sweep and its sentences, on closed forms and plans written by hand."""

import dataclasses

import pytest

from experiments import sft_qwen3
from pt_jax.experiment import MeshShape
from pt_jax.plan import reasons, sweep
from pt_jax.plan.choices import Choice
from pt_jax.plan.compile import Plan
from pt_jax.plan.findings import sweep_text
from pt_jax.plan.forecast import Forecast
from pt_jax.plan.measure import Analysis, Measured
from pt_jax.plan.memory import TEMPORARIES, Memory
from pt_jax.plan.program import Program
from pt_jax.plan.roofline import Roofline
from pt_jax.plan.sweep import Candidate, Pick, in_turn
from pt_jax.plan.topology import open_slice
from tests.plan import tiny

pytest.importorskip("libtpu")
PEAK = 197e12
GIB = 1 << 30


@pytest.fixture(scope="module")
def piece():
  """Four chips with 15.75 GiB each."""
  return open_slice("v5e:2x2")


@pytest.fixture(scope="module")
def experiment():
  """Eight rows."""
  base = sft_qwen3.config(batch_size=8, row_length=512, microbatches=1)
  return dataclasses.replace(base, model=tiny.MODEL)


def _candidate(mesh: dict[str, int], compute: float, ici: float = 0.0, gib: float = 1.0):
  """Whose train step takes `compute` + `ici` seconds; half of `gib` are temporaries."""
  parts = {"parameters": int(gib / 2 * GIB), TEMPORARIES: int(gib / 2 * GIB)}
  binding = {"compute": compute, "HBM": 0.0, "ICI": ici}
  return Candidate(Choice(mesh), Forecast(parts, {"train step": compute + ici}, binding))


def _plan(experiment, piece, compute: float, exposed: float, gib: float = 1.0) -> Plan:
  """Of a train step that takes `compute` + `exposed` seconds."""
  step = Program("train step", "train", None, (), {}, {})
  line = Roofline(compute, 0.0, exposed, exposed, compute + exposed, PEAK, PEAK)
  memory = Memory({TEMPORARIES: int(gib * GIB)}, piece.chip.usable_hbm, True)
  one = Measured(step, memory, 1.0, Analysis(0.0, 0.0, (), (), line))
  return Plan(experiment, experiment.stages[0], piece, Choice({"data": 4}), (one,))


def test_a_mesh_is_not_tried_again_before_others_that_are_about_as_fast():
  """1.05 goes before 1.00 and 1.01 times 1.1 and 1.2; 1.5 does not."""
  times = [(4, 1.0), (4, 1.0), (4, 1.01), (2, 1.05), (1, 1.5)]
  found = [_candidate({"data": data, "tensor": 4 // data}, time) for data, time in times]
  assert in_turn(found) == [found[0], found[3], found[1], found[2], found[4]]


def test_what_is_resident_is_exact(piece):
  """15.75 GiB take 16.5 of which half may turn out a fifth smaller, and not 18."""
  assert sweep.has_room(_candidate({}, 1.0, gib=16.5), piece)
  assert not sweep.has_room(_candidate({}, 1.0, gib=18.0), piece)


def test_every_remat_policy_but_the_one_whose_time_is_unknown(experiment, piece):
  stage = experiment.stages[0]
  ranked = {c.choice.remat for c in sweep.candidates(experiment, stage, piece, Choice())}
  assert ranked == {"none", "projections", "heads", "attention", "block"}
  given = sweep.candidates(experiment, stage, piece, Choice(remat="offload"))
  assert {c.choice.remat for c in given} == {"offload"}


def test_the_next_choice_takes_the_place_of_one_that_the_compiler_fails_on(
  experiment, piece, monkeypatch
):
  tried = []

  def compiled(experiment, stage, piece, choice, **options):
    tried.append(choice)
    if len(tried) == 1:
      raise ValueError("train step: XLA: INTERNAL:\nnot implemented")
    return _plan(experiment, piece, 1.0, 0.0)

  monkeypatch.setattr(sweep, "plan_stage", compiled)
  found = sweep.sweep(experiment, experiment.stages[0], piece, Choice(), 2)
  assert len(tried) == 3 and [c.choice for c, _ in found.refused] == tried[:1]
  assert [pick.candidate.choice for pick in found.picks] == tried[1:]
  lines = sweep_text(found, piece).splitlines()
  assert lines[0].endswith("; 2 compiled, 1 that the compiler fails on")
  line = f"  the compiler fails on {tried[0]}: train step: XLA: INTERNAL: not implemented"
  assert line in lines


def test_every_mesh_is_in_the_table_or_below_it(experiment, piece, monkeypatch):
  monkeypatch.setattr(sweep, "plan_stage", lambda *_, **__: _plan(experiment, piece, 1.0, 0.0))
  found = sweep.sweep(experiment, experiment.stages[0], piece, Choice(), 1)
  tried = str(found.picks[0].candidate.choice).split()[1]
  below = [str(one.choice).split()[1] for one in found.others]
  every = sweep.candidates(experiment, experiment.stages[0], piece, Choice())
  assert {tried, *below} == {str(one.choice).split()[1] for one in every}
  assert len(below) == len(set(below)) > 2 and tried not in below


def test_the_experiments_own_choice_is_there_to_compare_with(experiment, piece, monkeypatch):
  monkeypatch.setattr(sweep, "plan_stage", lambda *_, **__: _plan(experiment, piece, 1.0, 0.0))
  mine = dataclasses.replace(experiment, mesh=MeshShape(data=2, tensor=2), zero=2)
  found = sweep.sweep(mine, mine.stages[0], piece, Choice(remat="block"), 1)
  first, own = found.picks
  assert (first.own, own.own) == (False, True)
  assert str(own.candidate.choice) == (
    "--mesh data=2,tensor=2 --zero 2 --remat block --microbatches 1"
  )
  (line,) = (x for x in sweep_text(found, piece).splitlines() if "the experiment's own" in x)
  assert line.split()[0] == "2"
  again = sweep.sweep(mine, mine.stages[0], piece, own.candidate.choice, 1)
  assert [pick.own for pick in again.picks] == [True]


def test_sentences_of_what_was_compiled(experiment, piece):
  plans = [
    _plan(experiment, piece, compute, exposed, gib)
    for compute, exposed, gib in ((0.9, 0.1, 1), (0.8, 0.4, 1), (0.1, 0.0, 20))
  ]
  best, other, large = (Pick(_candidate({}, 1.0), plan) for plan in plans)
  assert reasons.of_pick(best, best) == (
    "train step takes 100%, bound by compute; collectives that nothing runs beside are 10% of all"
  )
  assert reasons.of_pick(other, best) == (
    "20.0% slower than 1: train step 200.00 ms longer, with 300.00 ms more of exposed collectives"
  )
  assert reasons.of_pick(large, best) == (
    f"does not fit: train step is 4.2 GiB over, 20.0 GiB are {TEMPORARIES}"
  )


def test_sentences_of_other_meshes(piece):
  best = _candidate({"data": 4}, 1.0)
  slow, large = _candidate({"tensor": 4}, 0.9, ici=0.6), _candidate({"data": 4}, 1.0, gib=20)
  assert reasons.of_other(slow, best, piece) == (
    "50.0% slower than 1, most of it ICI of the train step"
  )
  assert reasons.of_other(large, best, piece) == (
    "no choice has room; of the smallest 10.0 GiB are parameters"
  )
