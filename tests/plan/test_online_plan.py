"""Plans of a small GRPO stage on a v5e of 4 chips: the engine's programs beside the train step."""

import dataclasses

import pytest

from experiments import grpo_qwen3
from pt_jax.losses import objective as objectives
from pt_jax.plan import estimate, page
from pt_jax.plan.choices import Choice
from pt_jax.plan.compile import Plan, plan_stage
from pt_jax.plan.engine import PAGES, WEIGHTS
from pt_jax.plan.topology import open_slice
from tests.plan import tiny

pytest.importorskip("libtpu")
TINY = dataclasses.replace(tiny.MODEL, layers=1)
PROMPT, COMPLETION, SLOTS = 128, 128, 16


def _planned(layers: int, **options) -> Plan:
  """16 completions a step, no KL, so no scoring; on data=2, tensor=2."""
  base = grpo_qwen3.config(
    prompts=4,
    group_size=4,
    max_tokens=COMPLETION,
    row_length=PROMPT + COMPLETION,
    rows=16,
    slots=SLOTS,
    tensor=2,
  )
  objective = dataclasses.replace(objectives.grpo(), kl=None)
  stage = dataclasses.replace(base.stages[0], objective=objective)
  model = dataclasses.replace(TINY, layers=layers)
  experiment = dataclasses.replace(base, model=model, stages=(stage,))
  return plan_stage(experiment, stage, open_slice("v5e:2x2"), Choice(), **options)


@pytest.fixture(scope="module")
def plan() -> Plan:
  """Of one layer."""
  return _planned(1)


def test_programs_and_their_calls(plan):
  calls = {one.program.kind: one.program.calls for one in plan.programs}
  # 4 prompts of 128 tokens are one chunk of 512 in each of 2 parts, and 128 tokens two launches.
  assert calls == {"transfer": 1, "prefill": 1, "decode": 2, "train": 1}
  assert plan.seconds == sum(one.program.calls * one.in_order for one in plan.programs)


def test_engine_is_beside_the_train_step(plan):
  parts = {one.program.kind: one.memory.parts for one in plan.programs}
  matrices, gains = estimate.multiplied(TINY) + 512 * 256, 256 * 3
  assert parts["train"][WEIGHTS] == 2 * matrices // 2 + 4 * gains
  # (8 slots + 1) x 8 pages + 1, and the one that is no sequence's, of 32 tokens each.
  tokens = (9 * 8 + 2) * 32
  assert parts["train"][PAGES] == estimate.cache_bytes(TINY, tokens) // 2
  assert parts["decode"].keys() >= {"parameters", "optimizer", WEIGHTS, PAGES}
  assert WEIGHTS not in parts["transfer"]  # the old ones are gone before the new ones come


def test_decode_reads_its_weights_and_cache(plan):
  (decode,) = (one for one in plan.programs if one.program.kind == "decode")
  assert decode.xla is not None
  steps = 64
  read = 2 * estimate.multiplied(TINY) // 2  # bfloat16, over tensor
  cache = SLOTS // 2 * estimate.cache_bytes(TINY, PROMPT + COMPLETION // 2) // 2
  # XLA moves pages that are so few to VMEM and back for every token.
  pages = decode.memory.parts[PAGES]
  assert steps * (read + cache) < decode.xla.bytes < steps * (2 * read + cache + 12 * pages)
  (kernel,) = decode.xla.kernels
  assert kernel.cost is not None
  assert kernel.cost.bytes == cache / TINY.layers
  assert kernel.runs == steps * TINY.layers
  assert {c.axes for c in decode.xla.collectives} <= {("tensor",), ("data", "tensor"), ("data",)}


def test_page_says_what_a_step_takes(plan):
  text = page.page(plan)
  for line in ("KV cache pages", "engine    16 slots; prompts of 128 tokens", "a token, HBM"):
    assert line in text
  assert text.splitlines()[-1].split()[0] == "all"
