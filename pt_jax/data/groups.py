"""Groups: completions that are compared or judged together, packed side by side into one row.

A group is placed by a plan over groups (`packing.pack`), its length the sum of those of its
completions; `segments_of` refines that to a plan over their segments. N groups, M segments.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from pt_jax.data.batch import PADDING_SEGMENT, ComparisonBatch
from pt_jax.data.packing import Example, Plan, checked_example, lay_out, pack_rows, spread

MISMATCHED = -1.0  # label of a completion of another prompt: it only tells how far the policy moved


class Group(NamedTuple):
  """One encoded row of a data set of comparisons or judgements."""

  completions: tuple[Example, ...]  # the best one first; each is its prompt and what followed
  # Of each completion (1 chosen or right, 0 not, MISMATCHED), or an array [n] of its tokens.
  labels: tuple[ArrayLike, ...]
  weight: float = 1.0
  margin: float = 0.0
  references: tuple[np.ndarray, ...] | None = None  # [n] log-probs of each completion, if known


def group_length(group: Group) -> int:
  """Tokens of all completions."""
  return sum(len(completion.tokens) for completion in group.completions)


def checked_group(group: Group) -> Group:
  """The group with its arrays checked.

  Raises ValueError, naming the completion, for one that is no `Example` with something to train on;
  for labels that do not match, and a weight or margin that is not a finite number.
  """
  if not isinstance(group, Group):
    raise ValueError(f"expected a Group of completions, found {_kind(group)}")
  if not group.completions or len(group.labels) != len(group.completions):
    raise ValueError(
      "expected a label for each of one or more completions, found "
      f"{len(group.labels)} for {len(group.completions)}"
    )
  if not (math.isfinite(group.weight) and group.weight >= 0 and math.isfinite(group.margin)):
    raise ValueError(
      "expected a weight of at least 0 and a margin, both finite, found "
      f"{group.weight} and {group.margin}"
    )
  completions = []
  for i, (completion, label) in enumerate(zip(group.completions, group.labels)):
    try:
      completions.append(checked_example(completion))
    except ValueError as error:
      raise ValueError(f"completion {i}: {error}") from error
    if completions[-1].weight != 1:
      weight = completions[-1].weight
      raise ValueError(f"completion {i}: expected no weight but that of its group, found {weight}")
    shape = np.shape(label)
    if shape not in ((), completions[-1].tokens.shape):
      count = len(completions[-1].tokens)
      raise ValueError(f"completion {i}: {count} tokens have labels of shape {shape}")
  return group._replace(completions=tuple(completions))


def segments_of(plan: Plan, parts: Sequence[Sequence[int]]) -> Plan:
  """The plan over the M segments of all groups, in order, from a plan over the N groups and the
  lengths of the segments of each."""
  counts = np.array([len(group) for group in parts], np.int64)
  lengths = np.array([length for group in parts for length in group], np.int64)
  owner = np.repeat(np.arange(len(parts)), counts)
  row = plan.row[owner]
  kept = np.where(row >= 0, lengths, 0)
  before = np.cumsum(lengths) - lengths
  inside = before - before[np.repeat(np.cumsum(counts) - counts, counts)]
  offset = np.where(row >= 0, plan.offset[owner] + inside, 0)
  order = np.lexsort((offset, row))
  new_row = np.diff(row[order], prepend=-2) != 0
  count = np.arange(len(order))
  segment = np.zeros_like(offset)
  segment[order] = count - np.maximum.accumulate(np.where(new_row, count, 0))
  segment[row < 0] = 0
  return Plan(row, offset, segment, kept, lengths, plan.rows, plan.row_length)


def pack_groups(groups: Sequence[Group], plan: Plan) -> ComparisonBatch:
  """Lays groups out as a `ComparisonBatch` of NumPy arrays, by a plan over the groups.

  Labels are spread over the tokens of their completion, weights and margins over the group. The
  mask of each first token of a segment becomes 0. Log-probs under the reference are 0 where a group
  has none, and where the mask is 0.
  """
  flat = segments_of(plan, [[len(c.tokens) for c in group.completions] for group in groups])
  completions = [completion for group in groups for completion in group.completions]
  rows = pack_rows(completions, flat)
  labels = [
    np.broadcast_to(np.asarray(label, np.float32), completion.tokens.shape)
    for group in groups
    for completion, label in zip(group.completions, group.labels)
  ]
  known = [
    reference
    for group in groups
    for reference in group.references or [np.zeros(c.tokens.shape) for c in group.completions]
  ]
  references = np.where(np.asarray(rows.mask) > 0, lay_out(flat, known, 0, np.float32), 0)
  return ComparisonBatch(
    tokens=rows.tokens,
    positions=rows.positions,
    segment_ids=rows.segment_ids,
    mask=rows.mask,
    group_ids=cast(Any, spread(plan, plan.segment, PADDING_SEGMENT, np.int32)),
    labels=cast(Any, lay_out(flat, labels, 0, np.float32)),
    weights=cast(Any, spread(plan, [group.weight for group in groups], 0, np.float32)),
    margins=cast(Any, spread(plan, [group.margin for group in groups], 0, np.float32)),
    reference_logprobs=cast(Any, references),
  )


def _kind(value: Any) -> str:
  return f"a {type(value).__name__}"
