"""TRL's `DPOTrainer`: seconds of its steps, the reference model in memory and run in the step."""

import copy
import tempfile

import torch_peer
import trl
from datasets import Dataset


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = torch_peer.start()
  dpo = spec["dpo"]
  steps = (spec["warmup"] + spec["repeats"]) * dpo["steps"]
  count = dpo["pairs"] * (steps + 1)
  prompts = map(torch_peer.text, torch_peer.random_tokens(spec, count, dpo["prompt"]))
  # TRL writes the stop token behind each completion.
  completions = [
    [" " + torch_peer.text(row) for row in rows]
    for rows in torch_peer.random_tokens(spec, 2 * count, dpo["completion"] - 1).split(count)
  ]
  columns = dict(zip(("prompt", "chosen", "rejected"), (list(prompts), *completions)))
  model, clock = torch_peer.qwen3(spec), torch_peer.StepClock()
  with tempfile.TemporaryDirectory() as folder:
    trainer = trl.DPOTrainer(
      model=model,
      ref_model=copy.deepcopy(model),
      args=trl.DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=dpo["pairs"],
        max_steps=steps + 1,
        max_length=dpo["prompt"] + dpo["completion"],
        beta=dpo["beta"],
        learning_rate=spec["learning_rate"],
        **torch_peer.TRAINER,
      ),
      train_dataset=Dataset.from_dict(columns),
      processing_class=torch_peer.tokenizer(spec["model"]["vocab_size"]),
      callbacks=[clock],
    )
    first = trainer.train_dataset[0]
    lengths = [len(first[f"{name}_ids"]) for name in columns]
    assert lengths == [dpo["prompt"], dpo["completion"], dpo["completion"]], lengths
    trainer.train()
  torch_peer.report(
    "trl",
    "dpo",
    clock.seconds(dpo["steps"], spec["repeats"]),
    2 * dpo["pairs"] * (dpo["prompt"] + dpo["completion"]) * dpo["steps"],
    f"trl {trl.__version__} DPOTrainer, reference model run in the step, sdpa, fused AdamW, "
    "no gradient checkpointing, eager",
  )


if __name__ == "__main__":
  main()
