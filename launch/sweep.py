"""Runs an experiment over a grid of its arguments, a run folder each, and compares the runs.

  python -m launch.sweep experiments.NAME --lr 1e-3 3e-4 --seed 0 1 2

Every argument may have several values; the grid is all their combinations. The runs are those of
launch.local: one after the other, each in a process of its own, so one that fails does not stop the
others, and the same command goes on where it was stopped. The comparison is runs/NAME/report.md,
and TensorBoard on runs/NAME, its HPARAMS tab. What is compared are the figures of the last stage;
--compare STAGE/METRIC... chooses others. Tokens sampled and seconds are told beside them.
"""

import itertools
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from launch import local
from pt_jax.loops.comparison import write_comparison
from pt_jax.loops.report import REPORT, read_curves

ONLINE = ("eval/pass@1", "eval/greedy", "reward/correct", "length/mean", "policy/entropy")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a sweep.

  Returns the exit status: 0; 1 when some runs failed; 2 after one line on what was wrong.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    return run(argv)
  except KeyboardInterrupt:
    print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    return 130
  except (ValueError, OSError) as error:
    if "--debug" in argv:
      traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run(argv: Sequence[str]) -> int:
  """Runs a sweep's command line; returns the exit status. Raises ValueError for a wrong one."""
  if not argv or argv[0].startswith("-"):
    print(__doc__)
    return 0 if argv else 2
  spec, options = argv[0], read_options(argv[1:])
  compared = options.pop("--compare", [])
  commands = [[spec, *arguments] for arguments in grid(options)]
  folders = [_folder(local.parse(command)) for command in commands]  # all are right before one runs
  _check_distinct(folders, commands)
  done = []
  for number, (command, folder) in enumerate(zip(commands, folders), start=1):
    print(f"run {number}/{len(commands)}: {folder}", flush=True)
    if start(command):
      print(f"failed: {' '.join(command)}", file=sys.stderr)
    else:
      done.append(folder)
  if done:
    title = f"{spec}: {len(done)} runs"
    write_comparison(done[0].parent, title, done, compared or default_metrics(done[0]))
    print(done[0].parent / REPORT)
  return int(len(done) < len(commands))


def start(command: Sequence[str]) -> int:
  """Runs a command line of launch.local in a process of its own; returns its exit status."""
  return subprocess.run([sys.executable, "-m", "launch.local", *command], check=False).returncode


def read_options(argv: Sequence[str]) -> dict[str, list[str]]:
  """["--lr", "1", "2", "--packed"] -> {"--lr": ["1", "2"], "--packed": []}.

  Raises ValueError on a value without an argument, and an argument given twice.
  """
  options: dict[str, list[str]] = {}
  for word in argv:
    if word.startswith("--"):
      name, equals, value = word.partition("=")
      if name in options:
        raise ValueError(f"sweep: {name}: expected once with all its values, found twice")
      options[name] = [value] if equals else []
    elif not options:
      raise ValueError(f"sweep: expected --ARGUMENT before its values, found {word!r}")
    else:
      options[next(reversed(options))].append(word)
  return options


def grid(options: dict[str, list[str]]) -> list[list[str]]:
  """The command lines of all combinations, the last argument varying fastest."""
  choices = [[[name, value] for value in values] or [[name]] for name, values in options.items()]
  return [list(itertools.chain(*chosen)) for chosen in itertools.product(*choices)]


def default_metrics(folder: Path) -> list[str]:
  """What to compare, as STAGE/METRIC: of the last stage of a run the learning curves and held-out
  scores of RL, else its held-out figures, else its loss."""
  stage, curves = list(read_curves(folder).items())[-1]
  rl = [name for name in ONLINE if name in curves]
  held_out = [name for name in curves if name.startswith("eval/")]
  chosen = rl if "eval/pass@1" in rl else held_out or ["loss"]
  return [f"{stage}/{name}" for name in chosen]


def _folder(command: local.Command) -> Path:
  return command.launch.runs / command.experiment().name / command.id


def _check_distinct(folders: Sequence[Path], commands: Sequence[Sequence[str]]) -> None:
  seen: dict[Path, Sequence[str]] = {}
  for folder, command in zip(folders, commands):
    if folder in seen:
      both = f"{' '.join(seen[folder][1:])!r} and {' '.join(command[1:])!r}"
      raise ValueError(f"sweep: expected a folder for each run, found {folder} for {both}")
    seen[folder] = command


if __name__ == "__main__":
  sys.exit(main())
