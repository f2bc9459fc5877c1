"""`report.md`: what a run did, in a table, pictures and samples.

Everything is read from the run folder (metrics.jsonl, samples.jsonl, config.json), so a report can
be written again at any time, of a run that was killed too. A picture shows the metrics whose names
match its patterns, one panel for each stage that logged some; a picture without any is left out.
"""

import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pt_jax.loops.diagnose import diagnose
from pt_jax.loops.record import CONFIG, read_config
from pt_jax.metrics import (
  METRICS,
  SAMPLES,
  read_jsonl,
  samples_markdown,
)

REPORT = "report.md"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")  # Okabe-Ito
DASHES = ("-", "--", ":", "-.")  # the next one each time the colours are used up
SPARSE = 40  # up to so many points are shown as dots; more as a thin line with its running mean
SAMPLES_SHOWN = 2  # of the first and of the last sampled step of every stage
SAMPLE_CHARACTERS = 1500  # of a prompt or completion

CAPTION = "Thin lines are single steps, thick ones their running mean, dots single evaluations."

Cell = str | int | float | bool | None
Series = tuple[np.ndarray, np.ndarray]  # steps, values
Curves = dict[str, dict[str, Series]]  # stage -> metric -> series


@dataclasses.dataclass(frozen=True)
class Picture:
  """One figure of a report, saved as NAME.png."""

  name: str
  title: str
  unit: str  # of the y axis
  metrics: tuple[str, ...]  # patterns as in a shell: "reward/*"
  stacked: bool = False  # shares of a whole, as areas
  shared_y: bool = False  # whether stages have one scale


class Drawn(NamedTuple):
  """A figure that is not of logged metrics, saved as NAME.png."""

  name: str
  title: str
  figure: Figure


PICTURES = (
  Picture("loss", "Loss", "loss", ("loss", "*/nats_per_token", "eval/loss")),
  Picture(
    "accuracy",
    "Held-out accuracy",
    "fraction right",
    ("*pass@*", "eval/greedy", "eval/*accuracy"),
    shared_y=True,
  ),
  Picture("reward", "Reward and its components", "mean per completion", ("reward", "reward/*")),
  Picture("length", "Completion length", "tokens", ("length", "length/*")),
  Picture("stop", "Why completions ended", "fraction of completions", ("stop/*",), stacked=True),
  Picture("entropy", "Entropy of the policy", "nats per token", ("entropy", "*/entropy")),
  Picture("kl", "KL divergence", "nats per token", ("kl", "*kl", "*kl/*")),
  Picture("clip", "Tokens silenced by the clip", "fraction of tokens", ("*clip_fraction*",)),
  Picture("gap", "Log-prob, rollout against trainer", "nats, absolute", ("*logprob_gap*",)),
  Picture("gradient", "Gradient norm", "L2 norm", ("*grad_norm",)),
  Picture("speed", "Speed", "tokens per second", ("perf/*tokens_per_second",)),
)


def write_report(
  folder: str | os.PathLike[str],
  title: str,
  rows: Sequence[Mapping[str, Cell]],
  pictures: Sequence[Picture] = PICTURES,
  drawn: Sequence[Drawn] = (),
) -> Path:
  """Writes report.md and its pictures into a run folder.

  Args:
    folder: of the run.
    title: first line.
    rows: of the table of results; a column for each key.
    pictures: to draw, in this order.
    drawn: figures that stand behind them.

  Returns the path of the report.
  """
  folder = Path(folder)
  curves = read_curves(folder)
  parts = [f"# {title}", _provenance(folder), markdown_table(rows), CAPTION, *_diagnosis(curves)]
  figures = [(p.name, p.title, draw(p, curves)) for p in pictures]
  for name, heading, figure in (*figures, *drawn):
    if figure is not None:
      figure.savefig(folder / f"{name}.png")
      parts += [f"## {heading}", f"![{heading}]({name}.png)"]
  parts += _samples(read_jsonl(folder / SAMPLES))
  config = [{"argument": k, "value": json.dumps(v)} for k, v in read_config(folder).items()]
  parts += ["## Configuration", markdown_table(config)]
  return write_parts(folder / REPORT, parts)


def read_curves(folder: str | os.PathLike[str]) -> Curves:
  """{stage: {metric: (steps, values)}} of a run, stages in the order in which they ran."""
  points: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for row in read_jsonl(Path(folder) / METRICS):
    stage = points.setdefault(row.pop("stage"), {})
    step = row.pop("step")
    for metric, value in row.items():
      stage.setdefault(metric, []).append((step, value))
  return {
    stage: {metric: (np.array(p)[:, 0], np.array(p)[:, 1]) for metric, p in metrics.items()}
    for stage, metrics in points.items()
  }


