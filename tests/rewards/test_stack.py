"""Reward stacks: the weighted sum, every component by its name, and clear errors."""

import time

import numpy as np
import pytest

from pt_jax.data.tasks import Problem
from pt_jax.rewards.stack import Component, RewardStack
from pt_jax.rewards.verifiers import Completion, numeric, think_answer
from pt_jax.rollout.rollouts import StopReason

HALF = Component("half", 1.0, lambda completion: 0.5)


def _completions(*texts: str) -> list[Completion]:
  problem = Problem("p1", "?", "5", {})
  return [Completion(problem, text, len(text), StopReason.TOKEN) for text in texts]


def test_total_is_the_weighted_sum_and_components_are_kept():
  stack = RewardStack([Component("right", 1.0, numeric), Component("format", -0.25, think_answer)])
  rewards = stack(
    _completions(
      "<think>a</think><answer>5</answer>",
      "<answer>5</answer>",
      "<think>a</think><answer>6</answer>",
      "?",
    )
  )
  np.testing.assert_array_equal(rewards.components["right"], [1, 1, 0, 0])
  np.testing.assert_array_equal(rewards.components["format"], [1, 0, 1, 0])
  np.testing.assert_array_equal(rewards.total, [0.75, 1, -0.25, 0])
  assert list(rewards.components) == ["right", "format"]
  assert {values.dtype for values in (rewards.total, *rewards.components.values())} == {
    np.dtype(np.float32)
  }


def test_order_is_kept_when_early_ones_take_longest():
  def slow(completion: Completion) -> float:
    time.sleep(0.02 * (8 - completion.tokens))
    return completion.tokens

  completions = _completions(*("x" * length for length in range(8)))
  rewards = RewardStack([Component("length", 1.0, slow)], threads=8)(completions)
  np.testing.assert_array_equal(rewards.total, range(8))


def test_no_completions():
  rewards = RewardStack([HALF])([])
  assert rewards.total.shape == rewards.components["half"].shape == (0,)


@pytest.mark.parametrize(
  "components, expected",
  [
    ([], "no components, expected at least one"),
    ([HALF, HALF], "two components are named 'half'"),
    ([Component("", 2.0, numeric)], r"a component has no name \(weight 2.0\)"),
    ([Component("a", float("nan"), numeric)], "weight of 'a' is nan, expected finite"),
  ],
)
def test_bad_stacks(components, expected):
  with pytest.raises(ValueError, match=expected):
    RewardStack(components)


def test_bad_threads():
  with pytest.raises(ValueError, match="threads must be at least 1, found 0"):
    RewardStack([HALF], threads=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_their_component(value):
  stack = RewardStack([HALF, Component("broken", 0.0, lambda completion: value)])
  with pytest.raises(ValueError, match=f"component 'broken', problem 'p1': score is {value}"):
    stack(_completions("a"))


def test_a_verifier_that_raises_names_its_component():
  def broken(completion: Completion) -> float:
    raise KeyError("field")

  with pytest.raises(
    ValueError, match="reward component 'broken', problem 'p1': 'field'"
  ) as caught:
    RewardStack([Component("broken", 1.0, broken)])(_completions("a"))
  assert isinstance(caught.value.__cause__, KeyError)
