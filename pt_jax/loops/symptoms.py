"""Single symptoms of failing runs, each a function of what was logged so far.

A symptom returns its evidence in one line while it shows, and None while it does not. The
thresholds are constants with their reasons; figures of healthy runs are those of the experiments
here (docs/diagnosis.md has them beside each other).
"""

from collections.abc import Callable, Mapping

from pt_jax.loops.history import Series

Seen = Mapping[str, Series]
Symptom = Callable[[Seen, str], str | None]  # (what was logged, the metric just logged) -> evidence

TASK = ("reward/correct", "reward")  # how well it solves the task: the first that is logged

# A policy that does nothing but sharpen the reference, to its own most likely answers, is at most
# the reference's entropy away from it; twice that, it says what the reference would not. Healthy
# runs of GRPO after a cold start measure 0.02 to 0.05 nats per token.
KL_OF_ENTROPY = 2.0
KL_NATS = 1.0  # per token, at the least: the ratio to the reference is e on the mean
KL_GROWTH = 3.0  # times the first value: a stage may start away from its reference
# PPO stops its epochs near 0.02 nats between the sampling policy and the updated one. At 0.1 the
# log-ratio has a std of 0.45, so most tokens are outside of a clip of 0.2.
STEP_KL_NATS = 0.1
REWARD_LEFT = 0.5  # of the best level; noise of a step's mean is a tenth of it
LENGTH_GROWTH = 2.0  # a cold start of reasoning grew by 1.7 as it learned, and got better by it
CUT_GROWTH = 1.25  # in length, where the share that is cut rises as well
CUT_SHARE = 0.5  # of the completions end at their limit: their rewards say little
CUT_RISE = 0.25  # over the beginning
LENGTH_LEFT = 0.5
TASK_CHANGE = 0.1  # of its beginning: less is no change
ENTROPY_LEFT = 0.05  # of the beginning, or of the first step; healthy arithmetic keeps 0.12 to 0.2
SOLVED = 0.9  # right answers: a policy may be certain of what it knows
FORMAT_LEFT = 0.5  # of the best level
FORMAT_KNOWN = 0.1  # a level below was not a format yet
REPEATS_LEFT = 0.5  # of distinct samples; a strict format alone makes formats few, not outputs
LEAKAGE_RISE = 0.1  # share of the samples
OVERFIT_GAP = 0.5  # of explained variance, rollouts trained on against fresh ones; healthy: 0.2
EXPLAINED = 0.1  # over 0, and over the beginning, a critic has learned something
VACUUM = 0.9  # of the groups give no gradient: a tenth of the batch is left
KEPT_LEFT = 0.1  # of the groups drawn
SPIKE = 10.0  # times the median norm before it
SPIKES = 3  # of the last 20 loggings: one is a batch, three are a pattern
SPIKE_NORM = 1.0  # at the least: smaller gradients are not even clipped
GAP_NATS = 0.05  # per token; float32 measures 3e-7, bfloat16 about 0.01


def not_finite(seen: Seen, metric: str) -> str | None:
  """Asked only about such metrics."""
  return f"{metric} is not finite"


def far_from_reference(seen: Seen, metric: str) -> str | None:
  """The KL to the reference rose beyond what sharpening explains."""
  kl, entropy = seen[metric], seen.get("policy/entropy")
  limit = max(KL_NATS, KL_OF_ENTROPY * entropy.begin if entropy else 0.0)
  if kl.full and kl.recent > limit and kl.recent > KL_GROWTH * kl.first:
    return f"{kl.moved()}, over {limit:.3g} nats per token"
  return None


def far_from_rollouts(seen: Seen, metric: str) -> str | None:
  """The updates of one step move the policy far from the one that sampled."""
  kl = seen[metric]
  if kl.full and kl.recent > STEP_KL_NATS:
    return f"{kl.moved()}, over {STEP_KL_NATS:g} nats per token within a step"
  return None


def reward_fell(seen: Seen, metric: str) -> str | None:
  """The reward lost half of its best level, and more than noise."""
  reward = seen[metric]
  if reward.best is None:
    return None
  return reward.fell() if reward.fall > (1 - REWARD_LEFT) * abs(reward.best[1]) else None


def grows_into_the_limit(seen: Seen, metric: str) -> str | None:
  """Completions get longer and more of them are cut."""
  length, cut = seen[metric], seen.get("stop/length")
  if not (cut and length.has_past and cut.has_past):
    return None
  if length.recent < CUT_GROWTH * length.begin:
    return None
  grew = cut.recent >= CUT_SHARE and cut.recent >= cut.begin + CUT_RISE
  return f"{length.moved()}; {cut.moved()}" if grew else None


def longer_and_no_better(seen: Seen, metric: str) -> str | None:
  """Twice as long, and the task is solved no more often."""
  length, task = seen[metric], _task(seen)
  if not (length.has_past and length.recent >= LENGTH_GROWTH * length.begin):
    return None
  if task and _change(task) > 0:
    return None
  return f"{length.moved()}; {task.moved()}" if task else length.moved()


