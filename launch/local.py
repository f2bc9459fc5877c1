"""Runs an experiment on the devices of this machine, or goes on with one that was stopped.

  python -m launch.local experiments.NAME --lr 3e-6      arguments are those of the config function
  python -m launch.local experiments.NAME:ABLATION       another function of the same file
  python -m launch.local experiments.NAME --help         all of them, explained

The same arguments go on in the same run folder, runs/NAME/ID. Compiled programs are kept between
runs where JAX_COMPILATION_CACHE_DIR says.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import rich
import rich.box
import rich.table
import tyro

from launch import host
from pt_jax.experiment import Experiment
from pt_jax.loops.pipeline import results_table, run_experiment
from pt_jax.loops.report import REPORT

LONGEST_ID = 100  # characters, of a folder's name


@dataclasses.dataclass(frozen=True)
class Launch:
  """How to run it."""

  runs: Path = Path("runs")
  """Folder of all runs."""
  id: str | None = None
  """Folder of this run; by default made of the arguments. An existing one is gone on with."""
  quiet: bool = False
  """No progress, only the results."""
  cpu_devices: int = 0
  """Devices to make of the CPU; 0: those of a run that goes on, or one a core if batches divide."""
  debug: bool = False
  """A traceback where an error is one line otherwise."""


@dataclasses.dataclass(frozen=True)
class Command:
  """A parsed command line."""

  function: Callable[..., Experiment]
  arguments: Mapping[str, Any]  # of the function, all of them
  launch: Launch

  def experiment(self) -> Experiment:
    """What the config function returns."""
    return self.function(**self.arguments)

  @property
  def id(self) -> str:
    """The run's folder: the arguments that differ from their defaults, and the seed."""
    return self.launch.id or default_id(self.function, self.arguments)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line.

  Returns the exit status: 0; 2 after one line on what was wrong; 130 when stopped by Ctrl-C.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    run(parse(argv))
  except KeyboardInterrupt:
    print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    return 130
  except (ValueError, OSError) as error:
    if "--debug" in argv:
      traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


def run(command: Command) -> None:
  """Runs the experiment and prints its results."""
  experiment, launch = command.experiment(), command.launch
  host.prepare(experiment, launch.runs / experiment.name / command.id, launch.cpu_devices)
  finished = run_experiment(experiment, runs=launch.runs, id=command.id, quiet=launch.quiet)
  if jax.process_index() == 0:
    print_table(results_table(finished.results))
    print(finished.folder / REPORT)


def parse(argv: Sequence[str]) -> Command:
  """Reads a command line. Prints help or what is wrong with an argument, and exits, as tyro does.

  Raises ValueError when there is no such experiment.
  """
  if not argv or argv[0].startswith("-"):
    print(__doc__)
    raise SystemExit(0 if argv else 2)
  function = load_config(argv[0])

  @functools.wraps(function)
  def arguments(**given: Any) -> dict[str, Any]:
    return given

  def command(
    given: Annotated[Any, tyro.conf.arg(name="", constructor=arguments)],
    launch: Annotated[Launch, tyro.conf.arg(name="")],
  ) -> Command:
    return Command(function, given, launch)

  what = (inspect.getdoc(function) or "").split("\nArgs:")[0]
  return tyro.cli(
    command, prog=f"python -m launch.local {argv[0]}", description=what, args=argv[1:]
  )


def load_config(spec: str) -> Callable[..., Experiment]:
  """The config function that "package.module" (its `config`) or "package.module:function" names.

  Raises ValueError when there is no such module or function.
  """
  module_name, _, name = spec.partition(":")
  sys.path.insert(0, "")  # experiments of the working directory, whatever started this process
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
      raise  # something that the experiment needs is missing
    raise ValueError(f"experiment {module_name!r}: no such module{_others(module_name)}") from error
  finally:
    sys.path.pop(0)
  function = getattr(module, name or "config", None)
  if not callable(function):
    raise ValueError(f"experiment {module_name!r}: expected a function {name or 'config'!r} in it")
  return function


def default_id(function: Callable[..., Experiment], arguments: Mapping[str, Any]) -> str:
  """A folder name from the arguments that differ from their defaults, and the seed.

  Example: "lr=0.003,seed=1". A path gives its last part; a hash then stands for the rest.
  """
  defaults = {n: p.default for n, p in inspect.signature(function).parameters.items()}
  told = {n: v for n, v in arguments.items() if v != defaults[n] or n == "seed"}
  text = ",".join(f"{name}={value}" for name, value in told.items()) or "default"
  short = ",".join(f"{name}={str(value).rpartition('/')[2]}" for name, value in told.items())
  name = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", short or text)
  if name != text or len(name) > LONGEST_ID:  # two of them must not become one
    name = f"{name[:LONGEST_ID]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
  return name


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
  """Rows of the same keys, on the terminal."""
  table = rich.table.Table(box=rich.box.SIMPLE)
  for i, column in enumerate(rows[0]):
    table.add_column(column, justify="right" if i else "left")
  for row in rows:
    table.add_row(
      *("" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in row.values())
    )
  rich.print(table)


def _others(module_name: str) -> str:
  """The modules beside one that does not exist, for an error."""
  package = module_name.rpartition(".")[0]
  try:
    found = importlib.import_module(package).__path__ if package else []
  except ModuleNotFoundError:
    return ""
  names = sorted(module.name for module in pkgutil.iter_modules(found))
  return f"; {package} has {', '.join(names)}" if names else ""


if __name__ == "__main__":
  sys.exit(main())
