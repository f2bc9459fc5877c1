"""Every case of every kernel compiles for every chip, and schedules keep within the budget.

All of it in one process that loads libtpu once. What takes long to compile is in `make test-slow`.
"""

import pytest

from kernels import chip as chips
from kernels.aot import budget, compiler

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not())

WITH_BUDGET = budget.jobs(("v5e", "v6e"))  # one for each edge of the matrix units
QUICK = [job for job in WITH_BUDGET if job.chip == "v6e" and not compiler.case_of(job).slow]


def jobs(slow):
  """All but those whose schedule is read."""
  return [
    job
    for module in compiler.modules()
    for name, case in compiler.cases(module).items()
    for chip in chips.CHIPS
    if case.slow == slow and (job := compiler.Job(module, name, chip)) not in WITH_BUDGET
  ]


@pytest.fixture(scope="module")
def compiled():
  return dict(zip(jobs(False), compiler.compile_all(jobs(False), schedule=False)))


@pytest.fixture(scope="module")
def compiled_slowly():
  return dict(zip(jobs(True), compiler.compile_all(jobs(True), schedule=False)))


@pytest.fixture(scope="module")
def schedules():
  return dict(zip(QUICK, compiler.compile_all(QUICK, schedule=True)))


@pytest.mark.parametrize("job", jobs(False), ids=budget.key)
def test_compiles(job, compiled):
  assert "error" not in compiled[job], compiled[job]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("job", jobs(True), ids=budget.key)
def test_compiles_slowly(job, compiled_slowly):
  assert "error" not in compiled_slowly[job], compiled_slowly[job]["error"]


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
