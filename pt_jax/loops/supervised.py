"""The supervised loop: batches -> steps, with evaluation, samples, early stop and checkpoints.

The metrics of a step are fetched when the next one has been dispatched, so the device never waits
for the host. Before an evaluation, samples or a checkpoint the pending ones are fetched first: a
checkpoint stands for everything up to its step, so a resumed run repeats and loses nothing.
"""

import dataclasses
import functools
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.data import pipeline
from pt_jax.data.batch import Batch
from pt_jax.data.tokenizers import IncrementalDetokenizer
from pt_jax.experiment import Supervised, SupervisedData
from pt_jax.loops.batches import data_host, device_batch, global_batch
from pt_jax.loops.context import Context, in_stage
from pt_jax.loops.diagnostics import EarlyStopping, completions_of, perplexity, sample_metrics
from pt_jax.loops.progress import Progress
from pt_jax.losses.reduce import Reduction, Sum
from pt_jax.metrics import check_finite
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import StopReason
from pt_jax.sharding import Layout
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.state import TrainState, Updater
from pt_jax.steps.supervised import sft_evaluate, sft_step
from pt_jax.weights import Params

SAMPLE_SLOTS = 64  # periodic samples decoded at once

_OF_TOKENS = ("nats_per_token", "accuracy", "entropy", "perplexity")
METRICS = (  # of every step
  "loss",
  *(f"loss/{name}" for name in _OF_TOKENS),
  *(f"optimizer/{name}" for name in ("grad_norm", "update_norm", "learning_rate")),
  *(f"data/{name}" for name in ("tokens", "targets", "packing")),
  *(f"data/{name}" for name in ("examples", "dropped", "truncated", "epoch")),
  "perf/tokens_per_second",
  "perf/seconds_since_last_log",
)
EVALUATION_METRICS = tuple(f"eval/{name}" for name in _OF_TOKENS)


def run_supervised(stage: Supervised, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes a supervised stage.

  Returns the parameters it ends with and its last held-out evaluation, under `eval/`.

  Raises ValueError for data that cannot be trained on, and for a loss or gradient that is not
  finite (before a checkpoint of that step is written).
  """
  loop = _Loop(stage, context)
  with context.progress(stage.optimizer.steps, loop.done) as progress, in_stage(stage.name):
    loop.run(progress)
  return loop.state.params, loop.results


@functools.cache
def compiled_step(
  config: ModelConfig, optimizer: AdamW, layout: Layout, reduction: Reduction
) -> Any:
  """The jitted, donated (state, batch with leaves [A, B, S]) -> (state, metrics)."""
  updater = Updater(optimizer, decoder.table(config), layout)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    state, metrics = sft_step(state, batch, config=config, updater=updater, reduction=reduction)
    del metrics["loss/weight"]  # tokens or segments, as the reduction has it
    held = jnp.sum(batch.segment_ids >= 0)
    counts = {"data/tokens": held, "data/targets": jnp.sum(batch.mask > 0)}
    return state, metrics | counts | {"data/packing": held / batch.tokens.size}

  return jax.jit(step, donate_argnums=0)


@functools.cache
def compiled_evaluation(config: ModelConfig) -> Any:
  """The jitted (params, batch with leaves [B, S]) -> Sums."""
  return jax.jit(functools.partial(sft_evaluate, config=config))


class Pending(NamedTuple):
  """The metrics of a step that was dispatched, to be logged later."""

  step: int
  metrics: dict[str, jax.Array]
  counts: dict[str, float]  # of the data, after this step's batch


class _Loop:
  """What a supervised stage carries from step to step."""

  def __init__(self, stage: Supervised, context: Context):
    self.stage, self.context = stage, context
    self.total = stage.optimizer.steps
    self.data: SupervisedData = stage.data(context.tokenizer)
    self.host = data_host(context.mesh)
    updater = Updater(stage.optimizer, context.table, context.layout)
    self.state, saved = context.start(updater)
    host: dict[str, Any] = saved.host if saved else {}
    self.done = saved.step if saved else 0
    self.batches = iter(
      pipeline.train_batches(self.data.train, self.data.encode, stage.layout, host=self.host)
    )
    if saved:
      self.batches.set_state(host["batches"])
    self.stopping = EarlyStopping(stage.stop, host.get("stopping"))
    self.evaluated: dict[str, Any] = host.get("evaluated", {"step": None, "metrics": {}})
    self.sampled: int | None = host.get("sampled")
    self._update = compiled_step(context.config, stage.optimizer, context.layout, stage.reduction)
    self._evaluate_batch = compiled_evaluation(context.config)
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
    self.state, metrics = self._update(self.state, batch)
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
    metrics["loss/perplexity"] = perplexity(metrics["loss/nats_per_token"])
    metrics |= {f"data/{name}": value for name, value in counts.items()}
    loss = {"loss": metrics["loss"], "accuracy": metrics["loss/accuracy"]}
    progress.update(step, tokens=metrics["data/tokens"], **loss)
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
    """The mean over all held-out tokens."""
    layout = dataclasses.replace(
      self.stage.layout, batch_size=self.stage.layout.batch_size // self.stage.microbatches
    )
    sums: dict[str, Sum] | None = None
    for batch in pipeline.eval_batches(
      self.data.held_out, self.data.encode, layout, host=self.host
    ):
      part = self._evaluate_batch(self.state.params, global_batch(batch, self.context.mesh))
      sums = part if sums is None else {name: sums[name] + part[name] for name in sums}
    assert sums is not None  # a source has at least one row
    means = {name: value.mean().item() for name, value in jax.device_get(sums).items()}
    metrics = {f"eval/{name.removeprefix('loss/')}": value for name, value in means.items()}
    check_finite(metrics, self.done)
    metrics["eval/perplexity"] = perplexity(metrics["eval/nats_per_token"])
    self.evaluated = {"step": self.done, "metrics": metrics}
    self._log(self.done, metrics)

  def _sample(self) -> None:
    """Completions of the data's prompts, and what they say about diversity and leakage."""
    prompts, sampling = self.data.prompts, self.stage.sampling
    assert sampling is not None  # see `Supervised`
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


def due(step: int, every: int) -> bool:
  """Whether what happens `every` so many steps (0: never) happens after `step` of them."""
  return every > 0 and step % every == 0
