"""Plans that put the completions of a prompt behind one copy of it."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pt_jax.data.packing import pack
from pt_jax.data.shared_prompts import pack_shared


def plan_of(groups, row_length, **options):
  """Of groups (prompt, completions...) of lengths."""
  prompts = [i for i, (_, *answers) in enumerate(groups) for _ in answers]
  starts = np.array([prompt for prompt, *answers in groups for _ in answers])
  lengths = np.array([prompt + n for prompt, *answers in groups for n in answers])
  return pack_shared(prompts, starts, lengths, row_length, **options), prompts, starts, lengths


def test_a_group_by_hand():
  plan, *_ = plan_of([(4, 2, 3), (2, 1, 1)], 20, rows_multiple=2)
  assert plan.prompts.offset.tolist() == [0, 10] and plan.prompts.kept.tolist() == [3, 1]
  assert plan.completions.offset.tolist() == [3, 6, 11, 13]
  assert plan.completions.kept.tolist() == [3, 4, 2, 2]  # with the last token of the prompt
  assert plan.completions.segment.tolist() == [1, 2, 4, 5]
  assert plan.prompts.segment.tolist() == [0, 3] and plan.prefix.tolist() == [0, 0, 3, 3]
  assert plan.completions.rows == plan.prompts.rows == 2  # one of them of padding


def test_groups_are_split_only_where_that_takes_fewer_rows():
  """Two groups of 6 + 4 x 2 tokens and rows of 20: each fits, and two rows hold them whole. In rows
  of 10, a part of a group is its prompt and two completions."""
  plan, *_ = plan_of([(7, 1, 1, 1, 1)] * 2, 20)
  assert plan.completions.row.tolist() == [0] * 4 + [1] * 4 and len(plan.prompts.row) == 2
  plan, *_ = plan_of([(7, 1, 1, 1, 1)] * 2, 10)
  assert plan.completions.rows == 4 and len(plan.prompts.row) == 4
  # Three groups of 1 + 4 x 2 tokens: a row of 15 holds one of them and a half.
  plan, *_ = plan_of([(2, 1, 1, 1, 1)] * 3, 15)
  assert plan.completions.rows == pack([3] * 12, 15).rows - 1 == 2
  assert len(plan.prompts.row) == 4


def test_a_completion_that_does_not_fit_is_named():
  with pytest.raises(ValueError, match="example 1 has 11 tokens, a row holds 10"):
    plan_of([(5, 2, 6)], 10)


lengths = st.integers(1, 9)
groups = st.lists(st.tuples(lengths, lengths, lengths, lengths, lengths), min_size=1, max_size=6)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(groups, st.integers(18, 60))
def test_everything_stands_somewhere_and_behind_its_prompt(groups, row_length):
  plan, prompts, starts, lengths = plan_of(groups, row_length)
  whole = (plan.completions, plan.prompts)
  taken = np.zeros((whole[0].rows, row_length), int)
  for part in whole:
    for _, row, slot in part.slots():
      taken[row, slot] += 1
  assert taken.max() == 1
  assert whole[0].rows <= pack(lengths, row_length).rows
  heads = {(row, n): i for i, (row, n) in enumerate(zip(plan.prompts.row, plan.prompts.segment))}
  assert len(heads) == len(plan.prompts.row)
  for i, (row, prefix) in enumerate(zip(plan.completions.row, plan.prefix)):
    own = heads[row, prefix]
    assert prompts[plan.owner[own]] == prompts[i]
    assert plan.prompts.kept[own] == starts[i] - 1
    assert plan.completions.kept[i] == lengths[i] - starts[i] + 1
    assert plan.prompts.offset[own] + plan.prompts.kept[own] <= plan.completions.offset[i]
    assert prefix < plan.completions.segment[i]
