"""Plans of a small SFT stage on a v5e of 4 chips, compiled by libtpu without a TPU."""

import dataclasses

import numpy as np
import pytest

from experiments import grpo_qwen3, sft_qwen3
from kernels import chip as chips
from kernels.aot import budget
from pt_jax.data.groups import Group, pack_groups
from pt_jax.data.packing import Example, pack, pack_rows
from pt_jax.loops.rollouts import pack_rollouts
from pt_jax.models.zoo import ZOO
from pt_jax.plan import estimate, page
from pt_jax.plan.advice import advise, changes
from pt_jax.plan.choices import Choice, applied
from pt_jax.plan.compile import Plan, plan_stage
from pt_jax.plan.depth import Line, extrapolated
from pt_jax.plan.findings import advice_text, sweep_text
from pt_jax.plan.forecast import forecast
from pt_jax.plan.memory import TEMPORARIES
from pt_jax.plan.schedule import schedule_of
from pt_jax.plan.stage import INTEGERS
from pt_jax.plan.sweep import Sweep, candidates, sweep
from pt_jax.plan.topology import axis_bandwidth, mesh_on, open_slice, read_mesh
from pt_jax.rollout.rollouts import Rollouts
from tests.plan import tiny

pytest.importorskip("libtpu")
TINY = tiny.MODEL
LENGTH = 2048
EXAMPLE = Example(np.arange(4, dtype=np.int32), np.ones(4, np.float32))


@pytest.fixture(scope="module")
def experiment():
  """Two microbatches of 4 rows."""
  base = sft_qwen3.config(batch_size=8, row_length=LENGTH, microbatches=2)
  return dataclasses.replace(base, model=TINY)


@pytest.fixture(scope="module")
def swept(experiment) -> Sweep:
  """The only choice that is left on data=2, tensor=2, compiled."""
  fixed = Choice({"data": 2, "tensor": 2}, zero=3, remat="attention", microbatches=2)
  return sweep(experiment, experiment.stages[0], open_slice("v5e:2x2"), fixed, 1)


@pytest.fixture(scope="module")
def plan(swept) -> Plan:
  """On data=2, tensor=2."""
  return swept.picks[0].plan


