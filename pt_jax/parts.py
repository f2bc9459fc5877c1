"""What stages are made of: data, problems, critics, reward models and other options.

Frozen dataclasses of plain values and module-level functions, as in `pt_jax.experiment`, which
hands them on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pt_jax.data.groups import Group
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import EXAMPLES, GROUPS, Form, Layout
from pt_jax.data.sources import Source
from pt_jax.data.tasks import Problem, Task
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.losses.preference_objective import PreferenceObjective
from pt_jax.rewards.verifiers import Completion
from pt_jax.steps.optimizer import AdamW


@dataclasses.dataclass(frozen=True)
class SupervisedData:
  """What a supervised stage trains on, made from the tokenizer by the stage's `data` function."""

  form: ClassVar[Form] = EXAMPLES
  train: Mixture
  held_out: Source
  encode: Callable[[Mapping[str, Any]], Example]  # one row to its tokens and target mask
  prompts: Sequence[Sequence[int]] = ()  # encoded prompts that periodic samples answer


@dataclasses.dataclass(frozen=True)
class ComparisonData:
  """What a stage that compares completions trains on, made by the stage's `data` function."""

  form: ClassVar[Form] = GROUPS
  train: Mixture
  held_out: Source
  encode: Callable[[Mapping[str, Any]], Group]  # one row to the completions that it compares
  prompts: Sequence[Sequence[int]] = ()  # encoded prompts that periodic samples answer
  slice: Callable[[Mapping[str, Any]], str] | None = None  # held-out figures are given by it, too


OfflineData = SupervisedData | ComparisonData


@dataclasses.dataclass(frozen=True)
class EarlyStop:
  """Ends a stage when a logged metric has been out of bounds for `patience` loggings in a row."""

  metric: str  # e.g. "eval/nats_per_token", "loss/entropy", "samples/template_leakage"
  above: float | None = None  # out of bounds over this
  below: float | None = None  # out of bounds under this
  rises: bool = False  # out of bounds when higher than the lowest value so far
  patience: int = 1

  def __post_init__(self):
    if (self.above is None) and (self.below is None) and not self.rises:
      raise ValueError(f"early stop on {self.metric}: give above, below or rises")
    if self.patience < 1:
      raise ValueError(f"early stop on {self.metric}: patience must be at least 1")


