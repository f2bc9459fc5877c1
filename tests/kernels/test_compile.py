"""Every case of every kernel compiles for every chip, and its schedule keeps within the budget.

All of it in one process that loads libtpu once.
"""

import pytest

from kernels import chip as chips
from kernels.aot import budget, compiler

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not())

JOBS = [
  compiler.Job(module, case, chip)
  for module in compiler.modules()
  for case in compiler.cases(module)
  for chip in chips.CHIPS
]


@pytest.fixture(scope="module")
def compiled():
  return dict(zip(JOBS, compiler.compile_all(JOBS, schedule=False)))


@pytest.mark.parametrize("job", JOBS, ids=budget.key)
def test_compiles(job, compiled):
  assert "error" not in compiled[job], compiled[job]["error"]
