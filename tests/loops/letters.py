"""An online experiment of seconds: 1 layer, 16 tokens, and a reward that is there to be learned."""

import dataclasses

from pt_jax.data.tasks import Problem, Task
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import Critic, Curriculum, Experiment, Online, OnlinePreference, Problems
from pt_jax.losses import objective, preference_objective
from pt_jax.losses.options import KlController
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.steps.optimizer import AdamW

LETTERS = "abcdefghijklmnop"
END = LETTERS.index("p")  # ends a completion
MODEL = ModelConfig(
  vocab_size=16,
  width=16,
  layers=1,
  heads=2,
  kv_heads=1,
  head_dim=8,
  hidden=32,
  max_length=16,
  remat="none",
  vocab_chunk=16,
)
SAMPLING = SamplingParams(max_tokens=8, stop_tokens=(END,))


class Letters:
  """Sixteen letters are sixteen tokens."""

  name = "letters"
  vocab_size = 16
  pad_id = bos_id = chat_template = None
  eos_id = END
  special_tokens = template_variables = {}  # noqa: RUF012

  def encode(self, text, *, special=False):
    return [LETTERS.index(letter) for letter in text]

  def decode(self, ids, *, special=True):
    return "".join(LETTERS[int(i)] for i in ids)


@dataclasses.dataclass(frozen=True)
class Words(Task):
  """Words of one to four letters, told apart by their number."""

  size: int
  first: int = 0

  def __len__(self) -> int:
    return self.size

  def problem(self, index: int) -> Problem:
    number = self.first + index
    letters = [LETTERS[(number // 8**place) % 8] for place in range(1 + number % 4)]
    return Problem(f"word/{number}", "".join(letters), LETTERS[number % 2], {})


def problems(tokenizer: Tokenizer) -> Problems:
  """60 words to train on, 16 others."""
  return Problems(Words(60), Words(16, first=100), lambda p: tokenizer.encode(p.prompt))


def has_a(completion: Completion) -> float:
  """1 for an "a" anywhere."""
  return float("a" in completion.text)


def share_of_a(completion: Completion) -> float:
  """Share of the letters that are "a"."""
  return completion.text.count("a") / max(len(completion.text), 1)


def decoder_names() -> list[str]:
  """The top of the model's parameter tree."""
  return list(decoder.table(MODEL))


def rewards() -> RewardStack:
  """An "a" is right, more of them are better."""
  return RewardStack([Component("correct", 1.0, has_a), Component("share", 0.5, share_of_a)])


def stage(*, steps: int = 20, lr: float = 0.03, **changes) -> Online:
  """20 steps of 4 words x 8 completions, with changes."""
  epochs, minibatches = changes.get("epochs", 1), changes.get("minibatches", 1)
  default = {
    "name": "rl",
    "problems": problems,
    "rewards": rewards,
    "objective": objective.dr_grpo(max_length=SAMPLING.max_tokens),
    "sampling": SAMPLING,
    "optimizer": AdamW(lr, steps=steps * epochs * minibatches, warmup=min(2, steps)),
    "steps": steps,
    "prompts": 4,
    "group_size": 8,
    "rows": 16,  # an update of 32 completions takes one or two microbatches: two programs
    "row_length": 16,
    "slots": 8,
    "evaluate_every": 8,
    "evaluate_problems": 16,
    "checkpoint_every": 3,
    "sample_rows": 2,
  }
  return Online(**(default | changes))


def experiment(*stages, **changes) -> Experiment:
  """An experiment of these stages (default: `stage()`), with changes."""
  fields = {"name": "letters", "tokenizer": Letters, "model": MODEL}
  return Experiment(**(fields | {"stages": stages or (stage(),)} | changes))


def config(*, steps: int = 40, seed: int = 0) -> Experiment:
  """Words answered with as many "a" as fit.

  Args:
    steps: of GRPO.
    seed: of everything.
  """
  return experiment(stage(steps=steps, checkpoint_every=2), seed=seed)


def levels(tokenizer: Tokenizer) -> Problems:
  """The same words, and three levels of twenty of them."""
  return dataclasses.replace(
    problems(tokenizer), levels=tuple(Words(20, first=20 * i) for i in range(3))
  )


def ppo(*, steps: int = 40, seed: int = 0) -> Experiment:
  """All that a checkpoint may have to hold: two networks, a KL controller, a curriculum, a critic
  that is trained first, several passes and updates.

  Args:
    steps: of PPO.
    seed: of everything.
  """
  controller = KlController(0.02)
  kl = objective.Kl(0.05, "k1", where="reward", controller=controller)
  critic = Critic(AdamW(0.03, steps=4 * (steps + 3)), epochs=2, pretrain=3)
  stage_ = stage(
    steps=steps,
    epochs=2,
    minibatches=2,
    stop_kl=0.05,
    problems=levels,
    curriculum=Curriculum(low=0.3, high=0.6, window=4, above=0.25),
    objective=dataclasses.replace(objective.ppo(), kl=kl),
    critic=critic,
    checkpoint_every=2,
  )
  return experiment(stage_, seed=seed)


# A row holds a pair: two times a prompt of up to four letters and an answer of up to eight.
PAIR_MODEL = dataclasses.replace(MODEL, max_length=32)


def preference_stage(*, steps: int = 20, lr: float = 0.01, **changes) -> OnlinePreference:
  """20 steps of 4 words x 8 completions, the best against the worst, with changes."""
  epochs, minibatches = changes.get("epochs", 1), changes.get("minibatches", 1)
  default = {
    "name": "preference",
    "problems": problems,
    "rewards": rewards,
    "objective": preference_objective.dpo(0.1),
    "sampling": SAMPLING,
    "optimizer": AdamW(lr, steps=steps * epochs * minibatches, warmup=min(2, steps)),
    "steps": steps,
    "prompts": 4,
    "group_size": 8,
    "rows": 4,
    "row_length": 32,
    "slots": 8,
    "evaluate_every": 8,
    "evaluate_problems": 16,
    "checkpoint_every": 3,
    "sample_rows": 2,
  }
  return OnlinePreference(**(default | changes))


def online_preference(*, steps: int = 40, seed: int = 0) -> Experiment:
  """Pairs of answers, from weights that are up to three steps old; the reference moves.

  Args:
    steps: of online DPO.
    seed: of everything.
  """
  stage = preference_stage(steps=steps, checkpoint_every=2, refresh_every=4, reference_every=5)
  return experiment(stage, model=PAIR_MODEL, seed=seed)
