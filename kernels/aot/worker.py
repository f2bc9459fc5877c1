"""The process that compiles: jobs on stdin, a line of JSON for each into a file.

  python -m kernels.aot.worker OUT DUMPS      libtpu was told to dump into DUMPS; "" for no schedule

`kernels.aot.compiler` starts it.
"""

import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from kernels import chip as chips
from kernels.aot import compiler, figures, listing
from kernels.case import Case

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = ")
ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
SCOPED = re.compile(
  r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


def main(argv: list[str]) -> None:
  """Compiles what stdin says."""
  out, dumps = Path(argv[0]), Path(argv[1]) if argv[1] else None
  jobs = [compiler.Job(*job) for job in json.load(sys.stdin)]
  with out.open("w") as file:
    for job in jobs:
      try:
        result = compiled(job, dumps)
      except Exception as error:  # of one case; the others are compiled
        if compiler.LOCKED in str(error):
          raise
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1500]}"}
      file.write(json.dumps(result) + "\n")
      file.flush()


def compiled(job: compiler.Job, dumps: Path | None) -> dict[str, Any]:
  """Compiles a case for one device of a chip.

  Returns:
    {"seconds": of tracing and compiling, "temporary", "arguments", "results": bytes of HBM}, and
    with a schedule {"kernels": `figures.Figures` of each Pallas kernel as a dict, "xla_cycles":
    what the compiler's cost model says of everything else}.
  """
  chip = chips.get(job.chip)
  topology = topologies.get_topology_desc(topology_name=chip.topology, platform="tpu")
  device = topology.devices[0]
  case = compiler.case_of(job)
  begin = time.perf_counter()
  with compiler.target(device):
    function, arguments = case.program(job.chip)
    here = jax.sharding.SingleDeviceSharding(device)
    on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    program = jax.jit(function).lower(*jax.tree.map(on_device, arguments)).compile()
  memory = program.memory_analysis()
  assert memory is not None  # libtpu gives it
  result: dict[str, Any] = {
    "seconds": time.perf_counter() - begin,
    "arguments": memory.argument_size_in_bytes,
    "results": memory.output_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
  }
  if dumps is not None:
    text = program.as_text()  # fails for some kernels on tpu7x: this jaxlib's HLO lags libtpu's
    assert text is not None
    result |= schedules(text, case, job.chip, dumps)
    for path in dumps.iterdir():  # hundreds of megabytes for a large kernel
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  return result


def schedules(text: str, case: Case, chip: str, dumps: Path) -> dict[str, Any]:
  """What became of each instruction of a compiled module, `text`, that takes time."""
  found, xla = [], 0
  for line in text.splitlines():
    named = INSTRUCTION.match(line)
    if named and 'custom_call_target="tpu_custom_call"' in line:
      scoped = SCOPED.search(line)
      measured = figures.measure(
        named[1],
        listing.read(dumps, named[1]),
        active=case.active,
        turns=figures.of_kernel(case.turns, named[1], chip),
        kinds=figures.of_kernel(case.kinds, named[1], chip),
        vmem=int(scoped[1]) if scoped else 0,
      )
      found.append(dataclasses.asdict(measured))
    elif named and (estimate := ESTIMATE.search(line)):
      xla += int(estimate[1])
  return {"kernels": found, "xla_cycles": xla}


if __name__ == "__main__":
  main(sys.argv[1:])
