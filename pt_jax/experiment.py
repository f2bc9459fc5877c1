"""What a config function returns: an `Experiment`, a sequence of stages on one model, mesh and
tokenizer.

Everything here is a frozen dataclass of plain values and module-level functions (or
`functools.partial`s of them), so that what ran can be written down beside the run and compared with
another run.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pt_jax.data.pipeline import Layout
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.losses.objective import MonteCarlo, Objective
from pt_jax.losses.preference_objective import PreferenceObjective
from pt_jax.losses.reward import RewardObjective
from pt_jax.losses.supervised import SupervisedObjective, sft
from pt_jax.models.config import ModelConfig
from pt_jax.parts import (
  ComparisonData,
  Critic,
  Curriculum,
  EarlyStop,
  Mix,
  ModelReward,
  OfflineData,
  PassRate,
  Problems,
  Steps,
  SupervisedData,
  ValueHead,
)
from pt_jax.rewards.judges import Judge
from pt_jax.rewards.stack import RewardStack
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.steps.optimizer import AdamW


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Sizes of the mesh axes; one of them may be -1, all devices that are left."""

  data: int = -1
  context: int = 1
  expert: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offline:
  """What stages that train on given rows have in common. Steps are optimizer updates."""

  leaves_policy: ClassVar[bool] = True  # whether later stages start from what it leaves
  name: str
  data: Callable[[Tokenizer], OfflineData]
  layout: Layout  # rows per batch (all hosts) and tokens per row
  optimizer: AdamW  # its `steps` is the length of the stage
  microbatches: int = 1
  log_every: int = 1
  evaluate_every: int = 0  # held-out evaluation; 0: only at the end
  checkpoint_every: int = 0  # 0: only at the end
  sample_every: int = 0  # periodic completions of `data.prompts`; 0: never
  sampling: SamplingParams | None = None  # of the periodic samples
  stop: tuple[EarlyStop, ...] = ()
  start: str | None = None  # stage whose parameters it starts from; None: see `Experiment`

  def __post_init__(self):
    if self.layout.batch_size % self.microbatches:
      raise ValueError(
        f"stage {self.name}: microbatches ({self.microbatches}) must divide batch_size "
        f"({self.layout.batch_size})"
      )
    if self.sample_every and self.sampling is None:
      raise ValueError(f"stage {self.name}: sample_every needs sampling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Offline):
  """Supervised fine-tuning."""

  data: Callable[[Tokenizer], SupervisedData]
  objective: SupervisedObjective = dataclasses.field(default_factory=sft)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Offline):
  """A reward model: the trunk of the policy that it starts from under a fresh head, trained whole.

  It leaves a tree of `models.heads.table(config, members)`, no policy.
  """

  leaves_policy: ClassVar[bool] = False
  data: Callable[[Tokenizer], ComparisonData]
  objective: RewardObjective
  members: int = 1  # heads of the ensemble, on one trunk

  def __post_init__(self):
    super().__post_init__()
    if self.members < 1:
      raise ValueError(f"stage {self.name}: members: expected at least 1, found {self.members}")
    if self.objective.bootstrap and self.members == 1:
      raise ValueError(f"stage {self.name}: bootstrap: expected members > 1, found 1")
    if self.sample_every:
      raise ValueError(
        f"stage {self.name}: sample_every: a reward model writes nothing, found {self.sample_every}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Offline):
  """Preference optimisation on given pairs, or on single completions that are right or wrong.

  Its reference is the policy that it starts from. Held-out rows are pairs for every objective.
  """

  data: Callable[[Tokenizer], ComparisonData]
  objective: PreferenceObjective
  # Log-probs under the reference: "online" computes them with every batch, "cached" once, before
  # the first update, and keeps them in the folder of the run.
  reference: Literal["online", "cached"] = "online"

  def __post_init__(self):
    super().__post_init__()
    if self.reference not in ("online", "cached"):
      raise ValueError(
        f"stage {self.name}: reference: expected online or cached, found {self.reference!r}"
      )
    if self.reference == "cached" and not self.objective.reference:
      raise ValueError(
        f"stage {self.name}: reference: the objective has none, expected online, found 'cached'"
      )


@dataclasses.dataclass(frozen=True)
class Online:
  """Reinforcement learning from rewards. A step is one batch of fresh rollouts."""

  leaves_policy: ClassVar[bool] = True
  name: str
  problems: Callable[[Tokenizer], Problems]
  rewards: Callable[[], RewardStack]
  objective: Objective
  sampling: SamplingParams
  optimizer: AdamW  # its `steps` counts updates: steps * epochs * minibatches
  steps: int
  prompts: int  # per step
  group_size: int  # completions per prompt
  rows: int  # packed rows of one microbatch (all hosts); an update computes as many as it needs
  row_length: int  # also the longest prompt and completion together
  share_prompts: bool = False  # a prompt is computed once for its completions, not for each
  epochs: int = 1  # passes over the rollouts of a step
  minibatches: int = 1  # updates per pass
  stop_kl: float | None = None  # no further epoch of a step once policy/approx_kl is over this
  critic: Critic | ValueHead | None = None  # for objectives with `Gae`
  steps_of: Steps | None = None  # for objectives with `process` or `MonteCarlo`
  reward_model: ModelReward | None = None  # beside `rewards`
  mix: Mix | None = None  # pairs that are trained on in every update
  slots: int = 64  # completions decoded at once
  resample_limit: int = 4  # dynamic sampling: times that a step draws prompts, at most
  evaluate_every: int = 0  # held-out pass@1; 0: only at the end
  evaluate_problems: int = 512
  checkpoint_every: int = 0  # 0: only at the end
  sample_rows: int = 4  # completions written to samples.jsonl per step
  curriculum: Curriculum | None = None  # over the levels of the problems
  pass_rate: PassRate | None = None  # which problems are trained on; None: all
  start: str | None = None  # stage whose parameters it starts from; None: see `Experiment`

  def __post_init__(self):
    positive = ("steps", "prompts", "group_size", "rows", "row_length", "epochs", "minibatches")
    for field in (*positive, "slots", "resample_limit"):
      if getattr(self, field) < 1:
        raise ValueError(f"stage {self.name}: {field} must be positive")
    self._check_updates("optimizer", self.optimizer, self.steps * self.epochs)
    if isinstance(self.critic, Critic):
      passes = (self.critic.pretrain + self.steps) * self.critic.epochs
      self._check_updates("critic.optimizer", self.critic.optimizer, passes)
    self._check_objective()
    if self.share_prompts and self.group_size < 2:
      raise ValueError(
        f"stage {self.name}: share_prompts: expected a group_size of at least 2, found "
        f"{self.group_size}"
      )
    if self.curriculum and self.pass_rate:
      raise ValueError(
        f"stage {self.name}: curriculum and pass_rate: expected one of them, found both"
      )
    if self.prompts % self.minibatches:
      raise ValueError(
        f"stage {self.name}: minibatches ({self.minibatches}) must divide prompts ({self.prompts})"
      )

  @property
  def total(self) -> int:
    """Steps with those in which only the critic learns."""
    return self.steps + (self.critic.pretrain if isinstance(self.critic, Critic) else 0)

  def _check_updates(self, field: str, optimizer: AdamW, passes: int) -> None:
    if optimizer.steps != passes * self.minibatches:
      raise ValueError(
        f"stage {self.name}: {field}.steps is {optimizer.steps}, expected "
        f"{passes * self.minibatches} (steps x epochs x minibatches)"
      )

  def _check_objective(self) -> None:
    """What the objective needs of the stage is there, and nothing that it does not read."""
    o = self.objective
    needs = (
      ("critic", self.critic is not None, o.has_critic, "Gae"),
      ("steps_of", self.steps_of is not None, o.has_steps, "process or MonteCarlo"),
    )
    for field, given, needed, reader in needs:
      if given != needed:
        expected = f"one, for an objective with {reader}" if needed else f"none without {reader}"
        raise ValueError(
          f"stage {self.name}: {field}: expected {expected}, found {getattr(self, field)}"
        )
    if o.compares and self.group_size < 2:
      raise ValueError(
        f"stage {self.name}: group_size: expected at least 2, since the objective compares the "
        f"completions of a prompt, found {self.group_size}"
      )
    judged = self.reward_model is not None and self.reward_model.process
    given_rewards = self.steps_of is not None and self.steps_of.rewards is not None
    alone = isinstance(o.advantage, MonteCarlo) or o.filters.zero_variance
    if self.reward_model is not None and not judged and alone:
      raise ValueError(
        f"stage {self.name}: reward_model: expected none with MonteCarlo or filters.zero_variance, "
        "which look at the verifiers' rewards alone"
      )
    if given_rewards and o.process is None:
      raise ValueError(f"stage {self.name}: steps_of.rewards: only objective.process reads them")
    if o.process is not None and given_rewards == judged:
      found = "both" if given_rewards else "neither"
      raise ValueError(
        f"stage {self.name}: objective.process: expected steps_of.rewards or a reward model of "
        f"steps, found {found}"
      )
    if judged and o.process is None:
      raise ValueError(f"stage {self.name}: reward_model.process: the objective has no process")
    if self.stop_kl is not None and (self.epochs == 1 or self.stop_kl <= 0):
      raise ValueError(
        f"stage {self.name}: stop_kl: expected a number > 0 and several epochs, found "
        f"{self.stop_kl} and {self.epochs}"
      )


Pairing = Literal["best_worst", "random", "all"]


@dataclasses.dataclass(frozen=True)
class OnlinePreference:
  """A preference objective on completions of the policy itself. A step is one batch of rollouts.

  The completions of a prompt are scored and those with different scores are paired; an unpaired
  objective takes each as right or wrong.
  """

  leaves_policy: ClassVar[bool] = True
  name: str
  problems: Callable[[Tokenizer], Problems]
  rewards: Callable[[], RewardStack]  # scores completions, unless `judge` does; and held-out ones
  objective: PreferenceObjective
  sampling: SamplingParams
  optimizer: AdamW  # its `steps` counts updates: steps * epochs * minibatches
  steps: int
  prompts: int  # per step
  group_size: int  # completions per prompt
  rows: int  # packed rows of one microbatch (all hosts); an update computes as many as it needs
  row_length: int  # also the longest pair: two times a prompt with its completion
  judge: Judge | ModelReward | None = None  # scores the completions that are trained on
  pairing: Pairing = "best_worst"  # or one random pair, or all pairs, with different scores
  threshold: float = 0.5  # for unpaired objectives: a completion that scores more is right
  refresh_every: int = 1  # steps whose completions are drawn from the same weights
  reference_every: int = 0  # steps after which the policy becomes the reference; 0: never
  epochs: int = 1  # passes over the rollouts of a step
  minibatches: int = 1  # updates per pass
  slots: int = 64  # completions decoded at once
  resample_limit: int = 1  # times that a step draws prompts, at most, to fill up groups of ties
  evaluate_every: int = 0  # held-out pass@1; 0: only at the end
  evaluate_problems: int = 512
  checkpoint_every: int = 0  # 0: only at the end
  sample_rows: int = 4  # pairs or labelled completions written to samples.jsonl per step
  start: str | None = None  # stage whose parameters it starts from; None: see `Experiment`

  @property
  def completions_per_group(self) -> int:
    """How many completions stand side by side: a pair, one, or for KTO one with a mismatched."""
    return 1 if self.objective.unpaired and self.objective.loss != "kto" else 2

  def __post_init__(self):
    where = f"stage {self.name}"
    positive = ("steps", "prompts", "rows", "row_length", "refresh_every", "epochs", "minibatches")
    least = dict.fromkeys((*positive, "slots", "resample_limit"), 1) | {"reference_every": 0}
    least["group_size"] = 1 if self.objective.unpaired else 2
    for field, smallest in least.items():
      if getattr(self, field) < smallest:
        found = getattr(self, field)
        raise ValueError(f"{where}: {field}: expected at least {smallest}, found {found}")
    if self.pairing not in typing.get_args(Pairing):
      names = ", ".join(typing.get_args(Pairing))
      raise ValueError(f"{where}: pairing: expected one of {names}, found {self.pairing!r}")
    if isinstance(self.judge, ModelReward) and (self.judge.process or self.judge.weight != 1):
      raise ValueError(
        f"{where}: judge: expected a model of outcomes with weight 1, found {self.judge}"
      )
    if self.reference_every and not self.objective.reference:
      raise ValueError(
        f"{where}: reference_every: {self.objective.loss!r} without a reference does not read it, "
        f"found {self.reference_every}"
      )
    if self.objective.loss == "kto" and self.prompts < 2:
      raise ValueError(f"{where}: prompts: expected at least 2 for mismatched pairs, found 1")
    updates = self.steps * self.epochs * self.minibatches
    if self.optimizer.steps != updates:
      raise ValueError(
        f"{where}: optimizer.steps is {self.optimizer.steps}, expected {updates} "
        "(steps x epochs x minibatches)"
      )


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Held-out pass@1 and mean reward of what the stage before left; trains nothing.

  pass@1 is the mean score of the reward component named "correct".
  """

  leaves_policy: ClassVar[bool] = True
  name: str
  problems: Callable[[Tokenizer], Problems]
  rewards: Callable[[], RewardStack]
  sampling: SamplingParams
  count: int = 512  # problems
  slots: int = 64
  start: str | None = None  # stage whose parameters it starts from; None: see `Experiment`


Stage = Supervised | Reward | Preference | Online | OnlinePreference | Evaluate


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A pipeline of stages. Each starts from the policy that the latest one before it left, unless it
  names another by `start`. (A reward model is no policy: stages behind it start from the one before
  it.)"""

  name: str
  stages: tuple[Stage, ...]
  tokenizer: Callable[[], Tokenizer]
  model: ModelConfig | None = None  # from scratch; or
  checkpoint: str | None = (
    None  # a folder in HF format, its weights and, without `model`, its config
  )
  initial: str | None = None  # with `model`: what a stage of another run left, RUN/params/STAGE
  mesh: MeshShape = MeshShape()
  zero: int = 1
  seed: int = 0

  def __post_init__(self):
    if self.model is None and self.checkpoint is None:
      raise ValueError(f"experiment {self.name}: give model or checkpoint")
    if self.initial is not None and self.checkpoint is not None:
      raise ValueError(f"experiment {self.name}: initial needs model, found a checkpoint")
    names = [stage.name for stage in self.stages]
    if not names or len(set(names)) < len(names):
      raise ValueError(f"experiment {self.name}: stages need distinct names, found {names}")
    for i, stage in enumerate(self.stages):
      before = [other.name for other in self.stages[:i] if other.leaves_policy]
      if stage.start is not None and stage.start not in before:
        raise ValueError(
          f"stage {stage.name}: start: expected a stage before it, one of {before}, found "
          f"{stage.start!r}"
        )
      _check_inputs(stage, self.stages[:i])


def _check_inputs(stage: Stage, before: Sequence[Stage]) -> None:
  """Raises ValueError unless the reward models that a stage asks for are trained before it."""
  models = {s.name: s.members for s in before if isinstance(s, Reward)}
  wanted = []
  if isinstance(stage, Online):
    if isinstance(stage.critic, Critic) and stage.critic.start is not None:
      wanted.append(("critic.start", stage.critic.start, 1))
    if stage.reward_model is not None:
      wanted.append(("reward_model", stage.reward_model.stage, stage.reward_model.members))
  if isinstance(stage, OnlinePreference) and isinstance(stage.judge, ModelReward):
    wanted.append(("judge", stage.judge.stage, stage.judge.members))
  for field, name, members in wanted:
    if models.get(name) != members:
      raise ValueError(
        f"stage {stage.name}: {field}: expected a Reward stage before it with {members} members, "
        f"found {name!r} among {models}"
      )


__all__ = [
  "ComparisonData",
  "Critic",
  "Curriculum",
  "EarlyStop",
  "Evaluate",
  "Experiment",
  "MeshShape",
  "Mix",
  "ModelReward",
  "Offline",
  "OfflineData",
  "Online",
  "OnlinePreference",
  "Pairing",
  "PassRate",
  "Preference",
  "Problems",
  "Reward",
  "Stage",
  "Steps",
  "Supervised",
  "SupervisedData",
  "ValueHead",
]
