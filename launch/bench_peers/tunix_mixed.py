"""Tunix's own `Sampler` on requests of unlike lengths, as one batch.

The batch runs until its longest row is done; only the tokens that were asked for are counted.
"""

import time

import tunix_peer
from tunix.generate import sampler


def main() -> None:
  """Measures, and prints the line that `launch.bench` reads."""
  spec = tunix_peer.start()
  size, model = spec["mixed"], tunix_peer.config(spec)
  longest, most = max(size["prompts"]), max(size["new_tokens"])
  with tunix_peer.mesh():
    engine = sampler.Sampler(
      tunix_peer.qwen3(spec),
      tunix_peer.WordTokenizer(),
      sampler.CacheConfig(
        cache_size=longest + most,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
      ),
    )
    prompts = [tunix_peer.random_prompts(spec, 1, k, k)[0] for k in size["prompts"]]
    seconds = []
    for seed in range(2 + spec["repeats"]):
      start = time.perf_counter()
      out = engine(
        prompts,
        max_generation_steps=most,
        max_prompt_length=longest,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],  # nothing stops a row
        seed=seed,
      )
      seconds.append(time.perf_counter() - start)
      assert all(len(row) == most for row in out.tokens)
  tunix_peer.report(
    "mixed", seconds[2:], sum(size["new_tokens"]), "Sampler, one batch, temperature 1, top_p 1"
  )


if __name__ == "__main__":
  main()
