"""What went wrong in a run, told from what it logged: which mode of failure, since when, by which
numbers, and what to try first.

`Watch` takes the logged rows of a stage one by one, while it runs; `diagnose` takes its whole
history. A rule compares a metric with the run's own beginning (medians of a few loggings, see
`history`), has to hold at several loggings in a row, and is reported once. The rules are `RULES`;
one more is a function and a row there.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pt_jax.loops import symptoms
from pt_jax.loops.history import Series

PREFIX = "diagnosis/"  # of the metric that a finding is logged as
PATIENCE = 5  # loggings in a row: with medians of 5 before it, what lasts for less is no finding
LEVEL = "difficulty/level"
# What another level of difficulty changes by itself: it begins anew there.
OF_LEVEL = ("reward", "length/", "stop/", "rollout/zero_variance", "rollout/groups_")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One mode of failure, recognised."""

  name: str  # of the mode, e.g. "kl_explosion"
  step: int  # at which it was recognised
  evidence: str  # one line: the metrics, from -> to, over which steps
  advice: str  # one line: what to try first

  def __str__(self) -> str:
    return f"step {self.step}: {self.name}: {self.evidence}; {self.advice}"


@dataclasses.dataclass(frozen=True)
class Rule:
  """A symptom, and the mode of failure that it is one of."""

  name: str  # of the mode; the first of its rules that holds long enough reports it
  metric: str  # a pattern as in a shell; the rule is asked when a metric of this name is logged
  holds: symptoms.Symptom
  advice: str
  reads: tuple[str, ...] = ()  # other metrics that it looks at
  patience: int = PATIENCE


_LOWER_LR = "lower AdamW.learning_rate"
NOT_FINITE = Rule(
  "not_finite", "*", symptoms.not_finite, f"{_LOWER_LR} or AdamW.clip_norm", patience=1
)
RULES = (
  Rule(
    "kl_explosion",
    "policy/kl",
    symptoms.far_from_reference,
    f"raise Kl.coefficient (or set Kl.controller), or {_LOWER_LR}",
    ("policy/entropy",),
  ),
  Rule(
    "kl_explosion",
    "policy/approx_kl",
    symptoms.far_from_rollouts,
    f"{_LOWER_LR}, set Online.stop_kl, or fewer Online.epochs",
  ),
  Rule(
    "reward_collapse",
    "reward",
    symptoms.reward_fell,
    f"go back to the checkpoint before it and {_LOWER_LR}, or raise Kl.coefficient",
  ),
  Rule(
    "length_drift",
    "length/mean",
    symptoms.grows_into_the_limit,
    "set Objective.overlong, or raise SamplingParams.max_tokens",
    ("stop/length",),
  ),
  Rule(
    "length_drift",
    "length/mean",
    symptoms.longer_and_no_better,
    "set Objective.overlong, or Objective.reduction='token_mean'; look for a reward of length",
    symptoms.TASK,
  ),
  Rule(
    "length_drift",
    "length/mean",
    symptoms.shorter_and_worse,
    "lower Overlong.weight, or Objective.reduction='constant'; look for a reward of shortness",
    symptoms.TASK,
  ),
  Rule(
    "entropy_collapse",
    "policy/entropy",
    symptoms.entropy_fell,
    f"raise Clip.high (0.28) or Objective.entropy (a bonus), or {_LOWER_LR}",
    symptoms.TASK,
  ),
  Rule(
    "format_collapse",
    "reward/*format*",
    symptoms.format_fell,
    "raise the weight of the format component, or Kl.coefficient",
  ),
  Rule(
    "format_collapse",
    "samples/format_diversity",
    symptoms.samples_repeat,
    f"{_LOWER_LR}, or fewer epochs over the data; read samples.jsonl",
    ("samples/distinct_outputs",),
    patience=2,
  ),
  Rule(
    "format_collapse",
    "samples/template_leakage",
    symptoms.template_leaks,
    "check the chat template and the loss mask of the data; read samples.jsonl",
    patience=2,
  ),
  Rule(
    "value_overfit",
    "critic/explained_variance",
    symptoms.critic_overfits,
    "fewer Critic.epochs, a lower rate in Critic.optimizer, or more Online.prompts",
    ("critic/explained_variance_after",),
  ),
  Rule(
    "gradient_vacuum",
    "rollout/zero_variance",
    symptoms.groups_are_solved,
    "harder problems: Online.curriculum, or Online.pass_rate; or stop here",
    (*symptoms.TASK, "critic/*"),
  ),
  Rule(
    "gradient_vacuum",
    "rollout/zero_variance",
    symptoms.groups_are_hopeless,
    "easier problems (Online.curriculum, Online.pass_rate), a longer cold start, or a larger "
    "Online.group_size",
    (*symptoms.TASK, "critic/*"),
  ),
  Rule(
    "gradient_vacuum",
    "rollout/groups_kept",
    symptoms.few_groups_are_kept,
    "other problems: Online.curriculum, or Online.pass_rate",
    ("rollout/groups_drawn",),
  ),
  Rule(
    "gradient_spikes",
    "optimizer/grad_norm",
    symptoms.gradient_spikes,
    f"{_LOWER_LR}, or a longer AdamW.warmup",
    patience=1,
  ),
  Rule(
    "rollout_mismatch",
    "rollout/logprob_gap_mean",
    symptoms.rollouts_of_another_policy,
    "float32 or bfloat16 for both; if they are meant to differ, set Objective.correction",
  ),
)


