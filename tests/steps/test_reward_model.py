"""The reward-model step: loss, head gradient and metrics against float64; microbatches."""

import functools

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data.batch import ComparisonBatch
from pt_jax.losses.reward import RewardObjective
from pt_jax.models import decoder, heads
from pt_jax.steps.reward_model import reward_evaluate, reward_step
from pt_jax.steps.state import Updater
from tests.losses import groups
from tests.steps import tiny

pytestmark = pytest.mark.usefixtures("one_device")

MEMBERS = groups.MEMBERS
TABLE = heads.table(tiny.MODEL, MEMBERS)
UPDATER = Updater(tiny.UPDATER.optimizer, TABLE, tiny.UPDATER.layout)
OBJECTIVES = {
  "pairwise": RewardObjective(margins=True, center=0.1, bootstrap=True),
  "process": RewardObjective("process"),
}


@functools.cache
def params():
  """The trunk of the tiny model and a head of a size that makes mistakes show."""
  head = np.random.default_rng(4).normal(size=(MEMBERS, tiny.MODEL.width)).astype(np.float32)
  return heads.from_decoder(tiny.params(), head)


@functools.cache
def fields() -> dict[str, np.ndarray]:
  """The rows of `tiny.fields`: the two samples of each are a pair, with soft labels of steps."""
  given, rng = tiny.fields(), np.random.default_rng(7)
  held = given["segment_ids"] >= 0
  by_row = lambda values: (values[:, None] * held).astype(np.float32)
  return {
    **{name: given[name] for name in ("tokens", "positions", "segment_ids", "mask")},
    "group_ids": np.where(held, 0, -1).astype(np.int32),
    "labels": np.where(given["segment_ids"] == 0, 0.8, 0.3).astype(np.float32) * held,
    "weights": by_row(rng.uniform(0.5, 2, tiny.ROWS)),
    "margins": by_row(rng.uniform(0, 1, tiny.ROWS)),
    "reference_logprobs": np.zeros(held.shape, np.float32),
  }


def batch(microbatches: int = 1) -> ComparisonBatch:
  made = ComparisonBatch(**fields())
  made = jax.tree.map(lambda x: x.reshape(microbatches, -1, tiny.LENGTH), made)
  return jax.device_put(made, sharding.batch_spec(1))


@functools.cache
def step(name):
  return jax.jit(
    functools.partial(reward_step, config=tiny.MODEL, updater=UPDATER, objective=OBJECTIVES[name])
  )


@functools.cache
def update(name, microbatches=1):
  state = jax.jit(UPDATER.create)(params())
  return step(name)(state, batch(microbatches))


@functools.cache
def hidden() -> np.ndarray:
  b = fields()
  forward = jax.jit(lambda params, *rows: decoder.forward(params, tiny.MODEL, *rows))
  return np.asarray(forward(params(), b["tokens"], b["positions"], b["segment_ids"]), np.float64)


def as_groups():
  """The rows as groups of `tests/losses/groups.py`, with values in float64."""
  b, head = fields(), params()[heads.HEAD].astype(np.float64)
  made = []
  for row in range(tiny.ROWS):
    completions = []
    for segment in range(2):
      at = b["segment_ids"][row] == segment
      completion = {k: b[k][row, at] for k in ("tokens", "labels", "mask")}
      completions.append(completion | {"values": hidden()[row, at] @ head.T})
    weight, margin = b["weights"][row, 0], b["margins"][row, 0]
    made.append({"completions": completions, "weight": float(weight), "margin": float(margin)})
  return made


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_head_gradient(name):
  """After one update the first moment is (1 - b1) times the clipped gradient."""
  objective, made = OBJECTIVES[name], as_groups()
  drawn = groups.drawn_weights(made) if objective.bootstrap else None
  want, slopes = groups.truth(
    made, objective.kind, margins=objective.margins, center=objective.center, drawn=drawn
  )
  state, metrics = update(name)
  np.testing.assert_allclose(metrics["loss"], want, rtol=2e-5)
  gradient = np.zeros((MEMBERS, tiny.MODEL.width))
  for row, group in enumerate(slopes):
    for segment, slope in enumerate(group):
      at = fields()["segment_ids"][row] == segment
      gradient += slope.T @ hidden()[row, at]
  adam = UPDATER.optimizer
  clip = min(1, adam.clip_norm / float(metrics["optimizer/grad_norm"]))
  got = np.asarray(state.optimizer[0].mu[heads.HEAD]) / (1 - adam.b1) / clip
  np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, params())
  assert min(jax.tree.leaves(moved)) > 0, "the trunk is trained too"


@pytest.mark.parametrize("name, microbatches", [("pairwise", 2), ("pairwise", 4), ("process", 4)])
def test_microbatches(name, microbatches):
  (state, metrics), (other, other_metrics) = update(name), update(name, microbatches)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, other.params, state.params)
  jax.tree.map(close, other.optimizer[0].mu, state.optimizer[0].mu)
  for metric, value in metrics.items():
    close(other_metrics[metric], value, err_msg=metric)


def test_evaluation_gives_the_rewards_of_each_completion():
  evaluate = functools.partial(reward_evaluate, config=tiny.MODEL, objective=OBJECTIVES["pairwise"])
  one = jax.tree.map(lambda x: x[0], batch())
  sums, at, values = jax.jit(evaluate)(params(), one)
  np.testing.assert_allclose(sums["loss"].mean(), update("pairwise")[1]["loss"], rtol=1e-5)
  want = [c["values"][-1] for group in as_groups() for c in group["completions"]]
  np.testing.assert_allclose(np.asarray(values)[np.asarray(at)], want, rtol=1e-4, atol=1e-4)


def test_another_completion_of_the_row_changes_nothing():
  """Bitwise: a token of the second sample of a row against the reward of the first."""
  evaluate = jax.jit(
    functools.partial(reward_evaluate, config=tiny.MODEL, objective=OBJECTIVES["process"])
  )
  before = jax.tree.map(lambda x: np.asarray(x[0]), batch())
  place = int(np.flatnonzero(before.segment_ids[2] == 1)[0])
  tokens = before.tokens.copy()
  tokens[2, place] = (tokens[2, place] + 1) % tiny.MODEL.vocab_size
  values, other = (
    np.asarray(evaluate(params(), jax.device_put(b, sharding.batch_spec()))[2])
    for b in (before, before.replace(tokens=tokens))
  )
  np.testing.assert_array_equal(values[2, :place], other[2, :place])
  assert (values[2, place] != other[2, place]).all()
