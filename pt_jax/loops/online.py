"""The online loop: prompts -> rollouts -> rewards -> advantages -> packed batches -> updates -> new
weights.

What a step samples is a function of the seed, the step and the weights. A checkpoint holds the
train states of policy and critic, the position in the stream of prompts, and the coefficient that a
KL controller has moved.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import sharding
from pt_jax.data.batch import PolicyBatch
from pt_jax.data.tasks import Problem
from pt_jax.experiment import Critic, Online, ValueHead
from pt_jax.loops import difficulty
from pt_jax.loops import episodes as episode
from pt_jax.loops.context import Context, abstract_state, in_stage
from pt_jax.loops.critic import (
  CriticLoop,
  explained_variance,
  fresh_head,
  share_explained,
  whole,
)
from pt_jax.loops.evaluation import evaluate, held_out_problems, new_engine
from pt_jax.loops.mixing import MixedPairs
from pt_jax.loops.model_rewards import RewardModel
from pt_jax.loops.progress import Progress
from pt_jax.loops.rollouts import (
  CORRECT,
  Judged,
  Packed,
  concatenate,
  cut,
  engine_metrics,
  generate_and_judge,
  pack_rollouts,
  rollout_metrics,
  sample_rows,
)
from pt_jax.losses.credit import Credit, Episodes, assign_credit, kept_groups
from pt_jax.losses.kl import adapted, kl_estimate
from pt_jax.losses.options import Greedy, MonteCarlo
from pt_jax.metrics import check_finite
from pt_jax.models import heads
from pt_jax.models.config import ModelConfig
from pt_jax.steps import policy
from pt_jax.steps.critic import score_values
from pt_jax.steps.state import TrainState, Updater
from pt_jax.weights import Params

HISTOGRAMS_EVERY = 10  # steps

Metrics = dict[str, jax.Array]


def run_online(stage: Online, context: Context) -> tuple[Params, dict[str, float]]:
  """Runs or resumes an online stage.

  Returns the parameters of the policy it ends with and its last held-out evaluation.

  Raises ValueError for a non-finite loss (before a checkpoint is written) and for problems or
  rewards that the stage cannot use.
  """
  loop = _Loop(stage, context)
  with context.progress(stage.total, loop.start) as progress, in_stage(stage.name):
    for step in range(loop.start, stage.total):
      loop.step(step, progress)
  return loop.policy_params, loop.finish()


class Pending(NamedTuple):
  """A step whose updates were dispatched, to be logged later."""

  step: int
  policy: list[Metrics]  # of each update
  critic: list[Metrics]  # of each update; empty without a critic of its own
  figures: dict[str, float]
  return_variance: float  # of the returns that the critic learned


class _Loop:
  """What an online stage carries from step to step."""

  def __init__(self, stage: Online, context: Context):
    self.stage, self.context = stage, context
    self.task, self.stack = stage.problems(context.tokenizer), stage.rewards()
    held_out_problems(self.task, stage.evaluate_problems)
    self.prompts = difficulty.open_stream(stage, self.task, context.seed)
    kl = stage.objective.kl
    self.reference = context.params if kl is not None else None
    self.kl_coefficient = kl.coefficient if kl is not None else 0.0
    self.tokens = 0  # sampled so far
    self.critic = CriticLoop(stage.critic, context) if isinstance(stage.critic, Critic) else None
    self.mixed = MixedPairs(stage.mix, context) if stage.mix is not None else None
    self.reward_model = None
    if stage.reward_model is not None:
      self.reward_model = RewardModel(stage.reward_model, context, stage.rows, stage.row_length)
    self.start = self._start()
    self.engine = new_engine(context, self.policy_params, stage.slots, stage.row_length, self.start)
    if self.start == 0 and stage.pass_rate is not None:
      self.tokens = difficulty.sift(
        self.prompts, self.task.train, stage.pass_rate, context, self._judge
      )
    self._compile()
    self.results: dict[str, float] = {}
    self.pending: Pending | None = None
    self._since = time.perf_counter()  # the last step was logged, or an evaluation or save was done

  @property
  def policy_params(self) -> Params:
    """Those of the decoder, without a value head on it."""
    return {name: self.state.params[name] for name in self.context.table}

  def _start(self) -> int:
    """Goes on from the newest checkpoint, or starts afresh; returns the steps done."""
    stage, context = self.stage, self.context
    if isinstance(stage.critic, ValueHead):
      table = {**context.table, heads.HEAD: heads.head_row(context.config)}
      context = dataclasses.replace(context, table=table)
    self.updater = Updater(stage.optimizer, context.table, context.layout)
    abstract = abstract_state(self.updater, context)
    saved = context.stage.restore(
      _tree(abstract, self.critic.abstract() if self.critic is not None else None)
    )
    if saved is None:
      params = context.params
      if isinstance(stage.critic, ValueHead):
        params = {**params, heads.HEAD: fresh_head(context)}
      self.state = jax.jit(self.updater.create)(jax.tree.map(jnp.copy, params))
      if self.critic is not None:
        self.critic.start()
      return 0
    self.state = TrainState(*(saved.state[name] for name in ("step", "params", "optimizer")))
    if self.critic is not None:
      self.critic.state = saved.state["critic"]
    self.prompts.set_state(saved.host["prompts"])
    if self.mixed is not None:
      self.mixed.set_state(saved.host["mixed"])
    self.kl_coefficient, self.tokens = saved.host["kl_coefficient"], saved.host["tokens"]
    return saved.step

  def _compile(self) -> None:
    stage, config = self.stage, self.context.config
    self._update = compiled_update(stage, config, self.updater)
    self._one_update = one_update(stage)
    self._score = compiled_score(stage, config)
    if self._kl_in_reward and stage.objective.kl is not None:
      estimate = functools.partial(kl_estimate, estimator=stage.objective.kl.estimator)
      self._kl = jax.jit(jax.vmap(estimate))
    self._score_values = jax.jit(functools.partial(score_values, config=config))

  def step(self, step: int, progress: Progress) -> None:
    """Samples, judges, updates; logs what the step before measured."""
    started, before = time.perf_counter(), self.tokens
    engine = self.engine.figures.copy()
    judged, figures = self._rollouts(step)
    sampled = time.perf_counter()
    self._flush(progress)
    self.pending = self._learn(step, judged, figures)
    self.engine.update(self.policy_params, step + 1)
    figures |= rollout_metrics(judged) | {
      "rollout/tokens": float(self.tokens),
      "perf/rollout_tokens_per_second": (self.tokens - before) / (sampled - started),
      "perf/rollout_seconds": sampled - started,
      **engine_metrics(self.engine, engine),
    }
    self._sample(step + 1, judged)
    done, stage = step + 1, self.stage
    moved = done > stage.total - stage.steps  # not while only the critic learns
    if stage.evaluate_every and done % stage.evaluate_every == 0 and moved and done < stage.total:
      self._flush(progress)
      self._evaluate(done)
      self._since = time.perf_counter()
    if stage.checkpoint_every and done % stage.checkpoint_every == 0 and done < stage.total:
      self._flush(progress)
      self._save(done)
      self._since = time.perf_counter()
    if done == stage.total:
      self._flush(progress)

  def finish(self) -> dict[str, float]:
    """The last held-out evaluation."""
    self._evaluate(self.stage.total)
    return self.results

  def _save(self, done: int) -> None:
    critic = self.critic.state if self.critic is not None else None
    host = {
      "prompts": self.prompts.state(),
      "kl_coefficient": self.kl_coefficient,
      "tokens": self.tokens,
      "mixed": self.mixed.state() if self.mixed is not None else None,
    }
    self.context.stage.save(done, _tree(self.state, critic), host)

  def _sample(self, done: int, judged: Judged) -> None:
    self.context.stage.samples(done, sample_rows(judged, self.stage.sample_rows))
    if (done - 1) % HISTOGRAMS_EVERY == 0:
      self.context.stage.histogram(done, "reward", judged.rewards.total)
      self.context.stage.histogram(done, "length", [c.tokens for c in judged.completions])

  def _judge(self, problems: list[Problem], key: jax.Array, **options: Any) -> Judged:
    sampling = options.pop("sampling", self.stage.sampling)
    judged = generate_and_judge(
      self.engine,
      problems,
      self.task,
      self.context.tokenizer,
      self.stack,
      sampling,
      key=key,
      **options,
    )
    return judged if self.reward_model is None else self.reward_model.judge(judged)

  def _rollouts(self, step: int) -> tuple[Judged, dict[str, float]]:
    """The completions of one step: `prompts` groups. Where the objective drops groups, more are
    drawn in their place, up to the limit; then dropped ones fill what is left."""
    stage, objective = self.stage, self.stage.objective
    key = self.context.key("rollouts", step)
    kept: list[Judged] = []
    dropped: list[Judged] = []
    rates: list[float] = []
    groups = useful = 0
    for attempt in range(stage.resample_limit):
      problems = self.prompts.take(stage.prompts)
      attempt_key = jax.random.fold_in(key, attempt)
      judged = self._judge(problems, attempt_key, n=stage.group_size, first_group=groups)
      self.tokens += sum(c.tokens for c in judged.completions)
      rates += difficulty.solve_rates(judged)
      groups += stage.prompts
      keep = kept_groups(judged.rewards.total, judged.groups, objective=objective)
      useful += int(keep.sum()) // stage.group_size
      kept.append(judged.take(np.flatnonzero(keep)))
      dropped.append(judged.take(np.flatnonzero(~keep)))
      if useful >= stage.prompts:
        break
    rows = np.arange(stage.prompts * stage.group_size)
    chosen = concatenate([*kept, *dropped]).take(rows)
    figures = {
      "rollout/groups_drawn": float(groups),
      "rollout/groups_kept": float(useful),
    }
    if stage.group_size > 1:
      figures["rollout/zero_variance"] = _zero_variance(chosen)
    return chosen, figures | self.prompts.update(rates)

  def _learn(self, step: int, judged: Judged, figures: dict[str, float]) -> Pending:
    """Credit for the completions of one step, and all updates on them.

    Minibatches are whole groups, in the order of the step; advantages are those of all of them.
    """
    stage, mesh = self.stage, self.context.mesh
    parts = np.split(np.arange(len(judged.completions)), stage.minibatches)
    packs = [
      pack_rollouts(
        judged.take(rows).rollouts,
        stage.rows,
        stage.row_length,
        share_prompts=stage.share_prompts,
      )
      for rows in parts
    ]
    put = lambda tree: sharding.put(tree, sharding.batch_spec(1), mesh)
    batches = [self._scored(put(pack.batch)) for pack in packs]
    episodes = self._episodes(step, judged, packs, batches)
    coefficient = self.kl_coefficient if self._kl_in_reward else None
    credit = assign_credit(episodes, objective=stage.objective, kl_coefficient=coefficient)
    batches = [
      dataclasses.replace(batch, **put(pack.fields(_rows(credit, rows))))
      for batch, pack, rows in zip(batches, packs, parts)
    ]
    if episodes.values is not None:
      figures["critic/explained_variance"] = explained_variance(episodes, credit)
    critic = self.critic.update(batches, self._order(step, 1)) if self.critic else []
    metrics = self._update_policy(step, batches) if step >= stage.total - stage.steps else []
    figures["rollout/credited_reward"] = float(credit.rewards.mean())
    trained = credit.returns[episodes.mask & credit.trained[:, None]]
    variance = float(trained.var(dtype=np.float64)) if trained.size else 0.0
    return Pending(step + 1, metrics, critic, figures, variance)

  @property
  def _kl_in_reward(self) -> bool:
    kl = self.stage.objective.kl
    return kl is not None and kl.where == "reward"

  def _scored(self, batch: PolicyBatch) -> PolicyBatch:
    """With the log-probs and values that the objective reads, under the weights of now."""
    kl, scores = self.stage.objective.kl, {}
    if self._kl_in_reward or not self._one_update:
      scores["old_logprobs"] = self._score(self.policy_params, batch)
    if kl is not None and kl.estimator != "exact":
      scores["reference_logprobs"] = self._score(self.reference, batch)
    if self.critic is not None:
      scores["old_values"] = self.critic.values(batch)
    elif self.stage.critic is not None:
      scores["old_values"] = self._score_values(self.state.params, batch)
    return dataclasses.replace(batch, **scores)

  def _episodes(
    self, step: int, judged: Judged, packs: list[Packed], batches: list[PolicyBatch]
  ) -> Episodes:
    """The completions of a step, with all that the objective wants to know of them."""
    stage, objective = self.stage, self.stage.objective
    right = judged.rewards.components[CORRECT] >= 1
    mask = np.concatenate([pack.drawn for pack in packs])
    known: dict[str, Any] = {"right": right} if objective.positive_nll else {}
    join = lambda arrays: np.concatenate(
      [pack.take_back(x) for pack, x in zip(packs, whole(arrays))]
    )
    if stage.critic is not None:
      known["values"] = join([batch.old_values for batch in batches])
    if self._kl_in_reward and objective.kl is not None:
      known["kl"] = join([self._kl(b.old_logprobs, b.reference_logprobs, b.mask) for b in batches])
    if isinstance(objective.advantage, Greedy):
      judge = functools.partial(self._judge, key=self.context.key("greedy", step))
      known["greedy"], tokens = episode.greedy_rewards(judge, judged, stage.sampling)
      self.tokens += tokens
    if stage.steps_of is not None:
      known |= self._steps(step, judged)
    rewards, groups = judged.rewards.total, judged.groups
    return Episodes(rewards=rewards, truncated=cut(judged), groups=groups, mask=mask, **known)

  def _steps(self, step: int, judged: Judged) -> dict[str, np.ndarray]:
    """Where the steps of completions end, and what they are worth."""
    options, advantage = self.stage.steps_of, self.stage.objective.advantage
    assert options is not None
    tokenizer = self.context.tokenizer
    ends = episode.step_ends(judged, tokenizer, options.mark)
    if not isinstance(advantage, MonteCarlo):
      if options.rewards is not None:
        rewards = episode.step_rewards(judged, ends, tokenizer, options.rewards)
      else:
        assert self.reward_model is not None  # see `Online`
        rewards = self.reward_model.step_rewards(judged, ends)
      return {"step_ends": ends, "step_rewards": rewards}
    values, tokens = episode.step_values(
      judged,
      ends,
      engine=self.engine,
      tokenizer=tokenizer,
      stack=self.stack,
      sampling=self.stage.sampling,
      count=advantage.rollouts,
      key=self.context.key("steps", step),
    )
    self.tokens += tokens
    prompts = episode.prompt_values(judged.rewards.total, judged.groups)
    return {"step_ends": ends, "step_values": values, "prompt_values": prompts}

  def _order(self, step: int, network: int) -> np.random.Generator:
    """Draws the order of minibatches: of the policy (0), of the critic (1)."""
    return np.random.default_rng((self.context.seed, step, network))

  def _update_policy(self, step: int, batches: list[PolicyBatch]) -> list[Metrics]:
    """`epochs` passes over the minibatches, fewer when the policy has moved by `stop_kl`."""
    stage, kl = self.stage, self.stage.objective.kl
    given: dict[str, Any] = {}
    if kl is not None and kl.estimator == "exact":
      given["reference"] = self.reference
    if kl is not None and kl.controller is not None:
      given["kl_coefficient"] = jnp.float32(self.kl_coefficient)
    order = self._order(step, 0)
    metrics: list[Metrics] = []
    for _ in range(stage.epochs):
      for i in order.permutation(len(batches)):
        if self.mixed is not None:
          given["pairs"] = self.mixed.take()
        self.state, measured = self._update(self.state, batches[i], **given)
        metrics.append(measured)
      if stage.stop_kl is not None:
        moved = [m["policy/approx_kl"].item() for m in metrics[-len(batches) :]]
        if np.mean(moved) > stage.stop_kl:
          break
    return metrics

  def _flush(self, progress: Progress) -> None:
    """Logs the step that is pending; its updates have long been dispatched."""
    if self.pending is None:
      return
    step, updates, of_critic, figures, variance = self.pending
    self.pending = None
    measured, critic = jax.device_get((updates, of_critic))
    now = time.perf_counter()
    figures["perf/step_seconds"], self._since = now - self._since, now
    metrics = _averaged(measured) | _averaged(critic)
    last = (critic or measured)[-self.stage.minibatches :]
    if "critic/error" in metrics:
      error, bias = (float(np.mean([m[f"critic/{x}"] for m in last])) for x in ("error", "bias"))
      metrics["critic/explained_variance_after"] = share_explained(error - bias**2, variance)
    if measured:
      metrics["policy/epochs"] = len(measured) / self.stage.minibatches
    check_finite(metrics, step)
    self._control(metrics)
    self.context.stage.log(step, metrics | figures)
    shown = {"entropy": "policy/entropy", "gap": "rollout/logprob_gap_max"}
    shown |= {"value_loss": "critic/loss", "kl": "policy/kl"}
    progress.update(
      step,
      tokens=int(figures["length/mean"] * self.stage.prompts * self.stage.group_size),
      reward=figures["reward"],
      **{name: metrics[metric] for name, metric in shown.items() if metric in metrics},
    )

  def _control(self, metrics: dict[str, float]) -> None:
    """Moves the coefficient of the KL by what the step measured."""
    kl = self.stage.objective.kl
    if kl is None or "policy/kl" not in metrics:
      return
    metrics["policy/kl_coefficient"] = self.kl_coefficient
    if kl.controller is not None:
      self.kl_coefficient = adapted(self.kl_coefficient, metrics["policy/kl"], kl.controller)

  def _evaluate(self, step: int) -> None:
    stage = self.stage
    self.results, _ = evaluate(
      self.engine, self.task, self.stack, stage.sampling, stage.evaluate_problems, self.context
    )
    self.context.stage.log(step, self.results)


def one_update(stage: Online) -> bool:
  """Whether a step is one update: the log-probs of its forward pass are then the old ones."""
  return stage.epochs * stage.minibatches == 1


def compiled_update(stage: Online, config: ModelConfig, updater: Updater) -> Any:
  """The jitted, donated `policy.policy_step` of a stage: (state, batch with leaves [A, B, S], what
  else its objective reads) -> (state, metrics)."""
  head = stage.critic if isinstance(stage.critic, ValueHead) else None
  of_head = {"value_coefficient": head.coefficient, "value_clip": head.clip} if head else {}
  step = functools.partial(
    policy.policy_step,
    config=config,
    temperature=stage.sampling.temperature or 1.0,
    updater=updater,
    objective=stage.objective,
    first_update=one_update(stage),
    mixed=None if stage.mix is None else (stage.mix.objective, stage.mix.weight),
    **of_head,
  )
  return jax.jit(step, donate_argnums=0)


def compiled_score(stage: Online, config: ModelConfig) -> Any:
  """The jitted (params, batch with leaves [A, B, S]) -> log-probs [A, B, S]."""
  temperature = stage.sampling.temperature or 1.0
  return jax.jit(functools.partial(policy.score, config=config, temperature=temperature))


def _tree(policy: Any, critic: Any) -> dict[str, Any]:
  """The arrays of a checkpoint: those of the policy's train state, and the critic's beside them."""
  fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
  return fields | ({} if critic is None else {"critic": critic})


def _rows(credit: Credit, rows: np.ndarray) -> Credit:
  return Credit(*(getattr(credit, f.name)[rows] for f in dataclasses.fields(credit)))


def _averaged(updates: list[dict[str, Any]]) -> dict[str, float]:
  """The mean of each metric over the updates of a step; the largest where its name says so."""
  metrics = {}
  for name in updates[0] if updates else ():
    values = np.array([m[name] for m in updates])
    metrics[name] = float(values.max() if name.endswith("_max") else values.mean())
  return metrics


def _zero_variance(judged: Judged) -> float:
  """Share of groups whose rewards are all equal: they give no gradient."""
  _, group = np.unique(judged.groups, return_inverse=True)
  total = judged.rewards.total
  low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
  np.minimum.at(low, group, total)
  np.maximum.at(high, group, total)
  return float(np.mean(low == high))