def markdown_table(rows: Sequence[Mapping[str, Cell]]) -> str:
  """A markdown table with a column for every key, in order of appearance; "" without rows."""
  if not rows:
    return ""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  numeric = [all(isinstance(r.get(c), int | float | None) for r in rows) for c in columns]
  lines = [columns, ["---:" if right else "---" for right in numeric]]
  lines += [[_cell(row.get(column)) for column in columns] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(picture: Picture, curves: Curves) -> Figure | None:
  """The figure, a panel for each stage that logged a metric of the picture; None when none did."""
  panels = _panels(picture, curves)
  if not panels:
    return None
  figure = Figure(
    figsize=(7 if len(panels) == 1 else 5 * len(panels), 3.8), dpi=120, layout="constrained"
  )
  figure.suptitle(picture.title, fontsize=12, fontweight="bold")
  grid = figure.subplots(1, len(panels), squeeze=False, sharey=picture.shared_y)
  for axes, (stage, metrics) in zip(grid[0], panels.items()):
    frame(axes, f"{stage} step", picture.unit)
    (_areas if picture.stacked else lines)(axes, _short_names(metrics))
  return figure


def _panels(picture: Picture, curves: Curves) -> Curves:
  """What each stage logged for the picture. What a stage that only evaluates found out is where the
  stage right behind it begins, if that trains: it becomes step 0 of that panel."""
  panels: Curves = {}
  last = None  # the stage before this one, when it only evaluated
  for stage, metrics in curves.items():
    found = _matching(picture.metrics, metrics)
    only = all(list(steps) == [0] for steps, _ in found.values())
    if last and not only and panels[last].keys() <= found.keys():
      for name, (_, first) in panels.pop(last).items():
        steps, values = found[name]
        found[name] = np.concatenate([[0], steps]), np.concatenate([first, values])
    if found:
      panels[stage] = found
    last = stage if found and only else None
  return panels


def lines(axes: Axes, series: Mapping[str, Series]) -> None:
  """Draws curves of (steps, values), a color each; those of few points with dots."""
  if all(len(steps) == 1 for steps, _ in series.values()):
    at = np.concatenate([steps for steps, _ in series.values()])
    axes.set_xlim(at.min() - 1, at.max() + 1)
  for i, (name, (steps, values)) in enumerate(series.items()):
    style = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
    if len(steps) <= SPARSE:
      axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.5, label=name, **style)
    else:
      axes.plot(steps, values, linewidth=0.7, alpha=0.3, color=style["color"])
      axes.plot(steps, running_mean(values), linewidth=1.8, label=name, **style)
  _legend(axes)


def _areas(axes: Axes, series: Mapping[str, Series]) -> None:
  steps = np.unique(np.concatenate([steps for steps, _ in series.values()]))
  layers = [np.interp(steps, *one) for one in series.values()]
  axes.stackplot(steps, layers, labels=list(series), colors=COLORS, alpha=0.85, linewidth=0)
  axes.margins(0)
  _legend(axes)


def running_mean(values: np.ndarray) -> np.ndarray:
  """Mean over the nearest 15th of the series, less at its ends; NaN and infinity are left out."""
  half = max(1, len(values) // 30)
  good = np.isfinite(values)
  total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
  count = np.concatenate([[0], np.cumsum(good)])
  at = np.arange(len(values))
  low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
  with np.errstate(invalid="ignore"):
    return (total[high] - total[low]) / (count[high] - count[low])


def frame(axes: Axes, x: str, y: str) -> None:
  """Labels the axes and draws their grid."""
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(color="#dddddd", linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no factor above the axis


def _legend(axes: Axes) -> None:
  """Above the panel, where it hides nothing."""
  lines = len(axes.get_legend_handles_labels()[1])
  columns = 1 if lines == 1 else 2 if lines == 4 else 3
  axes.legend(
    frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0
  )


def _matching(patterns: Sequence[str], metrics: Mapping[str, Series]) -> dict[str, Series]:
  return {m: s for m, s in metrics.items() if any(fnmatch.fnmatchcase(m, p) for p in patterns)}


def _short_names(metrics: Mapping[str, Series]) -> dict[str, Series]:
  """Without the folder that all of several names share."""
  folders = {name.rpartition("/")[0] for name in metrics}
  shared = f"{min(folders)}/" if len(folders) == 1 and len(metrics) > 1 else ""
  return {name.removeprefix(shared): series for name, series in metrics.items()}


def _cell(value: Cell) -> str:
  if value is None:
    return ""
  if isinstance(value, float):
    return f"{value:.4g}" if math.isfinite(value) else str(value)
  return str(value).replace("|", "\\|").replace("\n", " ")


def _provenance(folder: Path) -> str:
  """One line: which run, which commit, on what."""
  here = json.loads((folder / CONFIG).read_text())["environments"][-1]
  commit = (here["commit"] or "no commit")[:12] + (" (modified)" if here["modified"] else "")
  devices = f"{here['devices']} x {here['device']}"
  run = f"{folder.parent.name}/{folder.name}"
  return f"`{run}` · {commit} · jax {here['versions']['jax']} · {devices}"


def _diagnosis(curves: Curves) -> list[str]:
  """A section with what the logs show of failures, or that they show none."""
  found = [(stage, finding) for stage, curve in curves.items() for finding in diagnose(curve)]
  rows = [{"stage": stage, **dataclasses.asdict(finding)} for stage, finding in found]
  return ["## Diagnosis", markdown_table(rows) or "Nothing found."]


def _samples(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Sections with samples of the first and of the last sampled step of every stage."""
  parts = []
  for stage in dict.fromkeys(row["stage"] for row in rows):
    of_stage = [row for row in rows if row["stage"] == stage]
    for step in sorted({of_stage[0]["step"], of_stage[-1]["step"]}):
      chosen = [row for row in of_stage if row["step"] == step][:SAMPLES_SHOWN]
      parts += [f"## Samples: {stage}, step {step}", samples_markdown(map(_sample, chosen))]
  return parts


def _sample(row: dict[str, Any]) -> dict[str, Any]:
  cut = lambda v: v[:SAMPLE_CHARACTERS] + " [...]" if len(str(v)) > SAMPLE_CHARACTERS else v
  return {name: cut(value) for name, value in row.items() if name not in ("stage", "step")}


def write_parts(path: Path, parts: Sequence[str]) -> Path:
  """Writes the parts that say something, a blank line between them; returns the path."""
  path.write_text("\n\n".join(part for part in parts if part) + "\n")
  return path
