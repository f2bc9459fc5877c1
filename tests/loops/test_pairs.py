"""From scores to pairs and labelled completions, with every token where it belongs."""

import numpy as np
import pytest

from pt_jax.data.groups import MISMATCHED
from pt_jax.data.tasks import Problem
from pt_jax.loops import pairs
from pt_jax.loops.rollouts import Judged
from pt_jax.rewards.judges import WinRates, judged
from pt_jax.rewards.stack import Rewards
from pt_jax.rewards.verifiers import Completion
from pt_jax.rollout.rollouts import Rollouts, StopReason

PROMPTS, ANSWERS = np.array([2, 2, 3, 3, 1, 1]), np.array([3, 1, 2, 5, 4, 2])
GROUPS = np.array([0, 0, 4, 4, 7, 7])
FORCED = np.zeros((6, 8), bool)
SCORES = np.float32([0.2, 0.9, 0.5, 0.5, 1.0, 0.0])


def made() -> Judged:
  """Six completions of three prompts; token = 100 * its row + its place, so owners can be told."""
  place = np.arange(8)
  held = place < (PROMPTS + ANSWERS)[:, None]
  tokens = np.where(held, 100 * np.arange(6)[:, None] + place, 0).astype(np.int32)
  logprobs = np.where(held & (place >= PROMPTS[:, None]), -tokens / 1000, 0).astype(np.float32)
  rollouts = Rollouts(
    tokens, PROMPTS, PROMPTS + ANSWERS, logprobs, tokens, np.zeros(6, np.int8), FORCED
  )
  completions = [
    Completion(Problem(f"p{group}", f"ask {group}", "x", {}), f"text {i}", int(n), StopReason.TOKEN)
    for i, (group, n) in enumerate(zip(GROUPS, ANSWERS))
  ]
  return Judged(completions, rollouts, Rewards(SCORES, {"correct": SCORES}), GROUPS)