class Watch:
  """The state of all rules over one stage: what it keeps does not grow with the run.

  It holds nothing that the logged rows do not say: a resumed run feeds it those again.
  """

  def __init__(self, rules: tuple[Rule, ...] = RULES):
    self.findings: list[Finding] = []
    self._rules = rules
    self._seen: dict[str, Series] = {}
    self._asked: dict[str, tuple[bool, list[Rule]]] = {}  # see `_of`
    self._held: dict[tuple[Rule, str], int] = {}  # loggings in a row
    self._level: float | None = None

  def update(self, step: int, row: Mapping[str, Any]) -> list[Finding]:
    """Takes the metrics logged at one step; returns what is new."""
    values = {name: float(value) for name, value in row.items() if not name.startswith(PREFIX)}
    self._begin_anew(values.get(LEVEL))
    good = {name: value for name, value in values.items() if math.isfinite(value)}
    for name, value in good.items():
      if self._of(name)[0]:
        self._seen.setdefault(name, Series(name)).add(step, value)
    asked = [(rule, name) for name in good for rule in self._of(name)[1]]
    asked += [(NOT_FINITE, name) for name in values if name not in good]
    before = len(self.findings)
    for rule, name in asked:
      evidence = rule.holds(self._seen, name)
      held = self._held[rule, name] = self._held.get((rule, name), 0) + 1 if evidence else 0
      known = any(finding.name == rule.name for finding in self.findings)
      if evidence and held >= rule.patience and not known:
        self.findings.append(Finding(rule.name, step, evidence, rule.advice))
    return self.findings[before:]

  def _of(self, name: str) -> tuple[bool, list[Rule]]:
    """Whether any rule reads a metric, and the rules that are asked when it is logged."""
    if name not in self._asked:
      matches = lambda pattern: fnmatch.fnmatchcase(name, pattern)
      asked = [rule for rule in self._rules if matches(rule.metric)]
      beside = any(matches(pattern) for rule in self._rules for pattern in rule.reads)
      self._asked[name] = bool(asked) or beside, asked
    return self._asked[name]

  def _begin_anew(self, level: float | None) -> None:
    """Forgets what was measured on problems of another difficulty."""
    if level is None or level == self._level:
      return
    if self._level is not None:
      for name in [name for name in self._seen if name.startswith(OF_LEVEL)]:
        del self._seen[name]
    self._level = level


def diagnose(history: Mapping[str, tuple[Iterable[float], Iterable[float]]]) -> list[Finding]:
  """What a stage's whole history shows, in the order in which it could have been known.

  Args:
    history: {metric: (steps, values)}, steps ascending; `report.read_curves` has one of each stage.
  """
  rows: dict[int, dict[str, float]] = {}
  for metric, (steps, values) in history.items():
    for step, value in zip(steps, values):
      rows.setdefault(int(step), {})[metric] = float(value)
  watch = Watch()
  for step in sorted(rows):
    watch.update(step, rows[step])
  return watch.findings


def logged(findings: Iterable[Finding]) -> dict[str, float]:
  """The metrics that a row of metrics gets for new findings: {"diagnosis/NAME": 1}."""
  return {f"{PREFIX}{finding.name}": 1.0 for finding in findings}
