"""TRL's `GRPOTrainer`: seconds of whole steps, prompts to new weights, with a trivial reward."""

import tempfile

import torch_peer
import trl
from datasets import Dataset


def reward(completions: list[str], **_) -> list[float]:
  """How many words end in an even digit: something to tell completions apart by."""
  return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = torch_peer.start()
  grpo = spec["grpo"]
  steps = spec["warmup"] + spec["repeats"] + 1
  tokens = torch_peer.random_tokens(spec, grpo["prompts"] * steps, grpo["prompt"])
  prompts = list(map(torch_peer.text, tokens))
  clock = torch_peer.StepClock()
  with tempfile.TemporaryDirectory() as folder:
    trainer = trl.GRPOTrainer(
      model=torch_peer.qwen3(spec),
      reward_funcs=reward,
      args=trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=grpo["prompts"] * grpo["samples"],
        num_generations=grpo["samples"],
        steps_per_generation=1,
        max_completion_length=grpo["new_tokens"],
        generation_kwargs={"min_new_tokens": grpo["new_tokens"]},  # the stop token is never drawn
        max_steps=steps,
        learning_rate=spec["learning_rate"],
        **torch_peer.TRAINER,
      ),
      train_dataset=Dataset.from_dict({"prompt": prompts}),
      processing_class=torch_peer.tokenizer(spec["model"]["vocab_size"]),
      callbacks=[clock],
    )
    assert len(trainer.processing_class(prompts[0])["input_ids"]) == grpo["prompt"]
    trainer.train()
  torch_peer.report(
    "trl",
    "grpo",
    clock.seconds(1, spec["repeats"]),
    grpo["prompts"] * grpo["samples"] * grpo["new_tokens"],
    f"trl {trl.__version__} GRPOTrainer, transformers generation, one batch an update, sdpa, "
    "fused AdamW, no gradient checkpointing, eager",
  )


if __name__ == "__main__":
  main()
