"""Freezes what TRL 1.16 computes for reward models: losses, gradients by the rewards, metrics.

Run in the oracle environment (tests/oracles/README.md), from the root of the repository:

  python tests/oracles/make_trl_reward.py

It builds the real `RewardTrainer` and calls its `compute_loss` in two ways: around a two-layer Qwen
3 with a score head, on rows of unequal length, where d loss / d head is frozen with the hidden
states at the last tokens; and around a module that returns prescribed rewards up to 60 apart. Cases
`SOURCE/margin=M/center=C`: without and with margins, centering 0, 0.01 and 0.3. Written:
`trl_reward.npz`. Nothing of pt_jax is imported.
"""

import itertools
import pathlib
import tempfile
import types

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from make_trl import EOS, PAD, VERSIONS, VOCAB, WIDTH, tiny_tokenizer, trainer_args

HERE = pathlib.Path(__file__).parent
LENGTHS = (7, 4, 9, 5, 6, 6, 3, 9)  # four chosen rows, then the four rejected ones
MARGINS = (1.0, 0.5, 0.1, 0.26)
CENTERS = (0.0, 0.01, 0.3)
# Equal ones, ordinary ones, and 30 and 60 apart in both directions.
CHOSEN = (0.4, 1.3, -0.7, 2.5, 15.0, -15.0, 30.0, -30.0, 0.0)
REJECTED = (0.4, 0.2, 0.9, 2.4, -15.0, 15.0, -30.0, 30.0, 0.0)
PRESCRIBED_MARGINS = (0.1, 0.5, 1.0, 0.3, 1.0, 1.0, 0.5, 0.5, 0.0)


def scorer() -> transformers.Qwen3ForSequenceClassification:
  """A random model whose rewards are far from equal: the default initialisation, times 40."""
  torch.manual_seed(2)
  config = transformers.Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    pad_token_id=PAD,
    eos_token_id=EOS,
    num_labels=1,
  )
  model = transformers.Qwen3ForSequenceClassification(config)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "norm" not in name:
        weight.mul_(40)
  return model


class Prescribed(torch.nn.Module):
  """Rewards that were written down."""

  def __init__(self):
    super().__init__()
    self.logits = torch.nn.Parameter(torch.tensor(CHOSEN + REJECTED)[:, None])

  def forward(self, **_):
    return types.SimpleNamespace(logits=self.logits)


def run(trainer, model, inputs: dict, margins, center: float) -> dict[str, np.ndarray]:
  """Loss, d loss / d reward [rows], and what TRL logs."""
  kept = {}

  def tapped(**fields):
    kept["outputs"] = model(**{k: v for k, v in fields.items() if k != "margin"})
    kept["outputs"].logits.retain_grad()
    return kept["outputs"]

  tapped.training = True
  model.zero_grad()
  trainer.args.center_rewards_coefficient = center or None
  trainer._metrics["train"].clear()
  inputs = inputs | ({} if margins is None else {"margin": torch.tensor(margins)})
  loss = trainer.compute_loss(tapped, inputs)
  loss.backward()
  logits = kept["outputs"].logits
  logged = {k: v[0] for k, v in trainer._metrics["train"].items()}
  return {
    "loss": loss.detach().numpy(),
    "rewards": logits.detach()[:, 0].numpy().copy(),
    "grad_rewards": logits.grad[:, 0].numpy().copy(),
    "accuracy": np.float32(logged["accuracy"]),
    "margin": np.float32(logged["margin"]),
  }


def make(folder: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(3)
  model, prescribed = scorer(), Prescribed()
  hidden = []
  model.model.register_forward_hook(lambda *a: hidden.append(a[2].last_hidden_state.detach()))
  trainer = trl.RewardTrainer(
    model=model,
    args=trl.RewardConfig(**trainer_args(folder)),
    train_dataset=Dataset.from_list([{"chosen": "w3 w4 w5", "rejected": "w3 w5"}] * 8),
    processing_class=tiny_tokenizer(),
  )
  columns = max(LENGTHS)
  real = np.arange(columns) < np.array(LENGTHS)[:, None]
  tokens = rng.integers(3, VOCAB, real.shape) * real
  rows = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real).long()}
  nothing = {"attention_mask": torch.ones(1, 1).long()}
  golden = {"lengths": np.array(LENGTHS), "margins": np.float32(MARGINS)}
  golden["prescribed_margins"] = np.float32(PRESCRIBED_MARGINS)
  for margin, center in itertools.product((0, 1), CENTERS):
    name = f"margin={margin}/center={center}"
    case = run(trainer, model, rows, MARGINS if margin else None, center)
    case["grad_head"] = model.score.weight.grad.numpy().copy()
    golden |= {f"model/{name}/{k}": v for k, v in case.items()}
    given = PRESCRIBED_MARGINS if margin else None
    case = run(trainer, prescribed, nothing, given, center)
    golden |= {f"prescribed/{name}/{k}": v for k, v in case.items()}
  golden["hidden"] = hidden[0].numpy()  # [8, columns, WIDTH]
  golden["head"] = model.score.weight.detach().numpy()
  return golden


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    golden = make(folder)
    path = HERE / "trl_reward.npz"
    np.savez_compressed(path, versions=VERSIONS, **golden)
    print(f"{path.name}: {len(golden)} arrays, {path.stat().st_size} bytes, {VERSIONS}")


if __name__ == "__main__":
  main()
