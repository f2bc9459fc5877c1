"""The static schedules of all kernels on all chips, beside those of other libraries.

  python -m kernels.schedule                                   every case of every kernel, 4 chips
  python -m kernels.schedule linear_logprob:forward --chips v5e,v6e
  python -m kernels.schedule peers                             the kernels of jax, and tokamax's
  python -m kernels.schedule --write-budget                    writes kernels/budget.json

Needs libtpu and no TPU. A row is a case on a chip; "a + b" are the kernels of a case. cycles: of a
turn of the main loop that does the work; MXU, VALU: share of those cycles in which the unit is
busy; spills: stores and loads of registers in the listing; core: estimate of a call on one device;
XLA: what the compiler's cost model says of what is no kernel; HBM: arguments and results once;
roofline: useful FLOPs at the peak; bound: roofline over the larger of core + XLA and HBM.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kernels import chip as chips
from kernels.aot import budget, compiler, figures

PEERS = "kernels.aot.peers"
HEADINGS = ("case", "chip", "compile s", "cycles", "MXU", "VALU", "spills st/ld", "VMEM MiB")
HEADINGS += ("core us", "XLA us", "HBM us", "roofline us", "bound")


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table. Returns the exit status: 1 when a case does not compile, 2 for a bad call."""
  parser = argparse.ArgumentParser(
    prog="python -m kernels.schedule",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("kernels", nargs="*", help="KERNEL or KERNEL:CASE; 'peers' for the others'")
  parser.add_argument("--chips", default=",".join(chips.CHIPS), help="by default all four")
  parser.add_argument("--json", type=Path, help="a file for the figures")
  parser.add_argument("--write-budget", action="store_true", help="of the cases that have one")
  options = parser.parse_args(argv)
  try:
    names = [chips.get(name).name for name in options.chips.split(",")]
    jobs = select(options.kernels, names)
    if options.write_budget:
      jobs = [job for job in jobs if job.module != PEERS and compiler.case_of(job).budget]
      if not jobs:
        raise ValueError("--write-budget: none of these cases has a budget")
    if reason := compiler.why_not():
      raise ValueError(reason)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  results = compiler.compile_all(jobs, schedule=True)
  print(table(row(job, result) for job, result in zip(jobs, results)))
  print(figures.LIMITS)
  if options.json:
    named = [{**job._asdict(), **result} for job, result in zip(jobs, results)]
    options.json.write_text(json.dumps(named, indent=1))
  failed = any("error" in result for result in results)
  if options.write_budget and not failed:
    budget.write({budget.key(job): budget.entry(result) for job, result in zip(jobs, results)})
  return int(failed)


def select(wanted: Sequence[str], names: Sequence[str]) -> list[compiler.Job]:
  """Jobs for what a command line names; for all kernels and peers when it names nothing.

  Raises ValueError for a kernel or a case that there is not.
  """
  known = {module.split(".")[-2]: module for module in compiler.modules()} | {"peers": PEERS}
  jobs = []
  for want in wanted or known:
    kernel, _, case = want.partition(":")
    if kernel not in known:
      raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(known)}")
    cases = compiler.cases(known[kernel])
    if case and case not in cases:
      raise ValueError(f"case {case!r}: {kernel} has {', '.join(cases)}")
    picked = [case] if case else list(cases)
    jobs += [compiler.Job(known[kernel], one, chip) for one in picked for chip in names]
  return jobs


def row(job: compiler.Job, result: dict[str, Any]) -> list[str]:
  """A line of the table."""
  name = job.case if job.module == PEERS else f"{job.kernel}:{job.case}"
  if "error" in result:
    return [name, job.chip, "FAILED: " + result["error"][:300]]
  chip, case = chips.get(job.chip), compiler.case_of(job)
  kernels = [figures.Figures(**kernel) for kernel in result["kernels"]]
  plus = lambda texts: " + ".join(texts) or "-"
  core, xla = figures.seconds(kernels, chip), result["xla_cycles"] / chip.clock
  hbm = figures.memory_seconds(result["arguments"] + result["results"], chip)
  roofline = figures.roofline(case.flops, chip)
  known = core is not None and case.flops
  bound = f"{roofline / max(core + xla, hbm):.1%}" if known else "?"
  return [
    name,
    job.chip,
    f"{result['seconds']:.1f}",
    plus(f"{kernel.turn:.0f}" for kernel in kernels),
    plus(f"{kernel.matrix:.0%}" for kernel in kernels),
    plus(f"{kernel.vector:.0%}" for kernel in kernels),
    plus(f"{kernel.spills}/{kernel.fills}" for kernel in kernels),
    plus(f"{kernel.vmem / chips.MIB:.1f}" for kernel in kernels),
    f"{1e6 * core:.0f}" if core is not None else "?",
    f"{1e6 * xla:.0f}",
    f"{1e6 * hbm:.0f}",
    f"{1e6 * roofline:.0f}",
    bound,
  ]


def table(rows: Iterable[Sequence[str]]) -> str:
  """In Markdown."""
  lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
  sys.exit(main())
