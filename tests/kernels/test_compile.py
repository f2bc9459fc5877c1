"""Every case of every kernel compiles for every chip, and schedules keep within the budget.

Compiling all of them for all chips takes some ten minutes, their schedules six more: that is in
`make test-slow`. `make test` compiles every quick case for one chip, the forward pass where the
backward pass is not quick. Both in one process that loads libtpu once.
"""

import itertools

import pytest

from kernels import chip as chips
from kernels.aot import budget, compiler

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not())

WITH_BUDGET = budget.jobs(chips.CHIPS)
QUICK = [job for job in WITH_BUDGET if job.chip == "v6e" and not compiler.case_of(job).slow]


EVERY = [
  compiler.Job(module, name, chip)
  for module in compiler.modules()
  for name in compiler.cases(module)
  for chip in chips.CHIPS
]


def one_each():
  """Of every case that compiles quickly one chip, the next chip for the next case. The program of
  "X_backward" holds that of "X"."""
  quick = [job for job in EVERY if not compiler.case_of(job).slow]
  names = list(dict.fromkeys((job.module, job.case) for job in quick))
  turn = itertools.cycle(("v5e", "v6e", "v5p", "tpu7x"))
  alone = [(module, case) for module, case in names if (module, f"{case}_backward") not in names]
  return [compiler.Job(module, case, next(turn)) for module, case in alone]


ONE_EACH = [job for job in one_each() if job not in QUICK]


@pytest.fixture(scope="module")
def compiled():
  return dict(zip(ONE_EACH, compiler.compile_all(ONE_EACH, schedule=False)))


@pytest.fixture(scope="module")
def schedules():
  return dict(zip(QUICK, compiler.compile_all(QUICK, schedule=True)))


@pytest.mark.parametrize("job", ONE_EACH, ids=budget.key)
def test_compiles(job, compiled):
  assert "error" not in compiled[job], compiled[job]["error"]


@pytest.mark.slow
def test_every_case_compiles_for_every_chip():
  results = zip(EVERY, compiler.compile_all(EVERY, schedule=False))
  failed = {budget.key(job): result["error"] for job, result in results if "error" in result}
  assert not failed, failed


def check_budget(job, result):
  """A figure that grew by more than 3 %, or a kernel that has none: `python -m kernels.schedule
  --write-budget` writes the file anew, for a change that is worth it."""
  written = budget.read()
  assert "error" not in result, result["error"]
  if written["versions"] != budget.versions():
    pytest.skip(f"written with {written['versions']}, found {budget.versions()}")
  name = budget.key(job)
  assert name in written["cases"], f"{name}: expected a budget, found none"
  lines = budget.exceeded(name, budget.entry(result), written["cases"][name])
  assert not lines, "\n".join(lines)


@pytest.mark.parametrize("job", QUICK, ids=budget.key)
def test_keeps_within_the_budget(job, schedules):
  check_budget(job, schedules[job])


@pytest.mark.slow
def test_all_keep_within_the_budget():
  rest = [job for job in WITH_BUDGET if job not in QUICK]
  for job, result in zip(rest, compiler.compile_all(rest, schedule=True)):
    check_budget(job, result)