def test_memory_is_that_of_the_parameter_table(plan):
  (step,) = plan.programs
  count, parts = estimate.parameters(TINY), step.memory.parts
  whole = TINY.width * (2 * TINY.layers + 1)  # norms, on every device
  split = count - whole
  assert parts["parameters"] == 4 * (split // 4 + whole)
  assert parts["optimizer"] == 2 * parts["parameters"] + 2 * 4  # moments, and two counters
  assert parts["gradients"] == parts["parameters"]
  assert parts["batch"] == 5 * 4 * 8 * LENGTH // 2  # fields, bytes, rows, tokens; over data
  assert parts[TEMPORARIES] > 0
  assert plan.fits


def test_flops_are_the_models_and_what_is_computed_twice(plan):
  xla = plan.programs[0].xla
  assert xla is not None
  tokens = 8 * LENGTH
  assert plan.programs[0].program.model_flops == 3 * tokens * estimate.forward_flops(TINY, LENGTH)
  again = xla.flops * 4 / plan.programs[0].program.model_flops
  # `remat` computes a block twice. Kernels state what they cost.
  assert all(kernel.cost for kernel in xla.kernels)
  assert 1.2 < again < 1.6


def test_collectives_have_the_axes_of_the_mesh(plan):
  found = plan.programs[0].xla.collectives
  gathered = sum(c.bytes for c in found if (c.kind, c.axes) == ("all-gather", ("data",)))
  matrices = (estimate.parameters(TINY) - 2 * 512 * 256) / 2  # of the blocks, over tensor
  # In each of two microbatches, forward and backward, in bfloat16 or float32.
  assert 2 * 2 * matrices * 2 * 0.98 < gathered < 2 * 2 * matrices * 4 + 4 * 512 * 256
  assert any((c.kind, c.axes) == ("all-reduce", ("tensor",)) for c in found)


def test_gradients_of_split_parameters_are_scattered(plan):
  found = plan.programs[0].xla.collectives
  over_data = lambda kind: sum(c.bytes for c in found if (c.kind, c.axes) == (kind, ("data",)))
  # Of two microbatches in bfloat16, half over tensor. The matrices of keys, values and the
  # vocabulary are so small here that XLA sums them whole, a quarter of all.
  every = 2 * 2 * estimate.parameters(TINY) / 2
  assert over_data("reduce-scatter") > 0.74 * every
  assert over_data("reduce-scatter") + over_data("all-reduce") < 1.01 * every


def test_page_says_everything(plan):
  text = page.page(plan)
  for word in ("fits", "parameters", "optimizer", "gradients", "all-gather", "compute", "ICI"):
    assert word in text
  assert "MFU" in text
  assert "mesh      data=2 tensor=2; ZeRO 3" in text


@pytest.fixture(scope="module")
def written():
  """The cases of the budget, where the compiler that is installed is the one that wrote it."""
  known = budget.read()
  if known["versions"] != budget.versions():
    pytest.skip(f"the budget is of {known['versions']}")
  return known["cases"]


def test_schedules_are_those_of_the_budget(written):
  found = schedule_of("flash_attention_forward", "v5e")
  assert found is not None
  (figures,) = written["flash_attention causal_4096 v5e"].values()
  assert (found.turn, found.cycles) == (figures["turn"], figures["cycles"])
  backward = schedule_of("linear_logprob_by_hidden", "v6e")
  figures = written["linear_logprob qwen3_06b_backward v6e"]
  assert backward is not None
  assert backward.turn == figures["transpose_jvp_linear_logprob_by_hidden__.1"]["turn"]
  assert schedule_of("no_such_kernel", "v5e") is None
  assert schedule_of("attention_forward", "v9") is None
  assert schedule_of("flash_attention", "v5e") is None  # a part of a name is another kernel


def test_a_program_has_the_schedule_of_a_case_of_its_kind(written):
  """Of the kernel whose turns its data decides, cycles of a call are not known."""
  for kind, case in (("prefill", "prefill_4096"), ("decode", "decode_64x4096")):
    found = schedule_of("ragged_paged_attention", "v5e", kind)
    assert found is not None
    assert found.case == f"ragged_paged_attention {case} v5e" and found.cycles is None


def test_every_chip_has_schedules(written):
  assert {case.split()[-1] for case in written} == set(chips.CHIPS)


def test_kernels_of_a_page_have_their_schedules(plan, written):
  lines = page.page(plan).splitlines()
  for kernel, case in (
    ("flash_attention_forward", "flash_attention causal_4096"),
    ("flash_attention_backward", "flash_attention causal_4096_backward"),
    ("linear_logprob_by_matrix", "linear_logprob qwen3_06b_backward"),
  ):
    (line,) = (line for line in lines if line.split()[:1] == [kernel])
    assert "GFLOP each" in line and f"static schedule of {case} v5e: " in line


def _rows():
  return pack_rows([EXAMPLE], pack([4], 8))


def _pairs():
  return pack_groups([Group((EXAMPLE, EXAMPLE), (1.0, 0.0))], pack([8], 8))


def _rollouts():
  one = lambda dtype, value: np.full((1, 4), value, dtype)
  size = lambda n: np.array([n], np.int32)
  drawn = Rollouts(
    *(one(np.int32, 1), size(2), size(4), one(float, -1), one(np.int32, 0), size(0)),
    forced=one(bool, False),
  )
  return pack_rollouts(drawn, 1, 8, share_prompts=True).batch


@pytest.mark.parametrize("pack_one", [_rows, _pairs, _rollouts])
def test_dtypes_of_abstract_batches_are_those_of_real_ones(pack_one):
  batch = pack_one()
  for field in dataclasses.fields(batch):
    expected = np.int32 if field.name in INTEGERS else np.float32
    assert getattr(batch, field.name).dtype == expected, field.name


@pytest.mark.parametrize(
  ("name", "line"),
  [
    ("v9:2x2", "topology: expected one of v5e:1x1, v5e:2x2"),
    ("v5e", "topology: expected one of v5e:1x1"),
    ("v5e:3x3", "topology 'v5e:3x3': libtpu does not open it"),
  ],
)
def test_unknown_topology(name, line):
  with pytest.raises(ValueError, match=line):
    open_slice(name)


def test_mesh_errors(experiment):
  with pytest.raises(ValueError, match=r"mesh: expected AXIS=SIZE,.* found 'rows=2'"):
    read_mesh("rows=2")
  with pytest.raises(ValueError, match=r"v5e:2x2: mesh 3x1x1x1 .* needs 3 devices, found 4"):
    mesh_on(open_slice("v5e:2x2"), {"data": 3})
  stage = experiment.stages[0]
  with pytest.raises(ValueError, match="microbatches: expected a divisor of the 8 rows"):
    applied(experiment, stage, Choice(microbatches=3))
  with pytest.raises(ValueError, match="axis 'kv_heads' of size 2 does not divide into the 4"):
    plan_stage(experiment, stage, open_slice("v5e:2x2"), Choice(mesh={"tensor": 4}))


def test_bandwidth_of_a_mesh_axis():
  """v5p links do 100 GB/s each way; an axis of 4 is closed, a part of one is not."""
  piece = open_slice("v5p:4x4x4")
  mesh = mesh_on(piece, {"data": 16, "tensor": 4})
  assert axis_bandwidth(piece, mesh, ("tensor",)) == pytest.approx(2 * 100e9)
  assert axis_bandwidth(piece, mesh, ("data",)) == pytest.approx(4 * 100e9)
  piece = open_slice("v6e:16x16")
  mesh = mesh_on(piece, {"data": 32, "tensor": 8})
  assert axis_bandwidth(piece, mesh, ("tensor",)) == pytest.approx(100e9)


def test_sweep_keeps_what_is_given(swept):
  assert swept.considered == swept.roomy == len(swept.picks) == 1
  text = sweep_text(swept, open_slice("v5e:2x2"))
  assert "--mesh data=2,tensor=2 --zero 3 --remat attention --microbatches 2" in text
  assert "  1: train step takes 100%, bound by" in text


def test_candidates_divide_and_are_in_order(experiment):
  piece = open_slice("v5e:2x2")
  every = candidates(experiment, experiment.stages[0], piece, Choice())
  times = [c.forecast.time for c in every]
  assert times == sorted(times, key=lambda t: round(t, 6))
  for one in every:
    mesh = {"data": 1, "tensor": 1} | dict(one.choice.mesh or {})
    assert TINY.kv_heads % mesh["tensor"] == 0
    assert 8 // one.choice.microbatches % mesh["data"] == 0
  with pytest.raises(ValueError, match="sweep: no choice divides the model and the rows"):
    candidates(experiment, experiment.stages[0], piece, Choice(mesh={"tensor": 4}))


def test_closed_forms_are_near_what_is_compiled(swept):
  (pick,) = swept.picks
  closed, (step,) = pick.candidate.forecast, pick.plan.programs
  assert step.xla is not None
  parts, compiled = closed.parts, step.memory.parts
  assert parts["parameters"] == compiled["parameters"]
  assert parts["gradients"] == compiled["gradients"]
  assert parts["optimizer"] + 8 == compiled["optimizer"]  # two counters
  assert parts[TEMPORARIES] == pytest.approx(compiled[TEMPORARIES], rel=0.3)
  assert closed.binding["compute"] == pytest.approx(step.xla.roofline.compute, rel=0.3)
  assert closed.binding["ICI"] == pytest.approx(step.xla.roofline.ici, rel=0.5)


def test_advice_is_compiled(swept, experiment, monkeypatch):
  """On a chip with less memory than the plan needs, a change is found that fits."""
  monkeypatch.setattr("pt_jax.plan.advice.MARGIN", 0)
  (pick,) = swept.picks
  stage, need = experiment.stages[0], pick.plan.worst.memory.total
  chip = dataclasses.replace(pick.plan.piece.chip, usable_hbm=need * 9 // 10)
  memory = dataclasses.replace(pick.plan.worst.memory, usable=chip.usable_hbm)
  plan = dataclasses.replace(
    pick.plan,
    piece=dataclasses.replace(pick.plan.piece, chip=chip),
    programs=(dataclasses.replace(pick.plan.worst, memory=memory),),
  )
  assert not plan.fits
  advice = advise(plan, experiment, stage, 1)
  assert advice.found is not None
  change, new = advice.found
  assert new.fits and new.worst.memory.total <= chip.usable_hbm
  text = advice_text(advice, plan)
  assert f"advice: {change.options}" in text
  assert "the largest residents: activations and other temporaries" in text


def test_changes_differ_in_what_they_say(swept, experiment):
  (pick,) = swept.picks
  for change in changes(pick.plan, experiment, experiment.stages[0]):
    old, new = dataclasses.asdict(pick.plan.choice), dataclasses.asdict(change.choice)
    assert sum(old[name] != new[name] for name in old) == change.count
    assert change.options.count("--") == change.count


def test_figures_are_linear_in_layers(swept):
  """A plan taken for two depths is itself at any third; with another, a line runs through both."""
  (pick,) = swept.picks
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
  assert closed.parts["engine weights"] == 2 * count
  # 28 layers x 2 x 8 heads x 128 x 2 bytes, (33 x 64 + 2) pages of 32 tokens.
  assert closed.parts["KV cache pages"] == 114_688 * (33 * 64 + 2) * 32
  # 1,536 tokens of 2 waves of 256: weights and 1,280 tokens of 32 samples for each, at 819 GB/s.
  read = 2 * estimate.multiplied(config) + 32 * 114_688 * 1280
  assert closed.seconds["decode"] == pytest.approx(2 * 1536 * read / 819e9, rel=0.25)
