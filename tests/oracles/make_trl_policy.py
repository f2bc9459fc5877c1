"""Freezes what TRL 1.16 computes for the rest of its policy objectives: losses and gradients.

GSPO, CISPO, SAPO, two-sided clipping, mismatch correction, the entropy bonus and RLOO with its
advantages.

Run in the oracle environment (tests/oracles/README.md), from the root of the repository:

  python tests/oracles/make_trl_policy.py

Written: `trl_policy.npz`, with a `versions` entry. The model, the inputs and the frozen quantities
are those of `make_trl.py`, whose functions are used; nothing of pt_jax is imported.
"""

import functools
import pathlib
import tempfile

import make_trl as base
import numpy as np
import torch
import trl
from datasets import Dataset

HERE = pathlib.Path(__file__).parent
PROMPT, COMPLETION = base.PROMPT, base.COMPLETION
# name -> attributes of the trainer, of its arguments, and the bounds of the correction (or None)
CASES = {
  "gspo": ({"importance_sampling_level": "sequence"}, {"low": 0.1, "high": 0.1}, None),
  "gspo, tight": ({"importance_sampling_level": "sequence"}, {"low": 3e-4, "high": 4e-4}, None),
  "gspo, kl": ({"importance_sampling_level": "sequence", "beta": 0.04}, {}, None),
  "cispo": ({"loss_type": "cispo"}, {"high": 5.0}, None),
  "cispo, low bound": ({"loss_type": "cispo"}, {"high": 1.2}, None),
  "sapo": ({"loss_type": "sapo"}, {"positive": 1.0, "negative": 1.05}, None),
  "sapo, sharp": ({"loss_type": "sapo"}, {"positive": 3.0, "negative": 5.0}, None),
  "two-sided": ({}, {"delta": 1.3, "low": 0.2, "high": 0.2}, None),
  "entropy": ({"_entropy_bonus_enabled": True, "entropy_coef": 0.1, "loss_type": "bnpo"}, {}, None),
  "token_truncate": ({}, {}, (None, 1.2)),
  "token_mask": ({}, {}, (0.8, 1.2)),
  "sequence_truncate": ({}, {}, (None, 1.2)),
  "sequence_mask": ({}, {}, (0.5, 1.2)),
}


def correction_ratio(inputs: dict, mode: str, low: float | None, high: float) -> torch.Tensor:
  """The lines of `_generate_and_score_completions` that need vLLM to be reached, on our inputs."""
  level, kind = mode.split("_")
  difference = (inputs["old_per_token_logps"] - inputs["sampling"]) * inputs["completion_mask"]
  if level == "sequence":
    difference = difference.sum(dim=-1, keepdim=True)
  ratio = torch.exp(difference)
  if kind == "truncate":
    return torch.clamp(ratio, min=low, max=high)
  return ratio.masked_fill((ratio < (low or -torch.inf)) | (ratio > high), 0.0)


def set_options(trainer, attributes: dict, options: dict) -> None:
  defaults = {
    "loss_type": "grpo",
    "beta": 0.0,
    "importance_sampling_level": "token",
    "_entropy_bonus_enabled": False,
    "entropy_coef": 0.0,
    "use_vllm": False,
  }
  for name, value in (defaults | attributes).items():
    setattr(trainer, name, value)
  trainer.epsilon_low, trainer.epsilon_high = options.get("low", 0.2), options.get("high", 0.2)
  trainer.args.delta = options.get("delta")
  trainer.args.use_bias_correction_kl = False
  trainer.args.sapo_temperature_pos = options.get("positive", 1.0)
  trainer.args.sapo_temperature_neg = options.get("negative", 1.05)


