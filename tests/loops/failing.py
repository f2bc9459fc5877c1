"""An experiment that learns a task on letters, and stages that go on from there and fail, each by
one change that a person could have made."""

import dataclasses
import zlib

from pt_jax.experiment import Critic, Experiment, Online
from pt_jax.losses import objective
from pt_jax.losses.options import Clip, Gae
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from pt_jax.steps.optimizer import AdamW
from tests.loops import letters

STEPS = 24
SAMPLING = SamplingParams(max_tokens=8, stop_tokens=(*range(12, 16),))  # four letters end it


def starts(completion):
  """1 for one of the first four letters at the start."""
  return float(completion.text[:1] in ("a", "b", "c", "d"))


def ends(completion):
  """1 for a completion that ended by itself."""
  return float(completion.stop == StopReason.TOKEN)


def long(completion):
  """The length over the longest."""
  return completion.tokens / SAMPLING.max_tokens


def by_chance(completion):
  """A judge that says yes to every other text, whatever it is."""
  return float(zlib.crc32(f"{completion.problem.id} {completion.text}".encode()) % 2)


def never(completion):
  """0."""
  return 0.0


def rewards():
  """The right letter, and an end."""
  return RewardStack([Component("correct", 1.0, starts), Component("format", 0.2, ends)])


def only_right():
  """The right letter."""
  return RewardStack([Component("correct", 1.0, starts)])


def paid_by_length():
  """More for longer ones; whether they are right and end is only looked at."""
  seen = [Component("correct", 0.0, starts), Component("format", 0.0, ends)]
  return RewardStack([*seen, Component("long", 1.0, long)])


def impossible():
  """Nothing is right."""
  return RewardStack([Component("correct", 1.0, never)])


def random_judge():
  """Nothing to learn."""
  return RewardStack([Component("correct", 1.0, by_chance)])


def stage(name, *, lr=0.005, warmup=2, **changes) -> Online:
  """24 steps that go well, with changes."""
  fields = {
    "name": name,
    "rewards": rewards,
    "sampling": SAMPLING,
    "optimizer": AdamW(lr, STEPS * changes.get("epochs", 1), warmup, final_scale=1.0),
    "prompts": 8,
    "rows": 32,
    "evaluate_every": 0,
    "evaluate_problems": 1,
    "checkpoint_every": 0,
    "sample_rows": 0,
    "start": None if name == "healthy" else "healthy",
  }
  return letters.stage(steps=STEPS, **(fields | changes))


def with_critic(name, *, lr, epochs, **changes) -> Online:
  """PPO with a critic that learns at this rate, so often from the rollouts of a step."""
  alone = dataclasses.replace(objective.ppo(), advantage=Gae(lam=1.0), kl=None)
  critic = Critic(AdamW(lr, STEPS * epochs, final_scale=1.0), epochs=epochs, clip=None)
  return stage(name, objective=alone, critic=critic, **changes)


def experiment(seed: int = 0) -> Experiment:
  """All of them."""
  well = objective.dr_grpo(SAMPLING.max_tokens)
  open_clip = dataclasses.replace(well, surrogate=Clip(0.99, 1e6))
  bonus = lambda worth: dataclasses.replace(well, entropy=worth)
  few = {"prompts": 16, "group_size": 1, "rewards": random_judge}
  return letters.experiment(
    stage("healthy"),
    with_critic("healthy_ppo", lr=0.005, epochs=2),
    stage("kl_explosion", lr=0.02, epochs=6, objective=open_clip, rewards=random_judge),
    stage("reward_collapse", warmup=10, objective=bonus(10.0), rewards=only_right),
    stage("paid by length", rewards=paid_by_length),
    stage("entropy_collapse", lr=0.01, objective=bonus(-2.0), rewards=random_judge),
    with_critic("value_overfit", lr=0.01, epochs=60, **few),
    stage("gradient_vacuum", rewards=impossible),
    seed=seed,
  )
