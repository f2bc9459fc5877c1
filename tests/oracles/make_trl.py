"""Freezes what TRL 1.16 computes for SFT and GRPO: losses, gradients, advantages.

Run in the oracle environment (tests/oracles/README.md), from the root of the repository:

  python tests/oracles/make_trl.py

It builds the real `GRPOTrainer` and `SFTTrainer` around a two-layer Qwen 3 of 29 tokens and calls
their private loss methods on inputs made here, so pin the versions. Written: `trl_grpo.npz`,
`trl_sft.npz`, `trl_advantages.npz`, each with a `versions` entry. Nothing of pt_jax is imported.

Frozen per case: the loss, d loss / d logprob of every completion token, and d loss / d lm_head.
From the frozen hidden states any implementation can compute the last one, so it checks the
alignment and the softmax as well as the objective.
"""

import functools
import itertools
import pathlib
import tempfile

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = pathlib.Path(__file__).parent
VOCAB, WIDTH, PAD, EOS = 29, 8, 0, 1
PROMPT, COMPLETION = 3, 10  # columns
MAX_COMPLETION = 12  # dr_grpo divides by this, not by the columns of the batch
LENGTHS = (
  10,
  7,
  1,
  4,
  9,
  0,
  2,
  10,
)  # completion tokens a row; 0: a truncated completion, masked whole
GROUP = 4
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo")
EPSILONS = ((0.2, 0.2), (0.2, 0.28), (0.1, 0.3))
KLS = ((0.0, False), (0.04, False), (0.04, True))  # beta, use_bias_correction_kl
VERSIONS = (
  f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
)


def tiny_model(seed: int) -> transformers.Qwen3ForCausalLM:
  """A random model whose logits are far from flat: the default initialisation, times 40."""
  torch.manual_seed(seed)
  config = transformers.Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=False,
    pad_token_id=PAD,
    eos_token_id=EOS,
  )
  model = transformers.Qwen3ForCausalLM(config)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "norm" not in name:
        weight.mul_(40)
  return model


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
  words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
  )


def trainer_args(folder: str) -> dict:
  return {
    "output_dir": folder,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "per_device_train_batch_size": len(LENGTHS),
    "disable_tqdm": True,
  }


def grpo_trainer(folder: str, reward=lambda completions, **_: [0.0] * len(completions), **options):
  config = trl.GRPOConfig(
    **trainer_args(folder),
    num_generations=GROUP,
    max_completion_length=MAX_COMPLETION,
    **options,
  )
  return trl.GRPOTrainer(
    model=tiny_model(0),
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_list([{"prompt": "w3 w4 w5"}] * 8),
    processing_class=tiny_tokenizer(),
  )


class Taps:
  """Keeps the last hidden states and log-probs of a patched model, with their gradients."""

  def __init__(self, model):
    model.model.register_forward_hook(self._hidden)
    model.register_forward_hook(self._logprobs)

  def _hidden(self, _module, _inputs, output):
    self.hidden = output.last_hidden_state.detach()

  def _logprobs(self, _module, _inputs, output):
    self.logprobs = output.log_probs
    if self.logprobs.requires_grad:
      self.logprobs.retain_grad()


def grpo_inputs(rng: np.random.Generator) -> dict[str, torch.Tensor]:
  rows = len(LENGTHS)
  mask = torch.tensor(np.arange(COMPLETION) < np.array(LENGTHS)[:, None]).long()
  prompt_mask = torch.ones(rows, PROMPT, dtype=torch.long)
  prompt_mask[1::2, 0] = 0  # TRL pads prompts on the left
  return {
    "prompt_ids": torch.tensor(rng.integers(3, VOCAB, (rows, PROMPT))) * prompt_mask,
    "prompt_mask": prompt_mask,
    "completion_ids": torch.tensor(rng.integers(1, VOCAB, (rows, COMPLETION))) * mask,
    "completion_mask": mask,
    "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1, -1.5, 0.9, 0.0, 0.8]),
    "num_items_in_batch": mask.sum(),
  }


def log_ratios(rng: np.random.Generator, scale: float) -> torch.Tensor:
  """Signed, never near 0 and never within 1e-3 of a clip edge, where the gradient is undefined."""
  values = rng.uniform(0.03, scale, (len(LENGTHS), COMPLETION))
  values *= rng.choice([-1, 1], values.shape)
  edges = np.log([1 - low for low, _ in EPSILONS] + [1 + high for _, high in EPSILONS])
  assert np.abs(values[..., None] - edges).min() > 1e-3
  return torch.tensor(values, dtype=torch.float32)


def part(inputs: dict, rows: slice) -> dict:
  return {k: v if v.dim() == 0 else v[rows] for k, v in inputs.items()}


def run_case(trainer, taps: Taps, inputs: dict, microbatches: int) -> dict[str, np.ndarray]:
  """Loss and gradients, as TRL accumulates them over `microbatches` equal parts of the rows."""
  trainer.current_gradient_accumulation_steps = microbatches
  trainer.args.steps_per_generation = microbatches
  trainer._metrics["train"].clear()
  trainer.model.zero_grad()
  size = len(LENGTHS) // microbatches
  losses, gradients = [], []
  for start in range(0, len(LENGTHS), size):
    loss = trainer._compute_loss(trainer.model, part(inputs, slice(start, start + size)))
    loss.backward()
    losses.append(loss.item())
    gradients.append(taps.logprobs.grad[:, -COMPLETION:].numpy())
  metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
  case = {
    "loss": np.sum(losses),
    "grad_logprobs": np.concatenate(gradients),
    "grad_lm_head": trainer.model.lm_head.weight.grad.numpy().copy(),
  }
  if microbatches == 1:
    case |= {
      "clip_low": metrics["clip_ratio/low_mean"],
      "clip_high": metrics["clip_ratio/high_mean"],
    }
    case |= {"kl": metrics["kl"]} if "kl" in metrics else {}
  return {k: np.float32(v) for k, v in case.items()}


