"""Tunix's own `Sampler`: seconds to sample tokens for a batch of prompts, prefill included."""

import time

import tunix_peer
from tunix.generate import sampler


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = tunix_peer.start()
  size, model = spec["generate"], tunix_peer.config(spec)
  with tunix_peer.mesh():
    engine = sampler.Sampler(
      tunix_peer.qwen3(spec),
      tunix_peer.WordTokenizer(),
      sampler.CacheConfig(
        cache_size=size["prompt"] + size["new_tokens"],
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
      ),
    )
    prompts = tunix_peer.random_prompts(spec, size["batch"], size["prompt"])
    seconds = []
    for seed in range(spec["warmup"] + spec["repeats"]):
      start = time.perf_counter()
      out = engine(
        prompts,
        max_generation_steps=size["new_tokens"],
        max_prompt_length=size["prompt"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],  # nothing stops a row
        seed=seed,
      )
      seconds.append(time.perf_counter() - start)
      assert all(len(row) == size["new_tokens"] for row in out.tokens)
  tunix_peer.report(
    "generate",
    seconds[spec["warmup"] :],
    size["batch"] * size["new_tokens"],
    "Sampler, temperature 1, top_p 1",
  )


if __name__ == "__main__":
  main()
