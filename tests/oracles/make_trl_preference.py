"""Freezes what TRL 1.16 computes for pairs and labelled completions: losses and gradients.

Run in the oracle environment (tests/oracles/README.md), from the root of the repository:

  python tests/oracles/make_trl_preference.py

TRL's own loss methods (`DPOTrainer._compute_loss`, `KTOTrainer._compute_loss` of real trainers;
`CPOTrainer.cpo_loss` and `ORPOTrainer.odds_ratio_loss` unbound) are run on log-probs made here:
the model handed to them is a function that returns those, in float64, so that every log-ratio is as
wanted (up to +-120 nats) and the frozen values have no rounding of a network in them. Written:
`trl_preference.npz` with a `versions` entry. Nothing of pt_jax is imported.

Every pair is a batch of its own, except for the case that freezes KTO over a batch.
"""

import itertools
import pathlib
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import trl
from datasets import Dataset
from make_trl import VERSIONS, tiny_model, tiny_tokenizer, trainer_args
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = pathlib.Path(__file__).parent
PROMPT, COLUMNS = 3, 13
# Completion tokens, and wanted log-ratios to the reference (nats), of each pair.
CHOSEN_LENGTHS = (5, 1, 9, 3, 10, 1, 7, 2, 4, 6)
REJECTED_LENGTHS = (7, 10, 1, 3, 2, 1, 9, 8, 5, 4)
CHOSEN_RATIOS = (0.7, -1.3, 2.4, 0.0, -4.0, 30.0, -30.0, 31.5, -120.0, 8.0)
REJECTED_RATIOS = (-0.4, 0.9, 2.0, 0.0, -7.0, -30.0, 30.0, 29.0, -60.0, 33.0)
BETAS = (0.1, 0.5)
PLAIN = ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
PLAIN += ("discopop", "sigmoid_norm")
SMOOTHED = (
  ("robust", 0.0),
  ("robust", 0.1),
  ("robust", 0.3),
  ("exo_pair", 1e-3),
  ("exo_pair", 0.2),
)
COMBINED = ((("sigmoid", "sft"), (1.0, 0.7)), (("apo_zero", "sft"), (1.0, 0.2)))


def on_grid(values: np.ndarray) -> np.ndarray:
  """Multiples of 2^-10, whose sums and differences are exact in float32 too."""
  return np.round(values * 1024) / 1024


