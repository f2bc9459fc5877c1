"""Figures of a schedule, from listings written by hand, and the budget."""

import json

import pytest

from kernels import schedule
from kernels.aot import budget, compiler, figures, listing

UNITS = ("MATMUL", "VALU", "VLOAD:FILL", "VSTORE:SPILL")
CAPACITY = (4, 4, 3, 1)
PLAIN, PRODUCT = "0 2 0 0", "4 0 1 1"


def write(folder, bundles, name="op.1"):
  """The two dumps of a kernel; bundles: (text, uses of the units)."""
  text = "\n".join(f" {hex(i) if i else '0'}   : > {{ {b} }}" for i, (b, _) in enumerate(bundles))
  head = "= control target key start\n"
  (folder / f"17-{name}-65-packed-bundles-post-ra.txt").write_text(head + text + "\n")
  rows = [", ".join(UNITS), " ".join(map(str, CAPACITY)), *(uses for _, uses in bundles)]
  path = folder / f"17-{name}-68-pre-delay_hlo-static-per-bundle-utilization.txt"
  path.write_text("== CAPACITY:\n" + "\n".join(rows) + "\n")


def looped(compare, body, negated="!"):
  """3 bundles, then a loop of the body, its exit and 4 slots behind the branch, then 2 bundles."""
  bundles = [("", PLAIN)] * 3 + body + [(f"%p1_p2 = scmp.{compare} /* loop exit test */", PLAIN)]
  branch = f"%9 = sbr.rel ({negated}%p1_p2) target bundleno = 3 (0x3), region = 7"
  return [*bundles, (branch, PLAIN), *[("", PLAIN)] * 4, ("", PLAIN), ("", PLAIN)]


def test_a_loop_with_a_known_number_of_turns(tmp_path):
  """10 turns of 2 products and 6 other bundles, between 3 and 2 bundles."""
  write(tmp_path, looped("ge.s32.totalorder %s1_s3, 10", [("", PRODUCT)] * 2))
  found = figures.measure("op.1", listing.read(tmp_path, "op.1"), vmem=5)
  assert (found.turn, found.cycles, found.unknown, found.vmem) == (8, 3 + 10 * 8 + 2, 0, 5)
  assert found.matrix == pytest.approx(2 / 8)
  assert found.vector == pytest.approx(6 * 2 / 4 / 8)
  assert (found.spills, found.fills) == (2, 2)


def test_a_loop_whose_turns_only_the_case_knows(tmp_path):
  write(tmp_path, looped("ge.s32.totalorder %s1_s3, %s4_s5", [("", PRODUCT)] * 2))
  read = lambda: listing.read(tmp_path, "op.1")
  found = figures.measure("op.1", read())
  assert (found.turn, found.cycles, found.unknown) == (8, 13, 1)
  found = figures.measure("op.1", read(), turns=(7,))
  assert (found.turn, found.cycles, found.unknown) == (8, 3 + 7 * 8 + 2, 0)
  assert figures.of_kernel({"other": (3,), "op": (7,)}, "op.1") == (7,)
  assert figures.of_kernel({"other": (3,)}, "op.1") == ()


def skipping(products, to):
  """A branch over products, with its 4 slots in front of them."""
  branch = (f"%8 = sbr.rel (%p7_p1) target bundleno = {to} ({to:#x}), region = 9", PLAIN)
  return [branch, *[("", PLAIN)] * 4, *[("", PRODUCT)] * products]


def test_work_that_a_share_of_the_turns_does(tmp_path):
  """The turn that works: 5 bundles up to the region, 20 products, 6 behind; half of 10 do."""
  write(tmp_path, looped("ge.s32.totalorder %s1_s3, 10", skipping(20, 3 + 5 + 20)))
  found = figures.measure("op.1", listing.read(tmp_path, "op.1"), active=0.5)
  assert (found.turn, found.cycles) == (31, 3 + 10 * (11 + 10) + 2)


def test_two_arms_of_one_choice_run_once(tmp_path):
  arms = skipping(20, 28) + skipping(20, 53)
  write(tmp_path, looped("ge.s32.totalorder %s1_s3, 10", arms))
  found = figures.measure("op.1", listing.read(tmp_path, "op.1"))
  assert found.turn == 2 * 5 + 20 + 6


