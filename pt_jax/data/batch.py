"""Batches: what the data room hands to a step.

Shapes: B rows, S positions; microbatches add a leading A.

A row holds one or more packed segments. `segment_ids` are 0, 1, 2... in the order of a row and -1
on padding; a padding token attends to nothing and nothing attends to it. Every per-token field is
aligned with the token it speaks of: `mask[b, t]` says whether predicting `tokens[b, t]` from what
stands before it in its segment is trained. The first token of a segment has nothing before it, so
its mask is 0.

Completions of one prompt may share it (`data.shared_prompts`): it then stands once, without its
last token, in positions that are in no segment, and each completion is a segment that begins with
that token. `prefix_ids` say who belongs together.
"""

import flax.struct
import jax

PADDING_SEGMENT = -1


@flax.struct.dataclass
class Batch:
  """Packed token rows for a supervised step."""

  tokens: jax.Array  # [B, S] int32, 0 on padding
  positions: jax.Array  # [B, S] int32, counted from 0 in each segment, 0 on padding
  segment_ids: jax.Array  # [B, S] int32, -1 on padding
  mask: jax.Array  # [B, S] float32, weight of the token as a target; 0 on prompts and padding
  weights: jax.Array  # [B, S] float32 > 0, of the segment; 0 on padding


@flax.struct.dataclass
class PolicyBatch:
  """Packed rollouts for a policy-gradient step. The first four fields are as in `Batch`."""

  tokens: jax.Array  # [B, S] int32, 0 on padding
  positions: jax.Array  # [B, S] int32, counted from 0 in each prompt, 0 on padding
  segment_ids: jax.Array  # [B, S] int32, of completions; -1 on padding and on shared prompts
  mask: jax.Array  # [B, S] float32, 1 on completion tokens that are trained
  advantages: jax.Array  # [B, S] float32, 0 outside completions
  old_logprobs: jax.Array  # [B, S] float32, trainer log-prob before the first update, 0 outside
  sampler_logprobs: jax.Array  # [B, S] float32, log-prob the rollout engine reported, 0 outside
  reference_logprobs: jax.Array  # [B, S] float32, log-prob under the reference policy, 0 if unused
  positive: jax.Array  # [B, S] float32, 1 on trained tokens of right completions, 0 if unused
  returns: jax.Array  # [B, S] float32, what a critic learns, 0 without one
  old_values: jax.Array  # [B, S] float32, of the critic before the first update, 0 without one
  # [B, S] int32, number of the shared prompt: on it, where no segment is, and on what follows; -1
  # on padding. None: every segment begins with a prompt of its own.
  prefix_ids: jax.Array | None = None


@flax.struct.dataclass
class ComparisonBatch:
  """Packed completions that are compared or judged. The first four fields are as in `Batch`.

  A group is what one loss value is made of: the two completions of a pair, a ranked list, or one
  completion with a label. Its segments stand side by side in one row, the best one first.
  """

  tokens: jax.Array  # [B, S] int32, 0 on padding
  positions: jax.Array  # [B, S] int32, counted from 0 in each segment, 0 on padding
  segment_ids: jax.Array  # [B, S] int32, -1 on padding
  mask: jax.Array  # [B, S] float32, 1 on completion tokens; for step rewards, on step marks
  group_ids: jax.Array  # [B, S] int32, number of the group in its row, -1 on padding
  labels: jax.Array  # [B, S] float32, of the completion (1 chosen or right) or of the step, in 0..1
  weights: jax.Array  # [B, S] float32, of the group, 0 on padding
  margins: jax.Array  # [B, S] float32, of the group, 0 on padding
  reference_logprobs: jax.Array  # [B, S] float32, log-prob under the reference, 0 if unused
