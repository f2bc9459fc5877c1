"""Our side of `launch.bench`: each task is started once and then timed, again and again.

A task is a function that makes everything it needs and returns `once`, which does the work of one
timing, waits for it, and returns the tokens that it covered.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_peers.spec import SPEC
from pt_jax import sharding
from pt_jax.data.batch import Batch
from pt_jax.data.groups import Group, pack_groups
from pt_jax.data.packing import Example, one_per_row
from pt_jax.data.tasks import Problem
from pt_jax.loops.rollouts import Packed, pack_rollouts
from pt_jax.losses import objective as objectives
from pt_jax.losses import preference_objective
from pt_jax.losses.credit import Credit, Episodes, assign_credit
from pt_jax.losses.kl import kl_estimate
from pt_jax.losses.supervised import sft
from pt_jax.models import decoder, heads
from pt_jax.models.config import ModelConfig
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import Rollouts, SamplingParams, StopReason
from pt_jax.steps import critic, policy, preference, supervised
from pt_jax.steps.optimizer import AdamW
from pt_jax.steps.state import TrainState, Updater
from pt_jax.weights import Table


def _config() -> ModelConfig:
  return ModelConfig(**SPEC["model"], qk_norm=True, tied_embeddings=True, remat="none", unroll=True)


def _updater(table: Table) -> Updater:
  optimizer = AdamW(SPEC["learning_rate"], steps=1000, final_scale=1.0)
  return Updater(optimizer, table, sharding.zero(1))


def start() -> tuple[ModelConfig, Updater, TrainState]:
  """The model of `SPEC`, its updater and a train state of random weights."""
  config = _config()
  updater = _updater(decoder.table(config))
  make = lambda key: updater.create(decoder.init(key, config, updater.layout.params))
  return config, updater, jax.jit(make)(jax.random.key(0))


def put(batch: Any) -> Any:
  """A batch [A, B, S] on the mesh in context."""
  return sharding.put(batch, sharding.batch_spec(1), jax.sharding.get_mesh())


def _fields(packed: Packed, credit: Credit) -> Any:
  """What credit decides of a policy batch, on the mesh."""
  return put(packed.fields(credit))


def _sft() -> Callable[[int], int]:
  """`steps` updates on full rows."""
  config, updater, state = start()
  spec = SPEC["sft"]
  shape = (1, spec["batch"], spec["length"])
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
  positions = np.broadcast_to(np.arange(spec["length"], dtype=np.int32), shape)
  mask, ones = (positions > 0).astype(np.float32), np.ones(shape, np.float32)
  fields: Any = (tokens, positions, np.zeros_like(tokens), mask, ones)
  batch = put(Batch(*fields))
  step = functools.partial(supervised.sft_step, config=config, updater=updater, objective=sft())
  step = jax.jit(step, donate_argnums=0)
  box = [state]

  def once(_: int) -> int:
    for _ in range(spec["steps"]):
      box[0], _ = jax.block_until_ready(step(box[0], batch))
    return spec["batch"] * spec["length"] * spec["steps"]

  return once


def random_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
  """`count` prompts of `length` tokens below `vocab`, the same ones in every call."""
  return np.random.default_rng(0).integers(0, vocab, (count, length)).tolist()


def _generate() -> Callable[[int], int]:
  """One batch of sampled completions, none of which stops early."""
  config, _, state = start()
  spec = SPEC["generate"]
  prompts = random_prompts(spec["batch"], spec["prompt"], config.vocab_size)
  length = spec["prompt"] + spec["new_tokens"]
  engine = Engine(config, state.params, slots=spec["batch"], max_length=length)
  sampling = SamplingParams(max_tokens=spec["new_tokens"])

  def once(i: int) -> int:
    rollouts = engine.generate(prompts, sampling, key=jax.random.key(i))
    return int((rollouts.length - rollouts.prompt_length).sum())

  return once


def _mixed() -> Callable[[int], int]:
  """Requests of unlike lengths, all at once."""
  config, _, state = start()
  spec, rng = SPEC["mixed"], np.random.default_rng(0)
  prompts = [rng.integers(0, config.vocab_size, k).tolist() for k in spec["prompts"]]
  length = max(map(sum, zip(spec["prompts"], spec["new_tokens"])))
  engine = Engine(config, state.params, slots=len(prompts), max_length=length)

  def once(i: int) -> int:
    engine.update(state.params, i)  # no prefix is left of the timing before
    for prompt, count in zip(prompts, spec["new_tokens"]):
      engine.submit(prompt, SamplingParams(max_tokens=count), key=jax.random.key(i))
    tokens = 0
    while engine.unfinished:
      tokens += sum(len(output.tokens) for output in engine.step())
    return tokens

  return once


def _even(completion: Completion) -> float:
  """A reward that varies: the share of even characters."""
  return sum(ord(c) % 2 == 0 for c in completion.text) / max(len(completion.text), 1)


def _rewards(rollouts: Rollouts) -> np.ndarray:
  """Of each completion; see `_even`."""
  start = int(rollouts.prompt_length[0])
  text = lambda row: "".join(map(chr, row))
  rows = [row[start:] for row in rollouts.tokens]
  problem = Problem("bench", "", "", {})
  completions = [Completion(problem, text(row), len(row), StopReason.LENGTH) for row in rows]
  return RewardStack([Component("even", 1.0, _even)])(completions).total


def _grpo() -> Callable[[int], int]:
  """Sample, score, one update, new weights to the engine."""
  config, updater, state = start()
  spec = SPEC["grpo"]
  prompts = random_prompts(spec["prompts"], spec["prompt"], config.vocab_size)
  length, count = spec["prompt"] + spec["new_tokens"], spec["prompts"] * spec["samples"]
  engine = Engine(config, state.params, slots=count, max_length=length)
  sampling = SamplingParams(max_tokens=spec["new_tokens"])
  objective = dataclasses.replace(objectives.grpo(), kl=None)
  step = jax.jit(
    functools.partial(
      policy.policy_step,
      config=config,
      updater=updater,
      objective=objective,
      temperature=1.0,
      first_update=True,
    ),
    donate_argnums=0,
  )
  groups = np.repeat(np.arange(spec["prompts"]), spec["samples"])
  box = [state]

  def once(i: int) -> int:
    rollouts = engine.generate(prompts, sampling, key=jax.random.key(i), n=spec["samples"])
    packed = pack_rollouts(rollouts, rows=count, row_length=length)
    episodes = Episodes(_rewards(rollouts), np.zeros(count, bool), groups, packed.drawn)
    credit = assign_credit(episodes, objective=objective)
    batch = dataclasses.replace(put(packed.batch), **_fields(packed, credit))
    box[0], _ = step(box[0], batch)
    engine.update(box[0].params, i + 1)
    jax.block_until_ready(box[0])
    return int(packed.drawn.sum())

  return once


def _dpo() -> Callable[[int], int]:
  """`steps` updates on full rows of two completions, and their log-probs under the reference."""
  config, updater, state = start()
  spec, rng = SPEC["dpo"], np.random.default_rng(0)
  length = spec["prompt"] + spec["completion"]
  mask = (np.arange(length) >= spec["prompt"]).astype(np.float32)

  def pair() -> Group:
    chosen, rejected = rng.integers(0, config.vocab_size, (2, length), dtype=np.int32)
    rejected[: spec["prompt"]] = chosen[: spec["prompt"]]
    return Group((Example(chosen, mask), Example(rejected, mask)), (1.0, 0.0))

  plan = one_per_row([2 * length] * spec["pairs"], 2 * length)
  batch = pack_groups([pair() for _ in range(spec["pairs"])], plan)
  batch = put(jax.tree.map(lambda x: x[None], batch))
  objective = preference_objective.dpo(spec["beta"])
  score = jax.jit(functools.partial(preference.score, config=config))
  step = jax.jit(
    functools.partial(
      preference.preference_step, config=config, updater=updater, objective=objective
    ),
    donate_argnums=0,
  )
  reference = jax.tree.map(jnp.copy, state.params)
  box = [preference.PreferenceState(state, jnp.zeros((), jnp.float32))]

  def once(_: int) -> int:
    for _ in range(spec["steps"]):
      scored = batch.replace(reference_logprobs=score(reference, batch))
      box[0], _ = jax.block_until_ready(step(box[0], scored))
    return 2 * length * spec["pairs"] * spec["steps"]

  return once


def _ppo() -> Callable[[int], int]:
  """Sample, score, values and log-probs, an update of the critic and one of the policy, new weights
  to the engine. One update on each batch, as the GRPO step has."""
  config, updater, state = start()
  spec = SPEC["ppo"]
  count, length = spec["prompts"], spec["prompt"] + spec["new_tokens"]
  prompts = random_prompts(count, spec["prompt"], config.vocab_size)
  engine = Engine(config, state.params, slots=count, max_length=length)
  sampling, objective = SamplingParams(max_tokens=spec["new_tokens"]), objectives.ppo()
  reference = jax.tree.map(jnp.copy, state.params)
  of_critic = _updater(heads.table(config))
  trunk = {name: w for name, w in state.params.items() if name != "unembed"}
  head = {heads.HEAD: jnp.zeros(heads.head_row(config).shape)}
  box = [state, jax.jit(of_critic.create)({**jax.tree.map(jnp.copy, trunk), **head})]
  shared: dict[str, Any] = {"config": config, "temperature": 1.0}
  score = jax.jit(functools.partial(policy.score, **shared))
  values = jax.jit(functools.partial(critic.score_values, config=config))
  learn = functools.partial(critic.value_step, config=config, updater=of_critic, clip=0.2)
  update = functools.partial(
    policy.policy_step, updater=updater, objective=objective, first_update=True, **shared
  )
  learn, update = jax.jit(learn, donate_argnums=0), jax.jit(update, donate_argnums=0)

  def once(i: int) -> int:
    rollouts = engine.generate(prompts, sampling, key=jax.random.key(i))
    packed = pack_rollouts(rollouts, rows=count, row_length=length)
    batch = put(packed.batch)
    batch = dataclasses.replace(
      batch,
      old_logprobs=score(box[0].params, batch),
      reference_logprobs=score(reference, batch),
      old_values=values(box[1].params, batch),
    )
    scores = (batch.old_logprobs, batch.reference_logprobs, batch.old_values)
    old, other, value = (packed.take_back(np.asarray(x)) for x in scores)
    kl = kl_estimate(*map(jnp.asarray, (old, other, packed.drawn)), estimator="k1")
    episodes = Episodes(
      _rewards(rollouts),
      np.zeros(count, bool),
      np.arange(count),
      packed.drawn,
      kl=np.asarray(kl),
      values=value,
    )
    credit = assign_credit(episodes, objective=objective)
    batch = dataclasses.replace(batch, **_fields(packed, credit))
    box[1], _ = learn(box[1], batch)
    box[0], _ = update(box[0], batch)
    engine.update(box[0].params, i + 1)
    jax.block_until_ready(box)
    return int(packed.drawn.sum())

  return once


STARTS: dict[str, Callable[[], Callable[[int], int]]] = {
  "sft": _sft,
  "generate": _generate,
  "mixed": _mixed,
  "grpo": _grpo,
  "dpo": _dpo,
  "ppo": _ppo,
}
