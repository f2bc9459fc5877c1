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
from pt_jax.data.packing import Plan, one_per_row, pack

Part = list[int]  # completions that stand behind one prompt in one row


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
  that takes fewer rows: of three plans, that with the fewest rows is kept, then that with the
  fewest tokens. They are groups in best-fit decreasing; groups one behind the other, each split
  where its row is full; and completions alone, so that there are never more rows than with `pack`.

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
  members = list(groups.values())
  size = lambda parts: sum(int(head[part[0]] + tail[part].sum()) for part in parts)
  plans = []
  for most in (len(tail), 1):
    parts = [[part] for group in members for part in _split(group, head, tail, row_length, most)]
    plans.append((parts, pack([*map(size, parts)], row_length, rows_multiple=rows_multiple)))
  rows = _in_order(members, head, tail, row_length)
  plans.append((rows, one_per_row([*map(size, rows)], row_length, rows_multiple=rows_multiple)))
  bins, plan = min(plans, key=lambda each: (each[1].rows, each[1].kept.sum()))
  return _refined(bins, plan, head, tail)


def _split(
  group: Part, head: np.ndarray, tail: np.ndarray, row_length: int, most: int
) -> list[Part]:
  """The completions of one prompt, in parts that fit into a row behind it, of at most `most`."""
  parts = []
  for start in range(0, len(group), most):
    some = np.asarray(group[start : start + most])
    plan = pack(tail[some], row_length - int(head[some[0]]))
    parts += [some[plan.row == row].tolist() for row in range(plan.rows)]
  return parts


def _in_order(
  groups: list[Part], head: np.ndarray, tail: np.ndarray, row_length: int
) -> list[list[Part]]:
  """Rows that are filled one after the other, with the longest completions of a group that fit."""
  rows: list[list[Part]] = []
  room = 0
  for group in groups:
    left = sorted(group, key=lambda i: -tail[i])
    while left:
      free, part = room - head[left[0]], []
      for i in left:
        if tail[i] <= free:
          part.append(i)
          free -= tail[i]
      if part:
        rows[-1].append(part)
        room, left = free, [i for i in left if i not in part]
      else:
        rows.append([])
        room = row_length
  return rows


def _refined(bins: list[list[Part]], plan: Plan, head: np.ndarray, tail: np.ndarray) -> SharedPlan:
  """A plan over bins of parts as one over prompts and completions."""
  parts = [part for each in bins for part in each]
  lengths = [[n for part in each for n in (head[part[0]], *tail[part])] for each in bins]
  flat = segments_of(plan, lengths)
  sizes = np.array([1 + len(part) for part in parts])
  heads = np.cumsum(sizes) - sizes
  completions = np.delete(np.arange(len(flat.row)), heads)[np.argsort(np.concatenate(parts))]
  prefix = np.repeat(flat.segment[heads], sizes)[completions]
  owner = np.array([part[0] for part in parts])
  return SharedPlan(_some(flat, completions), _some(flat, heads), prefix, owner)


def _some(plan: Plan, index: np.ndarray) -> Plan:
  """The plan of the examples at these indices."""
  fields = ("row", "offset", "segment", "kept", "lengths")
  return dataclasses.replace(plan, **{name: getattr(plan, name)[index] for name in fields})
