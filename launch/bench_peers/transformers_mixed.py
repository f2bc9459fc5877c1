"""transformers on requests of unlike lengths: as one static batch, and with continuous batching.

The static batch is padded on the left to the longest prompt and runs until its longest row is done;
only the tokens that were asked for are counted.
"""

import time
from collections.abc import Callable

import torch
import torch_peer
import transformers


def _requests(spec: dict) -> tuple[list[list[int]], list[int]]:
  size = spec["mixed"]
  prompts = [torch_peer.random_tokens(spec, 1, k)[0].tolist() for k in size["prompts"]]
  return prompts, size["new_tokens"]


@torch.inference_mode()
def _static(model, prompts: list[list[int]], counts: list[int]) -> None:
  longest = max(map(len, prompts))
  padded = [[torch_peer.PAD] * (longest - len(p)) + p for p in prompts]
  mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
  out = model.generate(
    torch.tensor(padded),
    attention_mask=torch.tensor(mask),
    do_sample=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=max(counts),
  )
  assert out.shape == (len(prompts), longest + max(counts))


def _continuous(model, prompts: list[list[int]], counts: list[int]) -> None:
  """Every request stops at its own length and leaves the batch."""
  sampling = transformers.GenerationConfig(
    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
  )
  room = transformers.ContinuousBatchingConfig(num_blocks=2 * len(prompts), max_batch_tokens=512)
  manager = model.continuous_batching_context_manager(
    generation_config=sampling, continuous_batching_config=room, block=True
  )
  with manager as engine:
    for prompt, count in zip(prompts, counts):
      engine.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
    done = tokens = 0
    while done < len(prompts):
      result = engine.get_result(timeout=60)
      assert result is not None and result.error is None
      if result.is_finished():
        done += 1
        tokens += len(result.generated_tokens)
  assert tokens == sum(counts)


def _measure(name: str, once: Callable, model, spec: dict, settings: str) -> None:
  prompts, counts = _requests(spec)
  seconds = []
  for _ in range(2 + spec["repeats"]):  # nothing is compiled: two are enough to warm up
    start = time.perf_counter()
    once(model, prompts, counts)
    seconds.append(time.perf_counter() - start)
  torch_peer.report(name, "mixed", seconds[2:], sum(counts), settings)


def main() -> None:
  """Measures, and prints the lines that `launch.bench` reads."""
  spec = torch_peer.start()
  model = torch_peer.qwen3(spec).eval()
  model.generation_config.eos_token_id = None  # nothing stops a row
  sampling = "sampling at temperature 1, eager"
  _measure("transformers static", _static, model, spec, f"one batch, {sampling}, inference_mode")
  _measure("transformers continuous", _continuous, model, spec, f"continuous batching, {sampling}")


if __name__ == "__main__":
  main()