@dataclasses.dataclass(frozen=True)
class Problems:
  """Problems that are trained on and problems that are not, and how one becomes a prompt."""

  train: Task
  held_out: Task
  encode: Callable[[Problem], Sequence[int]]
  levels: Sequence[Task] = ()  # ever more difficult ones: what a curriculum trains on, not `train`


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Trains on the level of `Problems.levels` whose solve rate lies in a band.

  The solve rate is the mean score of the component "correct" over the latest problems of the level.
  """

  low: float = 0.3  # under it the level goes down
  high: float = 0.8  # over it the level goes up
  first: int = 0  # level to begin with
  window: int = 64  # problems, the latest of the level: so many are seen before it moves
  patience: int = 1  # steps in a row that the rate is out of the band
  below: float = 0.0  # share of the problems taken from the level below, where there is one
  above: float = 0.0  # share taken from the level above

  def __post_init__(self):
    if not 0 <= self.low < self.high <= 1:
      raise ValueError(
        f"curriculum: expected 0 <= low < high <= 1, found low {self.low}, high {self.high}"
      )
    if self.below < 0 or self.above < 0 or self.below + self.above >= 1:
      raise ValueError(
        "curriculum: expected shares below and above of at least 0 and less than 1 together, found "
        f"{self.below} and {self.above}"
      )
    for field, least in (("first", 0), ("window", 1), ("patience", 1)):
      if getattr(self, field) < least:
        raise ValueError(
          f"curriculum: {field}: expected at least {least}, found {getattr(self, field)}"
        )


@dataclasses.dataclass(frozen=True)
class PassRate:
  """Before training, every problem is answered `samples` times by the policy that the stage starts
  from; those whose share of right answers is outside low..high are not trained on."""

  low: float = 0.1
  high: float = 0.9
  samples: int = 8  # completions of a problem
  problems: int | None = None  # tried, chosen at random; the rest is not trained on. None: all

  def __post_init__(self):
    if not 0 <= self.low <= self.high <= 1:
      raise ValueError(
        f"pass_rate: expected 0 <= low <= high <= 1, found low {self.low}, high {self.high}"
      )
    for field in ("samples", "problems"):
      if (value := getattr(self, field)) is not None and value < 1:
        raise ValueError(f"pass_rate: {field}: expected at least 1, found {value}")


@dataclasses.dataclass(frozen=True)
class Critic:
  """A value network of its own, for objectives with `Gae`."""

  optimizer: AdamW  # its `steps` counts updates: (pretrain + steps) * epochs * minibatches
  start: str | None = None  # the `Reward` stage it starts from; None: the policy, with a new head
  epochs: int = 1  # passes over the rollouts of a step
  clip: float | None = 0.5  # how far a value may move from the old one; None: no clip
  pretrain: int = 0  # steps before the first update of the policy (VAPO)

  def __post_init__(self):
    for field, least in (("epochs", 1), ("pretrain", 0)):
      if getattr(self, field) < least:
        raise ValueError(f"critic.{field}: expected at least {least}, found {getattr(self, field)}")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"critic.clip: expected a number > 0 or None, found {self.clip}")


@dataclasses.dataclass(frozen=True)
class ValueHead:
  """A value head on the policy itself: one network, one optimizer, one update for both."""

  coefficient: float = 0.5  # of the value loss in the policy's
  clip: float | None = 0.5  # how far a value may move from the old one; None: no clip

  def __post_init__(self):
    if self.coefficient <= 0:
      raise ValueError(f"critic.coefficient: expected a number > 0, found {self.coefficient}")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"critic.clip: expected a number > 0 or None, found {self.clip}")


@dataclasses.dataclass(frozen=True)
class ModelReward:
  """The reward of a model that an earlier `Reward` stage trained, beside that of the stack.

  Held-out evaluations are judged by the stack alone.
  """

  stage: str  # its name
  weight: float = 1.0  # multiplies the mean over its members
  members: int = 1  # that the stage has
  pessimism: float = 0.0  # so many standard deviations over the members are taken off
  process: bool = False  # it judges steps: their probabilities are the rewards of `process`

  def __post_init__(self):
    if self.members < 1:
      raise ValueError(f"reward_model.members: expected at least 1, found {self.members}")
    if self.pessimism < 0:
      raise ValueError(f"reward_model.pessimism: expected a number >= 0, found {self.pessimism}")
    if self.weight == 0 or (self.process and self.weight != 1.0):
      expected = "1.0 (process.weight weighs steps)" if self.process else "a number other than 0"
      raise ValueError(f"reward_model.weight: expected {expected}, found {self.weight}")


@dataclasses.dataclass(frozen=True)
class Mix:
  """A preference loss on given pairs in every update, against what RL makes a policy forget.

  The gradient is that of RL plus `weight` times that of the pairs, each divided by its own weight.
  """

  data: Callable[[Tokenizer], ComparisonData]
  objective: PreferenceObjective  # of pairs; its reference is what the stage starts from
  layout: Layout  # rows of pairs in an update
  weight: float = 0.1

  def __post_init__(self):
    o = self.objective
    if o.unpaired or o.loss == "bco_pair" or o.dynamic_beta is not None:
      raise ValueError(f"mix.objective: expected one of pairs without a running mean, found {o}")
    if self.weight <= 0:
      raise ValueError(f"mix.weight: expected a number > 0, found {self.weight}")


@dataclasses.dataclass(frozen=True)
class Steps:
  """What the steps of a completion are, and what one is worth."""

  mark: str = "\n"  # a token whose text holds it ends a step; the last token ends one too
  # (completion, texts of its steps) -> a reward for each; read by `Objective.process`
  rewards: Callable[[Completion, Sequence[str]], Sequence[float]] | None = None

  def __post_init__(self):
    if not self.mark:
      raise ValueError("steps.mark: expected some text, found none")