def make_grpo(folder: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  trainer = base.grpo_trainer(folder)
  trainer.model.train()
  taps = base.Taps(trainer.model)
  inputs = base.grpo_inputs(rng)
  set_options(trainer, {}, {})
  base.run_case(trainer, taps, inputs, microbatches=1)
  logprobs = taps.logprobs.detach()[:, -COMPLETION:]
  inputs["old_per_token_logps"] = logprobs - base.log_ratios(rng, 0.6)
  inputs["ref_per_token_logps"] = logprobs + base.log_ratios(rng, 1.5)
  noise = rng.uniform(0.05, 0.4, logprobs.shape) * rng.choice([-1, 1], logprobs.shape)
  inputs["sampling"] = inputs["old_per_token_logps"] - torch.tensor(noise, dtype=torch.float32)
  golden = {
    "tokens": inputs["completion_ids"],
    "mask": inputs["completion_mask"],
    "advantages": inputs["advantages"],
    "logprobs": logprobs,
    "old_logprobs": inputs["old_per_token_logps"],
    "reference_logprobs": inputs["ref_per_token_logps"],
    "sampler_logprobs": inputs["sampling"],
    "hidden": taps.hidden[:, PROMPT - 1 : -1],
    "lm_head": trainer.model.lm_head.weight.detach(),
  }
  golden = {k: v.numpy().copy() for k, v in golden.items()}
  for name, (attributes, options, bounds) in CASES.items():
    given = dict(inputs)
    if bounds is not None:
      attributes = {"use_vllm": True, "vllm_importance_sampling_correction": True}
      given["importance_sampling_ratio"] = correction_ratio(given, name, *bounds)
    set_options(trainer, attributes, options)
    golden |= {f"{name}/{k}": v for k, v in run_without_clips(trainer, taps, given).items()}
  return golden


def run_without_clips(trainer, taps: base.Taps, inputs: dict) -> dict[str, np.ndarray]:
  """`base.run_case` without the logged clip fractions, which not every loss type has."""
  trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
  trainer.model.zero_grad()
  loss = trainer._compute_loss(trainer.model, inputs)
  loss.backward()
  case = {
    "loss": loss.item(),
    "grad_logprobs": taps.logprobs.grad[:, -COMPLETION:].numpy(),
    "grad_lm_head": trainer.model.lm_head.weight.grad.numpy().copy(),
  }
  return {k: np.float32(v) for k, v in case.items()}


def rloo_trainer(folder: str, reward=lambda completions, **_: [0.0] * len(completions)):
  config = trl.RLOOConfig(
    **base.trainer_args(folder),
    num_generations=base.GROUP,
    max_completion_length=base.MAX_COMPLETION,
    beta=0.0,
    epsilon=0.3,
  )
  return trl.RLOOTrainer(
    model=base.tiny_model(0),
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_list([{"prompt": "w3 w4 w5"}] * 8),
    processing_class=base.tiny_tokenizer(),
  )


def make_rloo(folder: str, grpo: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The loss on the same inputs, and the advantages of prescribed rewards."""
  trainer = rloo_trainer(folder)
  trainer.model.train()
  taps = base.Taps(trainer.model)
  inputs = base.grpo_inputs(np.random.default_rng(0))
  old, mask = torch.tensor(grpo["old_logprobs"]), inputs["completion_mask"]
  trainer.model.zero_grad()
  inputs["old_logps"] = (old * mask).sum(1)
  loss = trainer._compute_loss(trainer.model, inputs)
  loss.backward()
  golden = {
    "rloo/loss": np.float32(loss.item()),
    "rloo/grad_logprobs": taps.logprobs.grad[:, -COMPLETION:].numpy(),
    "rloo/grad_lm_head": trainer.model.lm_head.weight.grad.numpy().copy(),
    "rloo/logprobs": taps.logprobs.detach()[:, -COMPLETION:].numpy(),
  }
  rewards = np.float32([[0.3, 1.0, -0.5, 0.3], [0.7] * 4, [1, 0, 1, 1], [0, 0, 0, 2.5]])
  given = functools.partial(base.hand_out, iter(rewards.reshape(2, -1).tolist()))
  trainer = rloo_trainer(folder, reward=given)
  trainer.model.train()
  batches = [trainer._generate_and_score_completions([{"prompt": "w3 w4"}] * 8) for _ in range(2)]
  advantages = np.stack([b["advantages"].numpy() for b in batches]).reshape(4, base.GROUP)
  return golden | {"rloo/rewards": rewards, "rloo/advantages": advantages}


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    golden = make_grpo(folder)
    golden |= make_rloo(folder, golden)
  path = HERE / "trl_policy.npz"
  np.savez_compressed(path, versions=base.VERSIONS, **golden)
  print(f"{path.name}: {len(golden)} arrays, {path.stat().st_size} bytes, {base.VERSIONS}")


if __name__ == "__main__":
  main()
