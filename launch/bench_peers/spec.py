"""What `launch.bench` measures on both sides: one model, one set of batches and lengths.

`launch.bench` passes `SPEC` as JSON on the standard input of the scripts in this folder. Each of
them runs in the environment of its peer, imports nothing of pt_jax, and prints one JSON line
(below). TRL 1.16 has no PPO trainer and Tunix's is not measured, so ours stands alone.

  peer, task     what was measured
  seconds        one entry a timing; each covers `steps` steps (sft, dpo), one batch (generate,
                 mixed), or one whole step from prompts to updated weights (grpo, ppo)
  tokens         tokens that a timing covers: those of the rows (sft, dpo), new ones (the others)
  settings       the peer's settings that matter, and its versions

Measure on a machine that does nothing else: torch's threads wait for each other by spinning, and a
second busy process on the same cores makes its figures ten times worse (seen: 1.2 s -> 12 s).

The peers' scripts, and the variable that names an interpreter which has them:

  PT_JAX_TRL_PYTHON    trl_sft.py, transformers_sft.py, transformers_generate.py,
                       transformers_mixed.py, trl_grpo.py, trl_dpo.py
  PT_JAX_TUNIX_PYTHON  tunix_sft.py, tunix_generate.py, tunix_mixed.py, tunix_grpo.py
  none, our own        first_engine.py, which needs the history of the repository
"""

SPEC = {
  "model": {  # a Qwen 3 of 3.3 M parameters, embeddings tied, float32
    "vocab_size": 512,
    "width": 256,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "hidden": 768,
    "rope_theta": 1_000_000.0,  # Tunix knows no other
    "norm_epsilon": 1e-6,
  },
  "sft": {"batch": 16, "length": 256, "steps": 2},
  "generate": {"batch": 64, "prompt": 32, "new_tokens": 96},
  # Requests of unlike lengths at once: prompts of 16 to 128 tokens, 16 to 256 new ones spread
  # evenly on a logarithmic scale, in an order that mixes both.
  "mixed": {
    "prompts": [16 + 37 * i % 113 for i in range(64)],
    "new_tokens": [round(16 * 16 ** (29 * i % 64 / 63)) for i in range(64)],
  },
  "grpo": {"prompts": 8, "samples": 8, "prompt": 32, "new_tokens": 96},
  # Pairs whose completions have one length; the reference's log-probs are computed in the step.
  "dpo": {"pairs": 16, "prompt": 32, "completion": 96, "steps": 2, "beta": 0.1},
  # As many completions as grpo has, each of a prompt of its own; two networks are trained.
  "ppo": {"prompts": 64, "prompt": 32, "new_tokens": 96},
  "learning_rate": 1e-4,
  "warmup": 14,  # timings thrown away: compiling, and until a process has the memory that it keeps
  "repeats": 5,  # timings kept
  "threads": 2,
}