def make_grpo(folder: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  trainer = grpo_trainer(folder)
  trainer.model.train()
  taps = Taps(trainer.model)
  inputs = grpo_inputs(rng)
  run_case(trainer, taps, inputs, microbatches=1)  # only to read the log-probs and hidden states
  logprobs = taps.logprobs.detach()[:, -COMPLETION:]
  inputs["old_per_token_logps"] = logprobs - log_ratios(rng, 0.6)
  inputs["ref_per_token_logps"] = logprobs + log_ratios(rng, 1.5)
  golden = {
    "tokens": inputs["completion_ids"],
    "mask": inputs["completion_mask"],
    "advantages": inputs["advantages"],
    "logprobs": logprobs,
    "old_logprobs": inputs["old_per_token_logps"],
    "reference_logprobs": inputs["ref_per_token_logps"],
    "hidden": taps.hidden[:, PROMPT - 1 : -1],
    "lm_head": trainer.model.lm_head.weight.detach(),
    "max_completion_length": torch.tensor(MAX_COMPLETION),
  }
  golden = {k: v.numpy().copy() for k, v in golden.items()}
  for loss_type, (beta, bias), (low, high) in itertools.product(LOSS_TYPES, KLS, EPSILONS):
    trainer.loss_type, trainer.beta, trainer.args.use_bias_correction_kl = loss_type, beta, bias
    trainer.epsilon_low, trainer.epsilon_high = low, high
    for microbatches in (1, 2):
      if microbatches == 2 and (loss_type == "bnpo" or (low, high) != EPSILONS[1]):
        continue  # TRL's bnpo divides by each microbatch's own tokens: not the same objective
      case = run_case(trainer, taps, inputs, microbatches)
      name = f"{loss_type}/beta={beta}/bias={int(bias)}/low={low}/high={high}/micro={microbatches}"
      golden |= {f"{name}/{k}": v for k, v in case.items()}
  return golden


def make_sft(folder: str) -> dict[str, np.ndarray]:
  """Rows of unequal length, prompts ignored; divided by their tokens, then by a global count."""
  rng = np.random.default_rng(1)
  trainer = trl.SFTTrainer(
    model=tiny_model(1),
    args=trl.SFTConfig(**trainer_args(folder), max_length=16),
    train_dataset=Dataset.from_list([{"text": "w3 w4 w5"}] * 8),
    processing_class=tiny_tokenizer(),
  )
  trainer.model.train()
  taps = Taps(trainer.model)
  columns, lengths, prompts = 12, np.array([12, 9, 5, 3]), np.array([3, 1, 4, 2])
  steps = np.arange(columns)
  real = steps < lengths[:, None]
  trained = real & (steps >= prompts[:, None])
  tokens = rng.integers(2, VOCAB, (4, columns)) * real
  golden = {"tokens": tokens, "mask": trained, "lengths": lengths}
  for name, items in (("batch", None), ("global", 31)):
    trainer.model.zero_grad()
    inputs = {
      "input_ids": torch.tensor(tokens),
      "attention_mask": torch.tensor(real).long(),
      "labels": torch.tensor(np.where(trained, tokens, -100)),
    }
    items = None if items is None else torch.tensor(items)
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
    loss.backward()
    golden |= {
      f"{name}/loss": loss.detach().numpy(),
      f"{name}/items": np.int32(trained.sum() if items is None else items),
      f"{name}/grad_logprobs": taps.logprobs.grad.numpy(),
      f"{name}/grad_lm_head": trainer.model.lm_head.weight.grad.numpy().copy(),
    }
  golden |= {
    "logprobs": taps.logprobs.detach().numpy(),
    "hidden": taps.hidden[:, :-1].numpy(),
    "lm_head": trainer.model.lm_head.weight.detach().numpy(),
  }
  return golden


def hand_out(rewards, completions, **_) -> list[float]:
  """A TRL reward function, once its first argument is bound: the next rewards of the list."""
  return next(rewards)


def make_advantages(folder: str) -> dict[str, np.ndarray]:
  """Real generation, prescribed rewards: a spread group, an equal, a binary, one lone winner."""
  rewards = np.float32([[0.3, 1.0, -0.5, 0.3], [0.7] * 4, [1, 0, 1, 1], [0, 0, 0, 2.5]])
  golden = {"rewards": rewards}
  for scale in ("group", "none", "batch"):
    trainer = grpo_trainer(
      folder,
      reward=functools.partial(hand_out, iter(rewards.reshape(2, -1).tolist())),
      scale_rewards=scale,
    )
    trainer.model.train()
    # Two generation batches of two groups: "batch" takes its spread from the batch it is in.
    batches = [trainer._generate_and_score_completions([{"prompt": "w3 w4"}] * 8) for _ in range(2)]
    golden[scale] = np.stack([b["advantages"].numpy() for b in batches]).reshape(4, GROUP)
  return golden


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    for name, make in {"grpo": make_grpo, "sft": make_sft, "advantages": make_advantages}.items():
      golden = make(folder)
      path = HERE / f"trl_{name}.npz"
      np.savez_compressed(path, versions=VERSIONS, **golden)
      print(f"{path.name}: {len(golden)} arrays, {path.stat().st_size} bytes, {VERSIONS}")


if __name__ == "__main__":
  main()
