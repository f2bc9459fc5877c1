"""Tunix's `GRPOLearner`: seconds of whole steps, prompts to new weights, with a trivial reward."""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import tunix_peer
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout


def reward(prompts: list[str], completions: list[str], **_) -> list[float]:
  """How many words end in an even digit: something to tell completions apart by."""
  return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]


def cluster(spec: dict, steps: int) -> rl_cluster.RLCluster:
  """Actor and rollout engine on one device; no reference model, the KL coefficient is 0."""
  grpo, mesh = spec["grpo"], tunix_peer.mesh()
  roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
  return rl_cluster.RLCluster(
    actor=tunix_peer.qwen3(spec),
    tokenizer=tunix_peer.WordTokenizer(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(roles, mesh),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=tunix_peer.optimizer(spec), eval_every_n_steps=steps, max_steps=steps
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=grpo["new_tokens"],
        max_prompt_length=grpo["prompt"],
        kv_cache_size=grpo["prompt"] + grpo["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],  # nothing stops a row
      ),
    ),
  )


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = tunix_peer.start()
  grpo = spec["grpo"]
  steps = spec["warmup"] + spec["repeats"] + 1
  asked = []  # when the learner asked for each batch; it does once the step before is over

  def batches() -> Iterator[dict[str, np.ndarray]]:
    for seed in range(steps):
      asked.append(time.perf_counter())
      prompts = tunix_peer.random_prompts(spec, grpo["prompts"], grpo["prompt"], seed)
      yield {"prompts": np.array(prompts)}

  learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster(spec, steps),
    reward_fns=reward,
    algo_config=grpo_learner.GRPOConfig(num_generations=grpo["samples"], beta=0.0),
  )
  learner.train(batches())
  seconds = [after - before for before, after in itertools.pairwise(asked)]
  tunix_peer.report(
    "grpo",
    seconds[-spec["repeats"] :],
    grpo["prompts"] * grpo["samples"] * grpo["new_tokens"],
    "GRPOLearner, vanilla rollout, one batch an update, no rematerialisation",
  )


if __name__ == "__main__":
  main()
