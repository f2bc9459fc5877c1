"""Compiles an experiment's programs for a TPU slice that is not there, and prints what they need.

  python -m launch.plan experiments.NAME --topology v5p:4x4x4 --mesh data=16,tensor=4
  python -m launch.plan experiments.NAME:ABLATION --topology v5e:2x4 --lr 3e-6

The arguments of the config function may be given as to launch.local. `data` of the mesh takes the
chips that are left. No weight, row or tokenizer is read, unless the config function reads one.
"""

import contextlib
import dataclasses
import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from launch.local import load_config
from pt_jax.experiment import Evaluate, Experiment
from pt_jax.models.config import Remat
from pt_jax.plan.advice import advise
from pt_jax.plan.choices import Choice
from pt_jax.plan.compile import plan_stage
from pt_jax.plan.findings import advice_text, sweep_text
from pt_jax.plan.page import page
from pt_jax.plan.sweep import sweep
from pt_jax.plan.topology import open_slice, read_mesh


@dataclasses.dataclass(frozen=True)
class Options:
  """What to plan."""

  topology: str
  """The slice, e.g. v5p:4x4x4 or v5e:2x4."""
  mesh: str | None = None
  """Axes that chips are split over, AXIS=SIZE,...; by default the experiment's own mesh."""
  zero: Literal[1, 2, 3] | None = None
  """ZeRO stage instead of the experiment's."""
  remat: Remat | None = None
  """What a block keeps for its backward pass, instead of the model's."""
  microbatches: int | None = None
  """Parts that an update is computed in, instead of the stage's."""
  slots: int | None = None
  """Completions that the engine decodes at once, instead of the stage's."""
  sweep: int = 0
  """Compile so many choices of mesh, ZeRO stage, remat and microbatches, the first by closed forms,
  and rank them. What is given by the options above stays."""
  advice: int = 2
  """Changed plans that are compiled at most, to find one that fits, or where more than half of the
  memory is free a faster one."""
  engine_layers: int | None = None
  """Compile prefill and decode with so many layers and with half of them, and extrapolate."""
  stage: str | None = None
  """The stage to plan; by default the last one that trains."""
  debug: bool = False
  """A traceback where an error is one line otherwise."""


@dataclasses.dataclass(frozen=True)
class Command:
  """A parsed command line."""

  function: Callable[..., Experiment]
  arguments: Mapping[str, Any]  # of the function, all of them
  options: Options


def main(argv: Sequence[str] | None = None) -> int:
  """Plans a command line.

  Returns the exit status: 0 when everything fits, 1 when something does not, 2 after one line on
  what was wrong.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    return run(parse(argv))
  except (ValueError, OSError) as error:
    if "--debug" in argv:
      traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run(command: Command) -> int:
  """Prints the plan; returns the exit status. Raises ValueError for what cannot be planned."""
  jax.config.update("jax_platforms", "cpu")
  options = command.options
  piece = open_slice(options.topology)
  mesh = None if options.mesh is None else read_mesh(options.mesh)
  choice = Choice(mesh, options.zero, options.remat, options.microbatches, options.slots)
  experiment = command.function(**command.arguments)
  stage, layers = _stage(experiment, options.stage), options.engine_layers
  with _telling() as tell:
    if options.sweep:
      found = sweep(experiment, stage, piece, choice, options.sweep, tell, layers)
      text, fits = sweep_text(found, piece), found.picks[0].plan.fits
    else:
      plan = plan_stage(experiment, stage, piece, choice, tell=tell, engine_layers=layers)
      text, fits = page(plan), plan.fits
      if options.advice:
        advice = advise(plan, experiment, stage, options.advice, tell, layers)
        text += advice_text(advice, plan)
  print(text)
  return int(not fits)


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
  """Shows on the terminal what is being compiled, and for how long."""
  columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
  with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
    task = progress.add_task("lowering", total=None)
    yield lambda text: progress.reset(task, description=text)


def _stage(experiment: Experiment, name: str | None) -> Any:
  if name is None:
    return [stage for stage in experiment.stages if not isinstance(stage, Evaluate)][-1]
  found = {stage.name: stage for stage in experiment.stages}
  if name not in found:
    raise ValueError(f"stage: expected one of {', '.join(found)}, found {name!r}")
  return found[name]


def parse(argv: Sequence[str]) -> Command:
  """Reads a command line. Prints help or what is wrong with an argument, and exits, as tyro does.

  Raises ValueError when there is no such experiment.
  """
  if not argv or argv[0].startswith("-"):
    print(__doc__)
    raise SystemExit(0 if argv else 2)
  function = load_config(argv[0])
  program, own = f"python -m launch.plan {argv[0]}", _config_arguments(function)
  what = (
    f"Plans {argv[0]}. Besides these options there are the arguments of its config function: {own}"
  )
  options, rest = tyro.cli(
    Options, prog=program, description=what, args=argv[1:], return_unknown_args=True
  )

  @functools.wraps(function)
  def arguments(**given: Any) -> dict[str, Any]:
    return given

  return Command(function, tyro.cli(arguments, prog=program, args=rest), options)


def _config_arguments(function: Callable[..., Experiment]) -> str:
  names = inspect.signature(function).parameters
  return ", ".join(f"--{name.replace('_', '-')}" for name in names)


if __name__ == "__main__":
  sys.exit(main())