def sequences(rng: np.random.Generator, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
  """Masks of prompts and completions, and log-probs [N, COLUMNS - 1] that are 0 off completions."""
  mask = (np.arange(COLUMNS) >= PROMPT) & (np.arange(COLUMNS) < PROMPT + np.array(lengths)[:, None])
  logprobs = on_grid(-rng.uniform(0.05, 4, (len(lengths), COLUMNS - 1))) * mask[:, 1:]
  squares = on_grid(-rng.uniform(0.5, 3, logprobs.shape)) * mask[:, 1:]  # log sum_v p^2
  return {
    "mask": torch.tensor(mask).long(),
    "logprobs": torch.tensor(logprobs),
    "squares": torch.tensor(squares),
  }


class Prescribed:
  """A model that returns the log-probs it was given, as leaves that keep their gradient."""

  def __init__(
    self, logprobs: torch.Tensor, squares: torch.Tensor, other: torch.Tensor | None = None
  ):
    self.logprobs = logprobs.clone().requires_grad_()
    self.squares, self.other = squares, other

  def __call__(self, *, input_ids, **_):
    """`other` answers for the mismatched completions of KTO, whose ids are all 7."""
    logprobs = self.other if (input_ids == 7).all() else self.logprobs
    nothing = torch.zeros_like(logprobs)
    return SimpleNamespace(
      log_probs=logprobs,
      log_sum_sq_probs=self.squares,
      entropy=nothing,
      mean_logits=nothing,
      is_top1=nothing.bool(),
    )


def gradient_of_sums(model: Prescribed, mask: torch.Tensor) -> np.ndarray:
  """d loss / d summed log-prob: that of each completion token, which are all the same."""
  gradient, inside = model.logprobs.grad, mask[:, 1:].bool()
  first = gradient[:, PROMPT - 1]
  assert torch.allclose(torch.where(inside, gradient, first[:, None]), first[:, None], atol=0)
  return first.numpy().copy()


def dpo_trainer(folder: str) -> trl.DPOTrainer:
  row = {"prompt": "w3 w4", "chosen": "w5", "rejected": "w6"}
  trainer = trl.DPOTrainer(
    model=tiny_model(0),
    ref_model=tiny_model(0),
    args=trl.DPOConfig(**trainer_args(folder)),
    train_dataset=Dataset.from_list([row] * 8),
    processing_class=tiny_tokenizer(),
  )
  trainer.precompute_ref_logps = True  # read from the batch: they are prescribed too
  return trainer


def dpo_case(
  trainer, chosen: dict, rejected: dict, references: np.ndarray
) -> dict[str, np.ndarray]:
  """Loss [N] and gradients [N] by the two summed log-probs, each pair a batch."""
  losses, gradients = [], []
  for i in range(len(CHOSEN_LENGTHS)):
    both = {k: torch.stack([chosen[k][i], rejected[k][i]]) for k in chosen}
    model = Prescribed(both["logprobs"], both["squares"])
    inputs = {
      "input_ids": torch.ones(2, COLUMNS, dtype=torch.long),
      "attention_mask": torch.ones(2, COLUMNS, dtype=torch.long),
      "completion_mask": both["mask"],
      "ref_chosen_logps": torch.tensor(references[0, i : i + 1]),
      "ref_rejected_logps": torch.tensor(references[1, i : i + 1]),
    }
    loss = trainer._compute_loss(model, inputs, False)
    loss.backward()
    losses.append(loss.item())
    gradients.append(gradient_of_sums(model, both["mask"]))
  return {"loss": np.array(losses), "grad": np.stack(gradients)}


def dpo_cases(trainer, chosen, rejected, references) -> dict[str, np.ndarray]:
  cases = {}

  def freeze(name: str, losses, weights, beta, smoothing=0.0, weighting=False):
    trainer.loss_types, trainer.loss_weights, trainer.beta = list(losses), list(weights), beta
    trainer.label_smoothing, trainer.use_weighting = smoothing, weighting
    case = dpo_case(trainer, chosen, rejected, references)
    cases.update({f"{name}/beta={beta}/{k}": v for k, v in case.items()})

  for beta in BETAS:
    for loss in PLAIN:
      freeze(loss, (loss,), (1.0,), beta)
    for loss, smoothing in SMOOTHED:
      freeze(f"{loss}/smoothing={smoothing}", (loss,), (1.0,), beta, smoothing)
    for losses, weights in COMBINED:
      freeze(f"{losses[0]}/sft={weights[1]}", losses, weights, beta)
    for loss in ("sigmoid", "ipo", "apo_down"):
      freeze(f"{loss}/weighted", (loss,), (1.0,), beta, weighting=True)
  return cases


def kto_trainer(folder: str) -> trl.KTOTrainer:
  rows = [{"prompt": "w3 w4", "completion": "w5", "label": bool(i % 2)} for i in range(8)]
  trainer = trl.KTOTrainer(
    model=tiny_model(0),
    ref_model=tiny_model(0),
    args=trl.KTOConfig(**trainer_args(folder)),
    train_dataset=Dataset.from_list(rows),
    processing_class=tiny_tokenizer(),
  )
  trainer.precompute_ref_logps = True
  return trainer


def kto_case(trainer, made, references, labels, mismatched, rows) -> tuple[float, np.ndarray]:
  """`mismatched` [N]: log-ratio of another prompt's completion, whose mean is the baseline."""
  ids = torch.ones(len(rows), COLUMNS, dtype=torch.long)
  other = torch.zeros(len(rows), COLUMNS - 1, dtype=torch.float64)
  other[:, PROMPT - 1] = torch.tensor(mismatched[rows])
  model = Prescribed(made["logprobs"][rows], made["squares"][rows], other)
  inputs = {
    "input_ids": ids,
    "attention_mask": ids,
    "completion_mask": made["mask"][rows],
    "KL_input_ids": 7 * ids,
    "KL_attention_mask": ids,
    "KL_completion_mask": made["mask"][rows],
    "label": torch.tensor(labels[rows]),
    "ref_logps": torch.tensor(references[rows]),
    "ref_KL_logps": torch.zeros(len(rows), dtype=torch.float64),
  }
  loss = trainer._compute_loss(model, inputs, False)
  loss.backward()
  return loss.item(), gradient_of_sums(model, made["mask"][rows])


def kto_cases(trainer, made, references) -> dict[str, np.ndarray]:
  """Each completion with a baseline of its own, and all in one batch."""
  count = len(CHOSEN_LENGTHS)
  labels = np.array([1, 0, 0, 1, 1, 1, 0, 0, 1, 0], bool)
  mismatched = np.array([0.3, 2.0, -1.0, 0.0, 40.0, 0.3, 5.0, -9.0, 1.2, 3.0])  # 4.18 on average
  cases = {"kto/labels": labels, "kto/baselines": mismatched}
  settings = itertools.product(("kto", "apo_zero_unpaired"), BETAS, ((1.0, 1.0), (1.5, 0.8)))
  for loss, beta, (right, wrong) in settings:
    trainer.loss_type, trainer.beta, trainer.calculate_KL = loss, beta, loss == "kto"
    trainer.desirable_weight, trainer.undesirable_weight = right, wrong
    run = lambda rows: kto_case(trainer, made, references, labels, mismatched, np.array(rows))
    name = f"{loss}/beta={beta}/weights={right},{wrong}"
    apart = [run([i]) for i in range(count)]
    cases[f"{name}/loss"] = np.array([loss for loss, _ in apart])
    cases[f"{name}/grad"] = np.concatenate([gradient for _, gradient in apart])
    cases[f"{name}/batch_loss"], cases[f"{name}/batch_grad"] = run(range(count))
  return cases


def reference_free_cases(chosen, rejected) -> dict[str, np.ndarray]:
  """CPO and SimPO (`cpo_loss`), and ORPO's odds ratio: sums or means over tokens go in."""
  cases = {}
  device = SimpleNamespace(device="cpu")

  def freeze(name: str, method, options: dict, averaged: bool, sign=1.0):
    sums = [made["logprobs"].sum(1).requires_grad_() for made in (chosen, rejected)]
    divisors = [made["mask"].sum(1) if averaged else 1 for made in (chosen, rejected)]
    losses = (
      sign
      * method(
        SimpleNamespace(accelerator=device, **options), *(s / d for s, d in zip(sums, divisors))
      )[0]
    )
    losses.sum().backward()
    cases[f"{name}/loss"] = losses.detach().numpy()
    cases[f"{name}/grad"] = np.stack([s.grad.numpy() for s in sums], axis=1)

  for beta in BETAS:
    for smoothing in (0.0, 0.2):
      options = {"alpha": 0.0, "beta": beta, "label_smoothing": smoothing, "simpo_gamma": 0.4}
      for loss, averaged in (("simpo", True), ("sigmoid", False)):
        name = f"cpo_{loss}/smoothing={smoothing}/beta={beta}"
        freeze(name, CPOTrainer.cpo_loss, options | {"loss_type": loss}, averaged)
    for loss in ("hinge", "ipo"):  # on sums: the paper's IPO, without a reference
      name, given = f"cpo_{loss}/beta={beta}", options | {"loss_type": loss}
      freeze(name, CPOTrainer.cpo_loss, given, averaged=False)
    # TRL takes beta * logsigmoid(log odds) off the NLL.
    freeze(f"odds_ratio/beta={beta}", ORPOTrainer.odds_ratio_loss, {"beta": beta}, True, sign=-1.0)
  return cases


def main() -> None:
  rng = np.random.default_rng(3)
  chosen, rejected = sequences(rng, CHOSEN_LENGTHS), sequences(rng, REJECTED_LENGTHS)
  logprobs = np.stack([made["logprobs"].sum(1).numpy() for made in (chosen, rejected)])
  references = on_grid(logprobs - np.array([CHOSEN_RATIOS, REJECTED_RATIOS]))
  golden = {
    "logprobs": logprobs,
    "reference_logprobs": references,
    "expected_logprobs": np.stack([m["squares"].sum(1).numpy() for m in (chosen, rejected)]),
    "lengths": np.array([CHOSEN_LENGTHS, REJECTED_LENGTHS]),
  }
  with tempfile.TemporaryDirectory() as folder:
    golden |= dpo_cases(dpo_trainer(folder), chosen, rejected, references)
    golden |= kto_cases(kto_trainer(folder), chosen, references[0])
    golden |= reference_free_cases(chosen, rejected)
  path = HERE / "trl_preference.npz"
  np.savez_compressed(path, versions=VERSIONS, **golden)
  print(f"{path.name}: {len(golden)} arrays, {path.stat().st_size} bytes, {VERSIONS}")


if __name__ == "__main__":
  main()
