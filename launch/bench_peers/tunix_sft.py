"""Tunix's `PeftTrainer` on all parameters and full rows: seconds of its training steps."""

import itertools
import time

import tunix_peer
from tunix.sft import hooks, peft_trainer, utils


class StepClock(hooks.TrainingHooks):
  """When the metrics of each step were there."""

  def __init__(self):
    self.times = []

  def on_train_step_end(self, *_):
    self.times.append(time.perf_counter())

  def _nothing(self, *_):
    pass

  on_train_start = on_train_end = on_train_step_start = _nothing
  on_eval_step_start = on_eval_step_end = _nothing


def model_input(batch: peft_trainer.TrainingInput) -> dict:
  """What the model wants to know of full rows."""
  return {
    "input_tokens": batch.input_tokens,
    "input_mask": batch.input_mask,
    "positions": utils.build_positions_from_mask(batch.input_mask),
    "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
  }


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = tunix_peer.start()
  sft = spec["sft"]
  steps = (spec["warmup"] + spec["repeats"]) * sft["steps"] + 2
  clock = StepClock()

  def batches():
    for seed in range(steps):
      tokens = tunix_peer.random_tokens(spec, sft["batch"], sft["length"], seed)
      yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=tokens > 0)

  with tunix_peer.mesh():
    trainer = peft_trainer.PeftTrainer(
      tunix_peer.qwen3(spec),
      tunix_peer.optimizer(spec),
      peft_trainer.TrainingConfig(eval_every_n_steps=steps, max_steps=steps),
    )
    trainer.with_gen_model_input_fn(model_input).with_training_hooks(clock)
    trainer.train(batches())
  ends = clock.times[-spec["repeats"] * sft["steps"] - 1 :: sft["steps"]]
  tunix_peer.report(
    "sft",
    [after - before for before, after in itertools.pairwise(ends)],
    sft["batch"] * sft["length"] * sft["steps"],
    "PeftTrainer, all parameters, no rematerialisation",
  )


if __name__ == "__main__":
  main()