def test_kinds_of_work_run_as_often_as_the_case_says(tmp_path):
  """Of 10 turns a fourth does 20 products, a half 30, the rest neither."""
  write(tmp_path, looped("ge.s32.totalorder %s1_s3, 10", skipping(20, 28) + skipping(30, 63)))
  read = lambda: listing.read(tmp_path, "op.1")
  found = figures.measure("op.1", read(), kinds=(0.25, 0.5))
  assert (found.turn, found.cycles) == (2 * 5 + 5 + 15 + 6, 3 + 10 * 36 + 2)
  with pytest.raises(ValueError, match="expected 3 regions of matrix work, found 2"):
    figures.measure("op.1", read(), kinds=(0.25, 0.5, 0.1))


def test_a_pipelined_loop_fills_and_drains(tmp_path):
  """12 turns for a grid of 10: the body is skipped in two. A sweep of 5 has one region apart."""
  apart = ("%8 = sbr.rel (%p7_p1) target bundleno = 38 (0x26), region = 9", PLAIN)
  body = [*skipping(20, 28), apart, *[("", PLAIN)] * 9]
  body[0] = (body[0][0] + " /* iteration index, stage = 0\niteration_bounds: (2, 5) */", PLAIN)
  write(tmp_path, looped("ge.s32.totalorder %s1_s3, 12", body))
  schedule = listing.read(tmp_path, "op.1")
  assert schedule.grid == (2, 5)
  found = figures.measure("op.1", schedule)
  assert found.turn == pytest.approx(5 + 20 * 10 / 12 + 5 + 5 / 5 + 6)


def test_a_kernel_without_dumps_is_named(tmp_path):
  with pytest.raises(ValueError, match="schedule of op: expected a dump 'packed-bundles-post-ra'"):
    listing.read(tmp_path, "op")


ENTRY = {"op.1": {"turn": 100.0, "cycles": 1000.0, "spills": 0.0, "fills": 50.0}}


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"turn": 103.0, "fills": 10.0}, None),
    ({"turn": 103.1}, "turn: expected at most 103.0, found 103.1"),
    ({"spills": 1.0}, "spills: expected at most 0.0, found 1.0"),
  ],
)
def test_three_percent_over_the_budget_is_a_regression(change, line):
  lines = budget.exceeded("case", {"op.1": ENTRY["op.1"] | change}, ENTRY)
  assert lines == ([f"case: op.1: {line}"] if line else [])


def test_another_kernel_is_no_improvement():
  lines = budget.exceeded("case", {"op.2": ENTRY["op.1"]}, ENTRY)
  assert lines == ["case: expected kernels ['op.1'], found ['op.2']"]


def test_a_bad_call_is_one_line(capsys):
  assert schedule.main(["nope"]) == 2
  assert "kernel 'nope': expected one of" in capsys.readouterr().err
  assert schedule.main(["peers:nope"]) == 2
  assert "case 'nope': peers has xla_product_4096" in capsys.readouterr().err
  assert schedule.main(["--chips", "v5e,v9"]) == 2
  assert "chip: expected one of v5e" in capsys.readouterr().err


@pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not())
def test_the_product_of_xla_is_what_its_flops_take(capsys, tmp_path):
  """2 * 4096^3 FLOPs at 2 * 4 * 128^2 a cycle are 1,048,576 cycles; and a peer's kernel is read."""
  path = tmp_path / "figures.json"
  names = ["peers:xla_product_4096", "peers:jax_flash_512"]
  assert schedule.main([*names, "--chips", "v5e", "--json", str(path)]) == 0
  product, flash = json.loads(path.read_text())
  assert 1_048_576 < product["xla_cycles"] < 1.05 * 1_048_576
  (kernel,) = flash["kernels"]
  # 512 x 512 x 128 twice at 2 * 4 * 128^2 FLOPs a cycle: 1024 cycles of the matrix units.
  assert kernel["turn"] * kernel["matrix"] == pytest.approx(1024, rel=0.01)
  assert "None of them is a measured time" in capsys.readouterr().out
