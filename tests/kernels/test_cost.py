"""What kernels state as their cost, by hand for the named shapes. Nothing is compiled."""

import jax
import pytest

from kernels.aot.compiler import Job, case_of


def stated(kernel: str, case: str) -> list:
  """The estimates of the Pallas calls of a case, in order."""
  function, arguments = case_of(Job(f"kernels.{kernel}.shapes", case, "v5e")).program("v5e")
  return list(_estimates(jax.make_jaxpr(function)(*arguments).jaxpr))


def _estimates(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation.params["cost_estimate"]
      continue
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from _estimates(inner)


SEEN = 8 * 4096 * 4097 // 2  # pairs of a query and a key that a causal mask leaves, of 8 heads
LOGITS = 4096 * 151_936


@pytest.mark.parametrize(
  ("kernel", "case", "flops", "transcendentals"),
  [
    ("flash_attention", "causal_4096", [4 * 128 * SEEN], [SEEN]),
    ("flash_attention", "causal_4096_backward", [4 * 128 * SEEN, 10 * 128 * SEEN], [SEEN, SEEN]),
    ("linear_logprob", "qwen3_06b_backward", [2048 * LOGITS, *[4096 * LOGITS] * 2], [LOGITS] * 3),
    ("grouped_matmul", "qwen3_30b_backward", [2 * 8192 * 2048 * 768] * 3, [0] * 3),
    # 64 sequences as long as their page tables are, 32 heads.
    ("ragged_paged_attention", "decode_64x4096", [4 * 128 * 64 * 4096 * 32], [64 * 4096 * 32]),
  ],
)
def test_products_and_exponentials(kernel, case, flops, transcendentals):
  costs = stated(kernel, case)
  assert [cost.flops for cost in costs] == flops
  assert [cost.transcendentals for cost in costs] == transcendentals


def test_decoding_reads_every_key_and_value_once():
  (cost,) = stated("ragged_paged_attention", "decode_64x4096")
  cache, queries = 64 * 4096 * 8 * 2 * 128 * 2, 64 * 32 * 128 * 2
  assert cost.bytes_accessed == cache + 2 * queries


def test_a_tile_of_rows_stays_while_the_matrix_passes():
  forward, _, _ = stated("linear_logprob", "qwen3_06b_backward")
  passes = 4096 // 512
  read = 2 * 1024 * (4096 + passes * 151_936)
  assert read < forward.bytes_accessed < 1.01 * read


def test_a_window_costs_less():
  forward, backward = stated("flash_attention", "gpt_oss_backward")
  seen = 64 * (4096 * 128 - 127 * 128 // 2)  # the first 127 queries see fewer keys
  assert (forward.flops, backward.flops) == (4 * 64 * seen, 10 * 64 * seen)
