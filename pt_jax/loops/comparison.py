"""Several runs side by side: a table, their curves, the columns of TensorBoard's HPARAMS tab."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator

from pt_jax.loops.record import read_config
from pt_jax.loops.report import (
  COLORS,
  REPORT,
  Cell,
  Curves,
  Series,
  frame,
  lines,
  markdown_table,
  read_curves,
  write_parts,
)
from pt_jax.metrics import EVENTS, AppendLog, EventWriter

MOST_FIELDS = 12  # that differ, shown in the table of results; more have a table of their own
TOKENS, SECONDS = "rollout/tokens", "perf/step_seconds"


def write_comparison(
  folder: str | os.PathLike[str],
  title: str,
  runs: Sequence[str | os.PathLike[str]],
  metrics: Sequence[str],
) -> Path:
  """Writes a report that sets several runs side by side, and the columns of their HPARAMS tab.

  Beside the metrics the table says what a run cost, where it logged that: tokens sampled, and the
  seconds of its online steps.

  Args:
    folder: of the report; above those of the runs if TensorBoard is to show them together.
    title: first line.
    runs: run folders.
    metrics: to compare, as STAGE/NAME.

  Returns the path of the report. Raises ValueError on a metric that no run logged.
  """
  folder = Path(folder)
  read = {os.path.relpath(run, folder): read_curves(run) for run in runs}
  curves = {run: _by_tag(stages) for run, stages in read.items()}
  for tag in metrics:
    if not any(tag in tags for tags in curves.values()):
      raise ValueError(f"comparison: metric {tag!r}: expected at least one run to have logged it")
  folder.mkdir(parents=True, exist_ok=True)
  configs = {os.path.relpath(run, folder): read_config(run) for run in runs}
  differing = differences(list(configs.values()))
  few = differing if len(differing) <= MOST_FIELDS else []
  rows: list[dict[str, Cell]] = []
  for run, config in configs.items():
    last = {tag: float(curves[run][tag][1][-1]) if tag in curves[run] else None for tag in metrics}
    fields = {field: config.get(field) for field in few}
    rows.append({"run": run, **fields, **last, **_costs(read[run])})
  parts = [f"# {title}", "Metrics: their last logged value.", markdown_table(rows)]
  names = short_names(list(configs))
  for tag in metrics:
    name = f"compare_{re.sub('[^A-Za-z0-9]+', '_', tag)}.png"
    series = {names[run]: tags[tag] for run, tags in curves.items() if tag in tags}
    draw_comparison(tag, series).savefig(folder / name)
    parts += [f"## {tag}", f"![{tag}]({name})"]
  if not few and differing:
    fields = [
      {"argument": field, **{names[run]: config.get(field) for run, config in configs.items()}}
      for field in differing
    ]
    parts += ["## What differs", markdown_table(fields)]
  log = AppendLog(folder / EVENTS)
  EventWriter(log).experiment(list(configs.values()), metrics)
  log.close()
  return write_parts(folder / REPORT, parts)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fields whose values differ between flat configs, or that some do not have."""
  fields = dict.fromkeys(field for config in configs for field in config)
  return [
    f for f in fields if len({json.dumps(c.get(f, "absent"), sort_keys=True) for c in configs}) > 1
  ]


def short_names(runs: Sequence[str]) -> dict[str, str]:
  """Run ids without the arguments that all of them have, and without the hash behind them; the
  values alone where only one argument is left.

  Example: "algorithm=ppo,lr=0.1,seed=0-1a2b3c4d" among others of that lr -> "algorithm=ppo,seed=0".
  """
  parts = {run: re.sub("-[0-9a-f]{8}$", "", run).split(",") for run in runs}
  shared = set.intersection(*map(set, parts.values()))
  left = {run: [p for p in own if p not in shared] for run, own in parts.items()}
  if len({tuple(p.partition("=")[0] for p in own) for own in left.values()} - {()}) == 1:
    left = {
      run: [p.partition("=")[2] for p in own if len(own) == 1] or own for run, own in left.items()
    }
  short = {run: ",".join(own) or run for run, own in left.items()}
  return short if len(set(short.values())) == len(runs) else {run: run for run in runs}


def draw_comparison(tag: str, series: Mapping[str, Series]) -> Figure:
  """One metric: a line for each run, or bars where every run logged it once."""
  single = len(series) > 1 and all(len(steps) == 1 for steps, _ in series.values())
  height = max(2.4, 0.3 * len(series) + 1) if single else 4.4 + 0.12 * len(series)
  figure = Figure(figsize=(7, height), dpi=120, layout="constrained")
  figure.suptitle(tag, fontsize=12, fontweight="bold")
  axes, name = figure.subplots(), tag.partition("/")[2]
  frame(axes, f"{tag.partition('/')[0]} step", name)
  if not single:
    lines(axes, series)
    return figure
  ordered = sorted(series, key=lambda run: series[run][1][-1])
  values = [float(series[run][1][-1]) for run in ordered]
  bars = axes.barh(range(len(ordered)), values, color=COLORS[0], height=0.7)
  axes.set_yticks(range(len(ordered)), ordered)
  axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
  axes.xaxis.set_major_locator(AutoLocator())
  axes.set(xlabel=name, ylabel="")
  axes.margins(x=0.12)
  return figure


def _costs(stages: Curves) -> dict[str, Cell]:
  """Tokens sampled and seconds of the online steps, of all stages that logged them."""
  tokens = [float(m[TOKENS][1][-1]) for m in stages.values() if TOKENS in m]
  seconds = [float(m[SECONDS][1].sum()) for m in stages.values() if SECONDS in m]
  costs: dict[str, Cell] = {"tokens sampled": int(sum(tokens))} if tokens else {}
  return costs | ({"seconds": round(sum(seconds))} if seconds else {})


def _by_tag(curves: Curves) -> dict[str, Series]:
  return {f"{s}/{m}": series for s, metrics in curves.items() for m, series in metrics.items()}
