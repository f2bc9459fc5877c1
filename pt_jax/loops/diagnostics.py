"""What periodic samples and logged metrics say about a run: diversity, leakage, when to stop."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import EarlyStop
from pt_jax.rollout.rollouts import Rollouts, StopReason

# Markup of chat templates, also of those that are not this run's: a model that was trained through
# a wrong template writes it as plain text.
TEMPLATE_MARKUP = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
SAMPLE_METRICS = (
  "samples/distinct_outputs",
  "samples/format_diversity",
  "samples/distinct_1",
  "samples/distinct_2",
  "samples/template_leakage",
  "samples/ended",
  "samples/length",
)
MOST_NATS = 700.0  # exp of more is no float
_TAG = re.compile(r"</?[A-Za-z_][^<>\s]{0,40}>")
_WORDS = re.compile(r"[^\W\d_]+(?:['’ \t]+[^\W\d_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def perplexity(nats_per_token: float) -> float:
  """exp(nats_per_token), at most exp(700)."""
  return math.exp(min(nats_per_token, MOST_NATS))


def completions_of(rollouts: Rollouts) -> list[list[int]]:
  """The completion tokens of every row."""
  rows = zip(*map(np.asarray, (rollouts.tokens, rollouts.prompt_length, rollouts.length)))
  return [tokens[start:stop].tolist() for tokens, start, stop in rows]


def format_of(text: str) -> str:
  """The shape of a text: tags, punctuation and lines stay, runs of words become w, numbers 0.

  Example: "<think>3 + 4 is 7</think>\\nThe answer is 7." -> "<think>0 + 0 w 0</think>\\nw 0."
  """
  parts, at = [], 0
  for tag in itertools.chain(_TAG.finditer(text), [None]):
    plain = text[at : tag.start() if tag else len(text)]
    parts.append(_NUMBER.sub("0", _WORDS.sub("w", plain)))
    if tag:
      parts.append(tag.group())
      at = tag.end()
  return "".join(parts).strip()


def distinct(sequences: Sequence[Sequence[int]], n: int) -> float:
  """Distinct n-grams over all n-grams of the sequences (arXiv 1510.03055); 0 if there are none."""
  grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
  return len(set(grams)) / len(grams) if grams else 0.0


def leaks_template(tokens: Sequence[int], stop: StopReason, tokenizer: Tokenizer) -> bool:
  """Whether a completion holds a special token, or template markup as plain text.

  Args:
    tokens: of the completion; the last one ended it if `stop` is TOKEN, which is no leak.
    stop: why it ended.
    tokenizer: of the model.
  """
  body = tokens[:-1] if stop == StopReason.TOKEN else tokens
  special = tokenizer.special_tokens
  if not set(special.values()).isdisjoint(body):
    return True
  text = tokenizer.decode(body)
  return TEMPLATE_MARKUP.search(text) is not None or any(piece in text for piece in special)


def sample_metrics(
  completions: Sequence[Sequence[int]], stops: Sequence[StopReason], tokenizer: Tokenizer
) -> dict[str, float]:
  """`SAMPLE_METRICS` of a set of completions, at least one: token ids and why each ended.

  All are shares in 0..1 (of distinct outputs, distinct formats as in `format_of`, distinct 1-grams
  and 2-grams, completions with template leakage, completions that ended by themselves), but for the
  mean length in tokens.
  """
  count = len(completions)
  texts = [tokenizer.decode(tokens) for tokens in completions]
  leaks = [leaks_template(*pair, tokenizer) for pair in zip(completions, stops)]
  values = (
    len(set(texts)) / count,
    len(set(map(format_of, texts))) / count,
    distinct(completions, 1),
    distinct(completions, 2),
    sum(leaks) / count,
    sum(stop in (StopReason.TOKEN, StopReason.STRING) for stop in stops) / count,
    sum(map(len, completions)) / count,
  )
  return dict(zip(SAMPLE_METRICS, values))


class EarlyStopping:
  """Watches logged metrics for the rules of a stage. Its state goes into the checkpoint."""

  def __init__(self, rules: Sequence[EarlyStop], state: Mapping[str, Any] | None = None):
    """Starts afresh, or goes on from a former `state()` of the same rules."""
    self._rules = tuple(rules)
    state = state or {}
    self._out: list[int] = list(state.get("out", [0] * len(rules)))  # loggings in a row
    self._lowest: list[float | None] = list(state.get("lowest", [None] * len(rules)))
    self.reason: str | None = state.get("reason")  # why the stage is over; None: it is not

  def state(self) -> dict[str, Any]:
    """JSON-able."""
    return {"out": list(self._out), "lowest": list(self._lowest), "reason": self.reason}

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes one logging; sets `reason` once a rule has been out of bounds long enough."""
    for i, rule in enumerate(self._rules):
      if rule.metric not in metrics:
        continue
      value, lowest = float(metrics[rule.metric]), self._lowest[i]
      bound = _broken_bound(rule, value, lowest)
      self._out[i] = self._out[i] + 1 if bound else 0
      self._lowest[i] = value if lowest is None else min(lowest, value)
      if self.reason is None and self._out[i] >= rule.patience:
        times = f"{rule.patience} times in a row" if rule.patience > 1 else "once"
        self.reason = f"step {step}: {rule.metric} is {value:.4g}, {bound}, {times}"


def _broken_bound(rule: EarlyStop, value: float, lowest: float | None) -> str | None:
  """Which bound the value breaks, in words."""
  if rule.above is not None and value > rule.above:
    return f"above {rule.above:g}"
  if rule.below is not None and value < rule.below:
    return f"below {rule.below:g}"
  if rule.rises and lowest is not None and value > lowest:
    return f"risen over {lowest:.4g}"
  return None
