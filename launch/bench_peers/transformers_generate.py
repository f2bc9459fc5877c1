"""transformers' `generate`: seconds to sample tokens for a batch of prompts, prefill included."""

import time

import torch
import torch_peer


@torch.inference_mode()
def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = torch_peer.start()
  size = spec["generate"]
  model = torch_peer.qwen3(spec).eval()
  model.generation_config.eos_token_id = None  # nothing stops a row
  prompts = torch_peer.random_tokens(spec, size["batch"], size["prompt"])
  seconds = []
  for _ in range(spec["warmup"] + spec["repeats"]):
    start = time.perf_counter()
    out = model.generate(
      prompts,
      attention_mask=torch.ones_like(prompts),
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=size["new_tokens"],
    )
    seconds.append(time.perf_counter() - start)
    assert out.shape == (size["batch"], size["prompt"] + size["new_tokens"])
  torch_peer.report(
    "transformers",
    "generate",
    seconds[spec["warmup"] :],
    size["batch"] * size["new_tokens"],
    "generate, sampling at temperature 1, dynamic cache, sdpa, inference_mode, eager",
  )


if __name__ == "__main__":
  main()
