"""pt_jax: LLM post-training in JAX. See docs/ for how to run, and README.md for the house."""
