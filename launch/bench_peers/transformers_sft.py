"""A plain torch loop on transformers' model: seconds of SFT steps without a trainer around them."""

import time

import torch
import torch_peer


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = torch_peer.start()
  sft, model = spec["sft"], torch_peer.qwen3(spec)
  optimizer = torch.optim.AdamW(model.parameters(), spec["learning_rate"], fused=True)
  seconds = []
  for _ in range(spec["warmup"] + spec["repeats"]):
    start = time.perf_counter()
    for _ in range(sft["steps"]):
      rows = torch_peer.random_tokens(spec, sft["batch"], sft["length"])
      model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
      optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
  torch_peer.report(
    "transformers",
    "sft",
    seconds[spec["warmup"] :],
    sft["batch"] * sft["length"] * sft["steps"],
    "plain loop, sdpa, fused AdamW, eager",
  )


if __name__ == "__main__":
  main()
