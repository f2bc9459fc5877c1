"""Which blocks of a packed attention matrix hold anything, as lists that a TPU grid walks along.

Letters: B batch, I query blocks, J key blocks, N = B * I * J / parts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.reference import Features

FIRST, LAST = 1, 2  # bits of a flag, below the kinds of its parts
FULL, PARTIAL, DIAGONAL = 1, 2, 3  # kinds of a block; 0 for one that holds nothing
MOST_PARTS = 8
_SHIFT = 16
MOST_BLOCKS = 1 << 16  # two int32 of each lie in 1 MiB of scalar memory


def batch_of(row: jax.Array) -> jax.Array:
  """The batch entry of a row of blocks. Shifts, because a grid's turn works out ten block indices:
  divisions are long on a scalar core, and `//` asks which TPU this process has."""
  return jax.lax.shift_right_logical(row, _SHIFT)


def block_of(row: jax.Array) -> jax.Array:
  """The block of queries (forward) or keys (backward) that a row is."""
  return row & ((1 << _SHIFT) - 1)


def kind_of(flag: jax.Array, part: int | jax.Array) -> jax.Array:
  """Of a part of an entry: FULL, PARTIAL, DIAGONAL, or 0."""
  return jax.lax.shift_right_logical(flag, 2 + 2 * part) & 3


def is_dead(flag: jax.Array) -> jax.Array:
  """Whether no part of an entry holds anything."""
  return jax.lax.shift_right_logical(flag, 2) == 0


class LiveBlocks(NamedTuple):
  """What a grid walks along, the entries of one row of blocks in a sequence.

  A row is a block of queries of one batch entry (forward) or a block of keys (backward). An entry
  is several blocks side by side in a row, its parts, of which at least one holds something. FIRST
  and LAST mark the ends of a row; a part is FULL where every query sees every key, DIAGONAL where a
  causal mask cuts it from corner to corner, or else PARTIAL. A row of nothing has one entry with no
  such part, so that its zeros are written.
  """

  row: jax.Array  # [N] int32, batch << 16 | block: see `batch_of`, `block_of`
  other: jax.Array  # [N] int32, blocks of keys (forward) or of queries (backward), in entries
  flags: jax.Array  # [N] int32: `kind_of`
  count: jax.Array  # [] int32, entries in use


def live_blocks(
  q_ids: jax.Array,
  k_ids: jax.Array,
  q_offset: jax.Array,
  features: Features,
  q_block: int,
  k_block: int,
  *,
  by_keys: bool,
  parts: int,
) -> LiveBlocks:
  """The live blocks of rows of segments.

  Args:
    q_ids: [B, 1 to 3, S] int32, whole blocks: segment, prefix, position. A segment or prefix below
      0 sees none.
    k_ids: [B, 1 to 2, T] int32, whole blocks: segment, position.
    q_offset: [] int32.
    features: causal, window and by_position are read.
    q_block, k_block: sizes of a block.
    by_keys: rows are blocks of keys (the backward pass).
    parts: blocks of an entry, a divisor of those in a row.

  A block is live if the mask leaves something of it and the range of segments of its keys overlaps
  that of its queries or holds the prefix of one. Raises ValueError when there are more than
  `MOST_BLOCKS` blocks at all.
  """
  batch, queries, keys = len(q_ids), q_ids.shape[2] // q_block, k_ids.shape[2] // k_block
  if batch * queries * keys > MOST_BLOCKS:
    raise ValueError(
      f"flash_attention: expected at most {MOST_BLOCKS} blocks, found {batch} x {queries} x {keys}"
    )
  k_low, k_high, k_whole = (x[:, None, :] for x in _ranges(k_ids[:, 0], k_block))
  low, high, whole = (x[:, :, None] for x in _ranges(q_ids[:, 0], q_block))
  live = (low <= k_high) & (k_low <= high)
  full = (low == k_low) & whole & k_whole
  if q_ids.shape[1] > 1:
    low, _, whole = (x[:, :, None] for x in _ranges(q_ids[:, 1], q_block))
    full |= (low == k_low) & whole & k_whole
    # Each one, not their range: continuations stand between the prefixes of two groups.
    prefixes = q_ids[:, 1].reshape(batch, queries, 1, q_block)
    live |= ((k_low[..., None] <= prefixes) & (prefixes <= k_high[..., None])).any(-1)
  start = q_offset + q_block * jnp.arange(queries)[:, None] - k_block * jnp.arange(keys)
  if features.causal:
    live &= start + q_block - 1 >= 0
    full &= start - k_block + 1 >= 0
  if features.window is not None:
    nearest, farthest = start - k_block + 1, start + q_block - 1
    if features.by_position:
      q_at = q_ids[:, 2].reshape(batch, queries, 1, q_block)
      k_at = k_ids[:, 1].reshape(batch, 1, keys, k_block)
      nearest, farthest = q_at.min(-1) - k_at.max(-1), q_at.max(-1) - k_at.min(-1)
    live &= nearest < features.window
    full &= farthest < features.window
  kind = jnp.where(live, jnp.where(full, FULL, PARTIAL), 0)
  if features.causal and q_block == k_block:
    kind = jnp.where(live & (start == 0), DIAGONAL, kind)
  return _in_order(kind.swapaxes(1, 2) if by_keys else kind, parts)


def _ranges(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Lowest and highest id (below 0 left out) of every block [B, I], and if it has one id only."""
  blocks = segments.reshape(segments.shape[0], -1, block)
  most = jnp.iinfo(jnp.int32).max
  low = jnp.where(blocks < 0, most, blocks).min(-1)
  high = blocks.max(-1)
  return low, high, (blocks.min(-1) == high) & (high >= 0)


def _in_order(kind: jax.Array, parts: int) -> LiveBlocks:
  """Kinds [B, rows, blocks] -> the list of the entries that are kept."""
  batch, rows, blocks = kind.shape
  others = blocks // parts
  kind = kind.reshape(batch, rows, others, parts)
  kind = jnp.sum(kind << 2 + 2 * jnp.arange(parts), -1)
  column = jnp.arange(others)
  kept = (kind > 0) | ((column == 0) & ~(kind > 0).any(-1, keepdims=True))
  first = kept & (jnp.cumsum(kept, -1) == 1)
  last = kept & (jnp.cumsum(kept[..., ::-1], -1)[..., ::-1] == 1)
  flags = (kind | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)).reshape(-1)
  # Kept places before the others. A sort: `jnp.nonzero` scatters, which libtpu 0.0.52 gives to the
  # sparse cores of v5p, v6e and tpu7x in a form that jaxlib cannot read back.
  every = jnp.arange(kept.size, dtype=jnp.int32)
  place = jnp.sort(jnp.where(kept.reshape(-1), every, kept.size)) % kept.size
  row = place // others
  return LiveBlocks(
    row=row // rows << _SHIFT | row % rows,
    other=place % others,
    flags=flags[place].astype(jnp.int32),
    count=kept.sum(dtype=jnp.int32),
  )
