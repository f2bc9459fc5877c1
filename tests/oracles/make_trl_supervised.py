"""Freezes what TRL 1.16 and torch compute for supervised losses beside the plain one.

Run in the oracle environment (tests/oracles/README.md), from the root of the repository:

  python tests/oracles/make_trl_supervised.py

It builds the real `SFTTrainer` around the model of `make_trl.py` and calls its `compute_loss` with
`loss_type="dft"` and with `label_smoothing_factor` (transformers' `LabelSmoother`). What TRL does
not have is torch in float64 with gradients by autograd: `cross_entropy(label_smoothing=)`, the KL
to a second model in both directions, and PPO's clipped ratio with an advantage of 1 (arXiv
2508.17784, eq. 7). Written: `trl_supervised.npz`. Nothing of pt_jax is imported.

Frozen per case: the loss (a sum over target tokens, divided by `items`) and d loss / d lm_head; for
losses that are functions of the log-probs of the targets also d loss / d logprobs.
"""

import pathlib
import tempfile

import numpy as np
import torch
import trl
from datasets import Dataset
from make_trl import VERSIONS, VOCAB, Taps, tiny_model, tiny_tokenizer, trainer_args
from torch.nn import functional

HERE = pathlib.Path(__file__).parent
COLUMNS = 12
LENGTHS, PROMPTS = np.array([12, 9, 5, 3]), np.array([3, 1, 4, 2])
SHARES = (0.1, 0.35)
COEFFICIENT = 0.3
CLIPS = (0.2, 0.28)
GLOBAL = 31  # tokens of a larger batch, to which this is one contribution


def rows() -> dict[str, np.ndarray]:
  """Rows of unequal length, prompts ignored."""
  rng = np.random.default_rng(3)
  steps = np.arange(COLUMNS)
  real = steps < LENGTHS[:, None]
  trained = real & (steps >= PROMPTS[:, None])
  return {"tokens": rng.integers(2, VOCAB, (4, COLUMNS)) * real, "mask": trained, "real": real}


def inputs(golden: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
  """What TRL's collator would hand to the trainer."""
  return {
    "input_ids": torch.tensor(golden["tokens"]),
    "attention_mask": torch.tensor(golden["real"]).long(),
    "labels": torch.tensor(np.where(golden["mask"], golden["tokens"], -100)),
  }


def trainer_case(folder: str, golden: dict[str, np.ndarray], **options) -> dict[str, np.ndarray]:
  """One option of the trainer, divided by the tokens of the batch and by a global count."""
  trainer = trl.SFTTrainer(
    model=tiny_model(1),
    args=trl.SFTConfig(**trainer_args(folder), max_length=16, **options),
    train_dataset=Dataset.from_list([{"text": "w3 w4 w5"}] * 8),
    processing_class=tiny_tokenizer(),
  )
  trainer.model.train()
  # The label smoother's logits do not come with log-probs of the targets.
  taps, found = Taps(trainer.model) if "loss_type" in options else None, {}
  for name, items in (("batch", None), ("global", torch.tensor(GLOBAL))):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs(golden), num_items_in_batch=items)
    loss.backward()
    found |= {
      f"{name}/loss": loss.detach().numpy(),
      f"{name}/grad_lm_head": trainer.model.lm_head.weight.grad.numpy().copy(),
    }
    if taps:
      found[f"{name}/grad_logprobs"] = taps.logprobs.grad.numpy().copy()
  return found


class Float64:
  """Losses in float64 from the hidden states of two models, gradients by autograd."""

  def __init__(self, golden: dict[str, np.ndarray]):
    exact = lambda name: torch.tensor(golden[name], dtype=torch.float64)
    self.hidden, self.head = exact("hidden"), exact("lm_head").requires_grad_()
    self.other = torch.log_softmax(exact("reference_hidden") @ exact("reference_lm_head").T, -1)
    self.labels = torch.tensor(golden["tokens"][:, 1:])
    self.mask = torch.tensor(golden["mask"][:, 1:])

  def case(self, loss) -> dict[str, np.ndarray]:
    """Of `loss(logits, log p, log q) -> [B, S - 1]`, averaged over the target tokens."""
    self.head.grad = None
    logits = self.hidden @ self.head.T
    total = loss(logits, torch.log_softmax(logits, -1), self.other)[self.mask].mean()
    total.backward()
    return {"batch/loss": total.detach().numpy(), "batch/grad_lm_head": self.head.grad.numpy()}

  def pick(self, log_p: torch.Tensor) -> torch.Tensor:
    return log_p.gather(-1, self.labels[..., None])[..., 0]

  def smoothed(self, share: float):
    """torch's own label smoothing."""
    return lambda z, *_: functional.cross_entropy(
      z.transpose(1, 2), self.labels, label_smoothing=share, reduction="none"
    )

  def kl(self, direction: str):
    """By torch's kl_div(input, target) = KL(exp(target) || exp(input))."""

    def loss(_, log_p, log_q):
      pair = (log_q, log_p) if direction == "policy_reference" else (log_p, log_q)
      return functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)

    return loss

  def psft(self, coefficient: float, direction: str):
    """NLL and coefficient * KL."""
    kl = self.kl(direction)
    return lambda z, log_p, log_q: -self.pick(log_p) + coefficient * kl(z, log_p, log_q)

  def clipped(self, clip: float):
    """PPO's surrogate with an advantage of 1."""

    def loss(_, log_p, log_q):
      ratio = torch.exp(self.pick(log_p) - self.pick(log_q))
      return -torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))

    return loss


def hidden_states(golden: dict[str, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Of the positions that predict a token, and the output matrix."""
  model = tiny_model(seed)
  with torch.no_grad():
    of = {k: v for k, v in inputs(golden).items() if k != "labels"}
    hidden = model.model(**of).last_hidden_state[:, :-1]
  return hidden.numpy(), model.lm_head.weight.detach().numpy()


def make(folder: str) -> dict[str, np.ndarray]:
  """All cases."""
  golden = rows()
  golden["hidden"], golden["lm_head"] = hidden_states(golden, 1)
  golden["reference_hidden"], golden["reference_lm_head"] = hidden_states(golden, 1)
  rng = np.random.default_rng(4)  # a reference near the policy, so that ratios are on both sides
  for name in ("reference_hidden", "reference_lm_head"):
    noise = 0.3 * rng.normal(size=golden[name].shape) * np.abs(golden[name]).mean()
    golden[name] = (golden[name] + noise).astype(np.float32)
  cases = {"dft": trainer_case(folder, golden, loss_type="dft")}
  exact = Float64(golden)
  for share in SHARES:
    cases[f"smoothed={share}"] = trainer_case(folder, golden, label_smoothing_factor=share)
    cases[f"torch/smoothed={share}"] = exact.case(exact.smoothed(share))
  for direction in ("policy_reference", "reference_policy"):
    cases[f"kl/{direction}"] = exact.case(exact.kl(direction))
    cases[f"psft={COEFFICIENT}/{direction}"] = exact.case(exact.psft(COEFFICIENT, direction))
  for clip in CLIPS:
    cases[f"clipped={clip}"] = exact.case(exact.clipped(clip))
  for case, found in cases.items():
    golden |= {f"{case}/{name}": value for name, value in found.items()}
  return golden


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    golden = make(folder)
  path = HERE / "trl_supervised.npz"
  np.savez_compressed(path, versions=VERSIONS, **golden)
  print(f"{path.name}: {len(golden)} arrays, {path.stat().st_size} bytes, {VERSIONS}")


if __name__ == "__main__":
  main()