def shorter_and_worse(seen: Seen, metric: str) -> str | None:
  """Half as long, and the task is solved less often."""
  length, task = seen[metric], _task(seen)
  if not (task and length.has_past and length.recent <= LENGTH_LEFT * length.begin):
    return None
  return f"{length.moved()}; {task.moved()}" if _change(task) < 0 else None


def entropy_fell(seen: Seen, metric: str) -> str | None:
  """The policy is certain of nearly every token, and not because it solves the task."""
  entropy, correct = seen[metric], seen.get(TASK[0])
  if not entropy.full or entropy.recent > ENTROPY_LEFT * max(entropy.first, entropy.begin):
    return None
  if correct and correct.full and correct.recent >= SOLVED:
    return None
  beside = f"; {correct.moved()}" if correct and correct.full else ""
  return f"{entropy.moved()}{beside}"


def format_fell(seen: Seen, metric: str) -> str | None:
  """A format that was kept is lost."""
  score = seen[metric]
  if score.best is None or score.best[1] < FORMAT_KNOWN:
    return None
  return score.fell() if score.fall > (1 - FORMAT_LEFT) * score.best[1] else None


def samples_repeat(seen: Seen, metric: str) -> str | None:
  """Samples have one format because they are one text."""
  formats, outputs = seen[metric], seen.get("samples/distinct_outputs")
  if not (outputs and formats.has_past and outputs.has_past):
    return None
  few = all(s.recent <= REPEATS_LEFT * s.begin for s in (formats, outputs))
  return f"{formats.moved()}; {outputs.moved()}" if few else None


def template_leaks(seen: Seen, metric: str) -> str | None:
  """Samples hold markup of a chat template that they did not hold."""
  leakage = seen[metric]
  rose = leakage.has_past and leakage.recent >= leakage.begin + LEAKAGE_RISE
  return leakage.moved() if rose else None


def critic_overfits(seen: Seen, metric: str) -> str | None:
  """The critic explains the rollouts that it was trained on, and fresh ones not at all.

  Explained variance is 1 - Var(return - value) / Var(return): 1 is perfect, 0 as good as the mean.
  """
  fresh, trained = seen[metric], seen.get(f"{metric}_after")
  if not (trained and fresh.has_past and trained.has_past):
    return None
  learned = fresh.recent > max(fresh.begin, 0.0) + EXPLAINED
  if trained.recent - fresh.recent < OVERFIT_GAP or learned:
    return None
  return f"{fresh.moved()}; {trained.moved()} on the rollouts trained on"


def groups_are_solved(seen: Seen, metric: str) -> str | None:
  """Nearly all groups have equal rewards, most of them right."""
  return _vacuum(seen, metric, solved=True)


def groups_are_hopeless(seen: Seen, metric: str) -> str | None:
  """Nearly all groups have equal rewards, most of them wrong."""
  return _vacuum(seen, metric, solved=False)


def few_groups_are_kept(seen: Seen, metric: str) -> str | None:
  """Dynamic sampling finds hardly a group with unequal rewards."""
  kept, drawn = seen[metric], seen.get("rollout/groups_drawn")
  if not (drawn and drawn.full and kept.recent <= KEPT_LEFT * drawn.recent):
    return None
  return f"{kept.moved()} of {drawn.recent:.3g} drawn"


def gradient_spikes(seen: Seen, metric: str) -> str | None:
  """The gradient norm is again and again ten times what it was before."""
  values = seen[metric].values
  spikes = 0
  for i in range(5, len(values)):
    before = sorted(values[:i])[i // 2]
    spikes += values[i] > max(SPIKE * before, SPIKE_NORM)
  if spikes < SPIKES:
    return None
  middle = sorted(values)[len(values) // 2]
  return f"{metric} {spikes} times over 10 x its median {middle:.3g}, up to {max(values):.3g}"


def rollouts_of_another_policy(seen: Seen, metric: str) -> str | None:
  """The engine's log-probs are not the trainer's."""
  gap = seen[metric]
  if gap.full and gap.recent > GAP_NATS:
    return f"{gap.moved()}, over {GAP_NATS:g} nats per token"
  return None


def _task(seen: Seen) -> Series | None:
  """The metric of success, once it can be compared with its beginning."""
  for name in TASK:
    if name in seen:
      return seen[name] if seen[name].has_past else None
  return None


def _change(series: Series) -> int:
  """1 for better than the beginning, -1 for worse, 0 for neither by more than noise or a tenth."""
  change = series.recent - series.begin
  least = max(series.margin, TASK_CHANGE * abs(series.begin))
  return (change > least) - (change < -least)


def _vacuum(seen: Seen, metric: str, *, solved: bool) -> str | None:
  share = seen[metric]
  task = next((seen[name] for name in TASK if name in seen), None)
  # With a critic a group's own mean is not the baseline: equal rewards still teach.
  if any(name.startswith("critic/") for name in seen) or not share.full or share.recent < VACUUM:
    return None
  if (task is not None and task.full and task.recent > 0.5) != solved:
    return None
  return f"{share.moved()}; {task.moved()}" if task else share.moved()
