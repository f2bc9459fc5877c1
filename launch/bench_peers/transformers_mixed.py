"""transformers on requests of unlike lengths, as one static batch.

The batch is padded on the left to the longest prompt and runs until its longest row is done;
only the tokens that were asked for are counted.
"""

import time

import torch
import torch_peer


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


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = torch_peer.start()
  prompts, counts = _requests(spec)
  model = torch_peer.qwen3(spec).eval()
  model.generation_config.eos_token_id = None  # nothing stops a row
  seconds = []
  for _ in range(2 + spec["repeats"]):  # nothing is compiled: two are enough to warm up
    start = time.perf_counter()
    _static(model, prompts, counts)
    seconds.append(time.perf_counter() - start)
  torch_peer.report(
    "transformers static",
    "mixed",
    seconds[2:],
    sum(counts),
    "static batch, sampling at temperature 1, inference_mode, eager",
  )


if __name__ == "__main__":
  main()
