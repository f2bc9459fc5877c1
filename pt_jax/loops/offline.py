"""The offline loop: batches -> steps, with evaluation, samples, early stop and checkpoints.

What it trains is a `Training`, which the modules of the kinds of stage make (`supervised`,
`preference`...). The metrics of a step are fetched when the next one has been dispatched, so the
device never waits for the host. Before an evaluation, samples or a checkpoint the pending ones are
fetched first: a checkpoint stands for everything up to its step, so a resumed run repeats and loses
nothing.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pt_jax.data import pipeline
from pt_jax.data.tokenizers import IncrementalDetokenizer
from pt_jax.experiment import Offline, OfflineData
from pt_jax.loops.batches import data_host, device_batch, global_batch
from pt_jax.loops.context import Context, in_stage
from pt_jax.loops.diagnostics import EarlyStopping, completions_of, sample_metrics
from pt_jax.loops.progress import Progress
from pt_jax.loops.run import HELD_OUT
from pt_jax.losses.reduce import Sum
from pt_jax.metrics import check_finite
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import StopReason
from pt_jax.steps.state import Creator
from pt_jax.weights import Params

SAMPLE_SLOTS = 64  # periodic samples decoded at once

METRICS = (  # of every step of every kind of stage
  "loss",
  *(f"optimizer/{name}" for name in ("grad_norm", "update_norm", "learning_rate")),
  *(f"data/{name}" for name in ("tokens", "targets", "packing")),
  *(f"data/{name}" for name in ("examples", "dropped", "truncated", "epoch")),
  "perf/tokens_per_second",
  "perf/seconds_since_last_log",
)


class Evaluation(NamedTuple):
  """What the held-out rows of one batch give; made by a jitted function."""

  sums: dict[str, Sum]  # add up over batches
  at: jax.Array | None = None  # [B, S] bool, the positions whose outputs are kept
  outputs: Mapping[str, jax.Array] = {}  # name -> [B, S, ...], the same on all devices


class Outputs(NamedTuple):
  """The kept positions of all held-out rows, in the order of the rows."""

  rows: np.ndarray  # [n] int64, index of the held-out row
  values: dict[str, np.ndarray]  # name -> [n, ...]


@dataclasses.dataclass(frozen=True)
class Training:
  """What a kind of stage brings to the loop."""

  context: Context  # its `table` and `params` are those that are trained
  updater: Creator  # makes the state that `update` takes
  # (state, batch with leaves [A, B, S]) -> (state, metrics); the state may be donated
  update: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Any], Evaluation]  # (state, batch with leaves [B, S])
  # (means of the sums, outputs) -> the figures that are logged, under eval/
  figures: Callable[[dict[str, float], Outputs], dict[str, float]]
  shown: Mapping[str, str]  # on the progress bar: label -> metric
  # (metrics of a step) -> more of them, computed on the host
  derived: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: {}
  histograms: tuple[str, ...] = ()  # outputs whose distribution goes to TensorBoard


class Pending(NamedTuple):
  """The metrics of a step that was dispatched, to be logged later."""

  step: int
  metrics: dict[str, jax.Array]
  counts: dict[str, float]  # of the data, after this step's batch


def run_offline(
  stage: Offline, data: OfflineData, training: Training
) -> tuple[Params, dict[str, float]]:
  """Runs or resumes an offline stage.

  Args:
    stage: its options.
    data: what it trains on; `data.encode` must be the one that `training` expects.
    training: what is specific to its kind.

  Returns the parameters it ends with and its last held-out evaluation, under `eval/`.

  Raises ValueError for data that cannot be trained on, and for a loss or gradient that is not
  finite (before a checkpoint of that step is written).
  """
  with in_stage(stage.name):
    loop = _Loop(stage, data, training)
  context = training.context
  with context.progress(stage.optimizer.steps, loop.done) as progress, in_stage(stage.name):
    loop.run(progress)
  return loop.state.params, loop.results


class _Loop:
  """What an offline stage carries from step to step."""

  def __init__(self, stage: Offline, data: OfflineData, training: Training):
    self.stage, self.data, self.training = stage, data, training
    self.context = context = training.context
    self.total = stage.optimizer.steps
    self.host = data_host(context.mesh)
    self.state, saved = context.start(training.updater)
    host: dict[str, Any] = saved.host if saved else {}
    self.done = saved.step if saved else 0
    self.batches = iter(
      pipeline.train_batches(data.train, data.encode, stage.layout, host=self.host, form=data.form)
    )
    if saved:
      self.batches.set_state(host["batches"])
    self.stopping = EarlyStopping(stage.stop, host.get("stopping"))
    self.evaluated: dict[str, Any] = host.get("evaluated", {"step": None, "metrics": {}})
    self.sampled: int | None = host.get("sampled")
    self._engine: Engine | None = None
    self._pending: Pending | None = None
    self._logged_at = time.perf_counter()

  @property
  def results(self) -> dict[str, float]:
    """The last held-out evaluation, and after how many steps."""
    return {"steps": float(self.done), **self.evaluated["metrics"]}

  def run(self, progress: Progress) -> None:
    """Trains until the end or an early stop, then evaluates, samples and saves once more."""
    stage = self.stage
    if self.done == 0 and stage.evaluate_every:
      self._evaluate()
    while self.done < self.total and not self.stopping.reason:
      self._step(progress)
      if due(self.done, stage.evaluate_every):
        self._flush(progress)
        self._evaluate()
      if due(self.done, stage.sample_every):
        self._flush(progress)
        self._sample()
      if due(self.done, stage.checkpoint_every):
        self._flush(progress)
        self._save()
    self._flush(progress)
    self._finish()

  def _step(self, progress: Progress) -> None:
    """Dispatches one update, then logs the one before."""
    batch = device_batch(next(self.batches), self.stage.microbatches, self.context.mesh)
    self.state, metrics = self.training.update(self.state, batch)
    self.done += 1
    self._flush(progress)
    self._pending = Pending(self.done, metrics, self.batches.counts)

  def _flush(self, progress: Progress) -> None:
    """Waits for the pending metrics, checks and logs them."""
    if self._pending is None:
      return
    (step, fetched, counts), self._pending = self._pending, None
    metrics = {name: value.item() for name, value in jax.device_get(fetched).items()}
    check_finite(metrics, step)
    metrics |= self.training.derived(metrics)
    metrics |= {f"data/{name}": value for name, value in counts.items()}
    shown = {label: metrics[name] for label, name in self.training.shown.items()}
    progress.update(step, tokens=metrics["data/tokens"], **shown)
    if step % self.stage.log_every == 0 or step == self.total:
      now = time.perf_counter()
      metrics["perf/tokens_per_second"] = progress.tokens_per_second
      metrics["perf/seconds_since_last_log"] = now - self._logged_at
      self._logged_at = now
      self._log(step, metrics)

  def _log(self, step: int, metrics: dict[str, float]) -> None:
    self.context.stage.log(step, metrics)
    self.stopping.update(step, metrics)

  def _evaluate(self) -> None:
    """The figures of all held-out rows."""
    sums, outputs = self._held_out()
    means = {name: value.mean().item() for name, value in sums.items()}
    metrics = self.training.figures(means, outputs)
    check_finite(metrics, self.done)
    self.evaluated = {"step": self.done, "metrics": metrics}
    self._log(self.done, metrics)
    for name in self.training.histograms:
      self.context.stage.histogram(self.done, f"eval/{name}", outputs.values[name])
    if outputs.values:
      self.context.stage.save_outputs({"rows": outputs.rows, **outputs.values})

  def _held_out(self) -> tuple[dict[str, Sum], Outputs]:
    """One pass over the held-out rows."""
    stage, mesh = self.stage, self.context.mesh
    layout = dataclasses.replace(
      stage.layout, batch_size=stage.layout.batch_size // stage.microbatches
    )
    batches = iter(
      pipeline.eval_batches(
        self.data.held_out, self.data.encode, layout, host=self.host, form=self.data.form
      )
    )
    parts: list[tuple[np.ndarray, Evaluation]] = []
    for batch in batches:
      part = self.training.evaluate(self.state, global_batch(batch, mesh))
      parts[-1:] = jax.device_get(parts[-1:])  # what was dispatched before: one waits, not many
      parts.append((batches.numbers, part))
    parts = jax.device_get(parts)
    sums = parts[0][1].sums  # a source has at least one row
    for _, part in parts[1:]:
      sums = {name: sums[name] + part.sums[name] for name in sums}
    return sums, _in_order(parts)

  def _sample(self) -> None:
    """Completions of the data's prompts, and what they say about diversity and leakage."""
    prompts, sampling = self.data.prompts, self.stage.sampling
    assert sampling is not None  # see `Offline`
    if self._engine is None:
      self._engine = self._new_engine(max(map(len, prompts)) + sampling.max_tokens)
    self._engine.update(self.state.params, self.done)
    key = self.context.key("samples", self.done)
    rollouts = self._engine.generate(prompts, sampling, key=key)
    completions = completions_of(rollouts)
    stops = [StopReason(int(stop)) for stop in np.asarray(rollouts.stop)]
    decode = self.context.tokenizer.decode
    self.context.stage.samples(
      self.done,
      [
        {"prompt": decode(prompt), "completion": decode(tokens), "stop": stop.name.lower()}
        for prompt, tokens, stop in zip(prompts, completions, stops)
      ],
    )
    self.sampled = self.done
    self._log(self.done, sample_metrics(completions, stops, self.context.tokenizer))

  def _new_engine(self, max_length: int) -> Engine:
    parts = self.context.mesh.shape["data"] * self.context.mesh.shape["expert"]
    slots = min(len(self.data.prompts), SAMPLE_SLOTS)
    return Engine(
      self.context.config,
      self.state.params,
      slots=-(-slots // parts) * parts,
      max_length=max_length,
      detokenizer=functools.partial(IncrementalDetokenizer, self.context.tokenizer),
    )

  def _save(self) -> None:
    host = {
      "batches": self.batches.get_state(),
      "stopping": self.stopping.state(),
      "evaluated": self.evaluated,
      "sampled": self.sampled,
    }
    self.context.stage.save(self.done, self.state, host)

  def _finish(self) -> None:
    """What the last step still owes."""
    told = jax.process_index() == 0 and not self.context.quiet
    if told and self.stopping.reason and self.done < self.total:
      print(f"{self.stage.name}: stopped early: {self.stopping.reason}", file=sys.stderr)
    if self.evaluated["step"] != self.done:
      self._evaluate()
    if self.stage.sample_every and self.sampled != self.done:
      self._sample()
    if self.context.stage.latest_step() != self.done:
      self._save()


def read_outputs(folder: Path, stage: str) -> Outputs | None:
  """What a stage of the run in `folder` kept of its last held-out evaluation, if it kept any."""
  path = folder / HELD_OUT / f"{stage}.npz"
  if not path.exists():
    return None
  with np.load(path) as arrays:
    values = {name: arrays[name] for name in arrays.files}
  return Outputs(values.pop("rows"), values)


def counted(batch: Any) -> dict[str, jax.Array]:
  """The metrics of every step that say what a batch holds: its tokens, targets and how full it is;
  for the jitted update of a kind."""
  held = (batch.segment_ids >= 0).sum()
  counts = {"data/tokens": held, "data/targets": (batch.mask > 0).sum()}
  return counts | {"data/packing": held / batch.tokens.size}


def due(step: int, every: int) -> bool:
  """Whether what happens `every` so many steps (0: never) happens after `step` of them."""
  return every > 0 and step % every == 0


def _in_order(parts: list[tuple[np.ndarray, Evaluation]]) -> Outputs:
  """The kept positions of all batches, sorted by held-out row."""
  rows: list[np.ndarray] = []
  values: dict[str, list[np.ndarray]] = {}
  for numbers, part in parts:
    if part.at is None:
      continue
    rows.append(numbers[part.at])
    for name, output in part.outputs.items():
      values.setdefault(name, []).append(np.asarray(output)[part.at])
  if not rows:
    return Outputs(np.zeros(0, np.int64), {})
  found = np.concatenate(rows)
  order = np.argsort(found, kind="stable")
  return Outputs(found[order], {n: np.concatenate(v)[order] for n, v in values.items()})
