"""Figures of a server, in the text format of Prometheus."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

PREFIX = "pt_jax"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
  """What one server counts; a registry of its own, so two servers of a process do not mix."""

  def __init__(self):
    self.registry = CollectorRegistry()
    counter = lambda name, what, *labels: Counter(
      f"{PREFIX}_{name}", what, labels, registry=self.registry
    )
    seconds = lambda name, what, buckets: Histogram(
      f"{PREFIX}_{name}_seconds", what, buckets=buckets, registry=self.registry
    )
    self.requests = counter("requests", "Requests answered", "path", "status")
    self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were taken on")
    self.generated = counter("generated_tokens", "Tokens drawn; its rate is tokens/s")
    self.finished = counter("completions", "Completions that ended", "reason")
    self.aborted = counter("aborted", "Completions whose client went away or ran out of time")
    self.first_token = seconds("time_to_first_token", "From arrival, TTFT", SECONDS)
    self.per_token = seconds("time_per_output_token", "After the first one, TPOT", PER_TOKEN)
    self.whole = seconds("request", "From arrival to the end of the answer", SECONDS)

  def watch(self, gauges: Callable[[], dict[str, float]]) -> None:
    """Shows what `gauges` returns whenever the figures are read."""
    self.registry.register(_Gauges(gauges))

  def tokens(self, ticket: Any, output: Any) -> None:
    """Counts new tokens of a worker's ticket."""
    now = time.monotonic()
    self.generated.inc(len(output.tokens))
    if ticket.first is None and output.tokens:
      ticket.first = now
      self.first_token.observe(now - ticket.arrived)
    sample = ticket.samples.setdefault(output.sample, [now, 0])
    sample[1] += len(output.tokens)
    if output.stop is not None:
      self.finished.labels(output.stop.name.lower()).inc()
      if sample[1] > 1:
        self.per_token.observe((now - sample[0]) / (sample[1] - 1))

  def text(self) -> bytes:
    """The exposition."""
    return generate_latest(self.registry)


class _Gauges:
  """A collector of values that are asked for when they are read."""

  def __init__(self, read: Callable[[], dict[str, float]]):
    self._read = read

  def collect(self) -> Iterator[GaugeMetricFamily]:
    for name, value in self._read().items():
      yield GaugeMetricFamily(f"{PREFIX}_{name}", name.replace("_", " "), value)
