"""Completions and their log-probs are the same on 8 devices as on one."""

import jax
import numpy as np
import pytest

from pt_jax import sharding, weights
from pt_jax.models import decoder
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.proposals import Speculation
from pt_jax.rollout.rollouts import SamplingParams, StopReason
from tests.rollout import tiny

LENGTHS = (5, 1, 16, 9, 12, 2, 7)
STOPS = (*range(0, 64, 8),)
SAMPLING = SamplingParams(max_tokens=14, temperature=0.8, top_k=32, stop_tokens=STOPS)


def generate(shape, rules, key=7, speculation=None):
  """21 samples on 8 slots, of parameters stored by these rules."""
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = sharding.make_mesh(*shape, devices=devices)
  with jax.set_mesh(mesh):
    table, whole = decoder.table(tiny.MODEL), tiny.params()
    place = lambda row, w: sharding.put(w, rules.spec(*row.axes), mesh)
    params = weights.map_table(place, table, whole)  # where a trainer keeps them
    engine = Engine(tiny.MODEL, params, slots=8, max_length=tiny.LENGTH, speculation=speculation)
    prompts = tiny.prompts(LENGTHS)
    return engine.generate(prompts, SAMPLING, key=jax.random.key(key), n=3)


@pytest.fixture(scope="module")
def one():
  return generate((1, 1, 1, 1), sharding.USE)


@pytest.mark.parametrize("speculation", [None, Speculation(tokens=3)])
def test_four_by_two_gives_what_one_device_gives(one, speculation):
  """Slots over `data`, heads and vocabulary over `tensor`, parameters stored as ZeRO 3 has them."""
  many = generate((4, 1, 1, 2), sharding.ZERO, speculation=speculation)
  for name in ("tokens", "length", "prompt_length", "stop", "version"):
    np.testing.assert_array_equal(getattr(many, name), getattr(one, name), err_msg=name)
  gap = np.abs(many.logprobs - one.logprobs).max()
  print(f"largest gap {gap:.2e}")
  assert gap <= 1e-4
  stops = one.stop.tolist()
  assert {StopReason.TOKEN, StopReason.LENGTH} == set(stops)  # slots were refilled at unlike times
  assert len({tuple(row) for row in one.tokens.tolist()}) > 15
