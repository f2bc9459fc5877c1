"""TRL's `SFTTrainer` on full rows: seconds of its steps, data loading and metrics included."""

import tempfile

import torch_peer
import trl
from datasets import Dataset


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = torch_peer.start()
  sft = spec["sft"]
  steps = (spec["warmup"] + spec["repeats"]) * sft["steps"]
  rows = torch_peer.random_tokens(spec, sft["batch"] * (steps + 1), sft["length"])
  clock = torch_peer.StepClock()
  with tempfile.TemporaryDirectory() as folder:
    trainer = trl.SFTTrainer(
      model=torch_peer.qwen3(spec),
      args=trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=sft["batch"],
        max_steps=steps + 1,
        max_length=sft["length"],
        learning_rate=spec["learning_rate"],
        **torch_peer.TRAINER,
      ),
      train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
      processing_class=torch_peer.tokenizer(spec["model"]["vocab_size"]),
      callbacks=[clock],
    )
    trainer.train()
  torch_peer.report(
    "trl",
    "sft",
    clock.seconds(sft["steps"], spec["repeats"]),
    sft["batch"] * sft["length"] * sft["steps"],
    f"trl {trl.__version__} SFTTrainer, sdpa, fused AdamW, no gradient checkpointing, eager",
  )


if __name__ == "__main__":
  main()
