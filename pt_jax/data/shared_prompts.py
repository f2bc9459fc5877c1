"""Packing completions behind prompts that stand once: rows of "prompt, completion, completion...".

A prompt is laid out without its last token, which every completion repeats before its first: what
predicts a completion's first token then stands right before it, as it does everywhere else, and no
loss has to know of prompts. That costs a token for every completion after the first.

N completions, M laid out prompts (one for every row that a group is spread over).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pt_jax.data.groups import segments_of
from pt_jax.data.packing import Plan, pack


class SharedPlan(NamedTuple):
  """Where completions and their prompts stand; segments of a row count prompts and completions."""

  completions: Plan  # of N: the last token of the prompt and what followed
  prompts: Plan  # of M: without the last token, so possibly empty
  prefix: np.ndarray  # [N] int64, the segment of its prompt in the row of each completion
  owner: np.ndarray  # [M] int64, a completion whose prompt it is


def pack_shared(
  prompts: Sequence[Any],
  prompt_lengths: np.ndarray,
  lengths: np.ndarray,
  row_length: int,
  *,
  rows_multiple: int = 1,
) -> SharedPlan:
  """Packs completions with their prompts into few rows, those of one prompt together.

  A group that is longer than a row is split, each part behind a prompt of its own. So is one where
  that takes fewer rows: parts of at most N, N/2, N/4... 1 completions are tried, and of the plans
  with the fewest rows that with the fewest tokens is kept. It never needs more rows than `pack`.

  Args:
    prompts: [N] what tells the prompts of completions apart.
    prompt_lengths: [N], at least 1.
    lengths: [N], of prompt and completion.
    row_length: S, tokens a row holds.
    rows_multiple: as in `pack`.

  Raises ValueError for a prompt and completion that are longer than a row.
  """
  pack(lengths, row_length)  # checks the lengths
  head = np.asarray(prompt_lengths, np.int64) - 1
  tail = np.asarray(lengths, np.int64) - head
  groups: dict[Any, list[int]] = {}
  for i, prompt in enumerate(prompts):
    groups.setdefault(prompt, []).append(i)
  plans = []
  most = 1 << (max(map(len, groups.values())) - 1).bit_length()
  while most:
    parts = [
      p for members in groups.values() for p in _parts(members, head, tail, row_length, most)
    ]
    sums = [head[part[0]] + tail[part].sum() for part in parts]
    plans.append((parts, pack(sums, row_length, rows_multiple=rows_multiple)))
    most //= 2
  parts, plan = min(plans, key=lambda each: (each[1].rows, each[1].kept.sum()))
  return _refined(parts, plan, head, tail)


def _parts(
  members: list[int], head: np.ndarray, tail: np.ndarray, row_length: int, most: int
) -> list[list[int]]:
  """The completions of one prompt, in parts that fit into a row behind it, of at most `most`."""
  parts = []
  for start in range(0, len(members), most):
    some = np.asarray(members[start : start + most])
    plan = pack(tail[some], row_length - int(head[some[0]]))
    parts += [some[plan.row == row].tolist() for row in range(plan.rows)]
  return parts


def _refined(parts: list[list[int]], plan: Plan, head: np.ndarray, tail: np.ndarray) -> SharedPlan:
  """The plan over parts as one over prompts and completions."""
  owner = np.array([part[0] for part in parts])
  flat = segments_of(plan, [[head[part[0]], *tail[part]] for part in parts])
  sizes = np.array([1 + len(part) for part in parts])
  heads = np.cumsum(sizes) - sizes
  completions = np.delete(np.arange(len(flat.row)), heads)[np.argsort(np.concatenate(parts))]
  prefix = np.repeat(flat.segment[heads], sizes)[completions]
  return SharedPlan(_some(flat, completions), _some(flat, heads), prefix, owner)


def _some(plan: Plan, index: np.ndarray) -> Plan:
  """The plan of the examples at these indices."""
  fields = ("row", "offset", "segment", "kept", "lengths")
  return dataclasses.replace(plan, **{name: getattr(plan, name)[index] for name in fields})