def test_separable():
  np.testing.assert_array_equal(pairs.separable(SCORES, GROUPS), [1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(pairs.separable(SCORES[:3], np.arange(3)), [0, 0, 0])


@pytest.mark.parametrize("pairing", ["best_worst", "random", "all"])
def test_pairs_are_of_one_prompt_and_strict(pairing):
  rng = np.random.default_rng(1)
  scores, groups = rng.integers(0, 4, 60) / 2, np.repeat(np.arange(10), 6)
  scores[groups == 3] = 0.5
  got = pairs.pair_up(scores, groups, pairing, np.random.default_rng(0))
  assert (scores[got.chosen] > scores[got.rejected]).all()
  owner = groups[got.chosen]
  np.testing.assert_array_equal(owner, groups[got.rejected])
  assert 3 not in owner and len(np.unique(owner)) == 9
  np.testing.assert_allclose(np.bincount(owner, got.weights, 10), groups[::6] != 3, rtol=1e-6)
  for group in np.unique(owner):
    of_group, mine = scores[groups == group], owner == group
    strict = (of_group[:, None] > of_group).sum()
    assert mine.sum() == (strict if pairing == "all" else 1)
    if pairing == "best_worst":
      assert scores[got.chosen[mine]] == of_group.max()
      assert scores[got.rejected[mine]] == of_group.min()
  found = len({*zip(got.chosen, got.rejected)})
  assert found == len(got.chosen)
  again = pairs.pair_up(scores, groups, pairing, np.random.default_rng(0))
  np.testing.assert_array_equal(again.chosen, got.chosen)


def test_random_pairs_are_any_of_the_strict_ones():
  scores, groups = np.array([0.0, 1, 2, 0]), np.zeros(4, int)
  drawn = {
    (int(got.chosen[0]), int(got.rejected[0]))
    for seed in range(60)
    for got in [pairs.pair_up(scores, groups, "random", np.random.default_rng(seed))]
  }
  assert drawn == {(1, 0), (1, 3), (2, 0), (2, 1), (2, 3)}


def test_nothing_to_pair():
  got = pairs.pair_up(np.ones(4), np.array([0, 0, 1, 1]), "all", np.random.default_rng(0))
  assert not len(got.chosen) and not len(got.weights)


def test_a_pair_holds_its_own_tokens_and_the_samplers_logprobs():
  chosen = pairs.Pairs(np.array([1, 4]), np.array([0, 5]), np.float32([1, 0.5]))
  (first, second) = pairs.pair_groups(made(), chosen)
  np.testing.assert_array_equal(first.completions[0].tokens, [100, 101, 102])
  np.testing.assert_array_equal(first.completions[0].mask, [0, 0, 1])
  np.testing.assert_array_equal(first.completions[1].tokens, [0, 1, 2, 3, 4])
  np.testing.assert_array_equal(first.completions[1].mask, [0, 0, 1, 1, 1])
  assert first.labels == (1.0, 0.0) and (first.weight, second.weight) == (1, 0.5)
  np.testing.assert_allclose(second.references[0], [0, -0.401, -0.402, -0.403, -0.404], rtol=1e-6)
  np.testing.assert_allclose(second.references[1], [0, -0.501, -0.502], rtol=1e-6)


def test_single_completions_with_one_of_the_next_prompt():
  right = SCORES > 0.4
  groups = pairs.single_groups(made(), right, mismatched=True)
  assert [g.labels for g in groups] == [(float(r), MISMATCHED) for r in right]
  for i, group in enumerate(groups):
    own, other = group.completions
    np.testing.assert_array_equal(own.tokens, 100 * i + np.arange(PROMPTS[i] + ANSWERS[i]))
    rows = other.tokens // 100
    source = (i + 2) % 6  # the same place in the next prompt's group
    np.testing.assert_array_equal(rows[: PROMPTS[i]], i)
    np.testing.assert_array_equal(rows[PROMPTS[i] :], source)
    np.testing.assert_array_equal(
      other.tokens[PROMPTS[i] :] % 100, PROMPTS[source] + np.arange(ANSWERS[source])
    )
    np.testing.assert_array_equal(other.mask, np.arange(len(rows)) >= PROMPTS[i])
  alone = pairs.single_groups(made(), right, mismatched=False)
  assert [len(group.completions) for group in alone] == [1] * 6


def test_packing_has_room_for_groups_of_any_length():
  groups = pairs.single_groups(made(), SCORES > 0.4, mismatched=True)
  batch = pairs.pack_comparisons(groups, rows=2, row_length=16)
  assert batch.tokens.shape == (4, 2, 16)  # three microbatches for six groups, and a power of two
  assert (batch.segment_ids >= 0).sum() == sum(
    len(c.tokens) for group in groups for c in group.completions
  )
  assert batch.mask.sum() == 2 * ANSWERS.sum()
  assert pairs.pack_comparisons(groups[:1], 2, 16).tokens.shape == (1, 2, 16)


def test_rows_of_samples():
  chosen = pairs.Pairs(np.array([1, 4]), np.array([0, 5]), np.float32([1, 1]))
  (row,) = pairs.pair_rows(made(), SCORES, chosen, 1)
  assert row["problem"] == "p0" and (row["completion"], row["rejected"]) == ("text 1", "text 0")
  assert row["score"] == pytest.approx(0.9) and row["rejected_score"] == pytest.approx(0.2)
  rows = pairs.single_rows(made(), SCORES, SCORES > 0.4, 5)
  assert [(r["completion"], r["label"]) for r in rows] == [
    ("text 0", 0), ("text 2", 1), ("text 4", 1)
  ]  # fmt: skip


def test_win_rates_ask_in_both_orders():
  """A judge that favours the first place orders by quality all the same."""
  asked = []

  def prefers(first, second):
    asked.append((first.text, second.text))
    return float(np.clip(0.7 + first.tokens / 10 - second.tokens / 10, 0, 1))

  judged_ = made()
  scores = judged(WinRates(prefers), judged_.completions, np.array([0, 0, 0, 1, 1, 2]))
  np.testing.assert_allclose(
    scores,
    [(0.5 + 0.2 + 0.5 + 0.1) / 2, (0.3 + 0.4) / 2, (0.4 + 0.6) / 2, 0.6, 0.4, 0.5],
    atol=1e-6,
  )
  assert len(asked) == len({*asked}) == 3 * 2 + 2


def no_probability(first, second):
  return 1.5


@pytest.mark.parametrize(
  "judge, message",
  [
    (lambda c, g: np.zeros(3), r"judge: expected 6 scores, found shape \(3,\)"),
    (lambda c, g: np.full(6, np.nan), "judge: problem p0: expected a finite score, found nan"),
    (WinRates(no_probability), r"judge: problem p0: expected a probability in 0\.\.1, found 1\.5"),
  ],
)
def test_judges_that_cannot_be_used(judge, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    judged(judge, made().completions, GROUPS)
