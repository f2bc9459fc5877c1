"""Ragged paged attention on a TPU: arguments as the kernel wants them, and one launch.

Queries, new keys and outputs are turned around here, to heads first; XLA does that while it reads
what it turns. The kernel needs no copy of the pages.

A sequence's result depends on its own tokens only, to the last bit: where its tiles of queries and
keys start and end is counted from its own first token, and a row of a product does not depend on
the rows beside it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import chip as chips
from kernels import tiles as tile_table
from kernels import varying
from kernels.attention_tile import LOG2_E, query_factor
from kernels.ragged_paged_attention import pages
from kernels.ragged_paged_attention.kernel import Kernel, Refs, kernel
from kernels.ragged_paged_attention.layout import Layout, Tiles, layout, steps, up
from kernels.ragged_paged_attention.reference import MASKED, Features, check

VMEM_SHARE = 0.9  # of a core's memory that a launch may take


def attention(
  q: jax.Array,
  k_new: jax.Array,
  v_new: jax.Array,
  kv_pages: jax.Array,
  *,
  kv_lengths: jax.Array,
  page_table: jax.Array,
  q_starts: jax.Array,
  scale: float,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  kv_scales: jax.Array | None = None,
  return_lse: bool = False,
  tiles: Tiles | None = None,
  chip: str,
) -> tuple[jax.Array, ...]:
  """`reference.attention` in one Pallas kernel; donate the pages, they are written in place.

  The page table lies in scalar memory, 4 bytes an entry: larger pages make it smaller.

  Args:
    tiles: how the work is cut; None takes what `kernels.tiles` has.
    chip: a name of `kernels.chip.CHIPS`.

  Raises:
    ValueError, AssertionError: what the reference raises, a chip or tiles that are none, pages
      whose rows are not a multiple of a tile's (8 float32, 16 bfloat16, 32 of 8 bits).
  """
  check(q, k_new, v_new, kv_pages, kv_lengths, page_table, q_starts, sinks, kv_scales)
  features = Features(scale, window, soft_cap)
  target = chips.get(chip)
  tiles = tiles or Tiles(**tile_table.find("ragged_paged_attention", chip))
  sizes = layout(q, k_new, v_new, kv_pages, page_table, tiles, target.device_cores)
  work = steps(q_starts, len(q), sizes)
  scales = jnp.ones((2, sizes.groups)) if kv_scales is None else kv_scales.astype(jnp.float32)
  given = (
    jnp.zeros(q.shape[1]) if sinks is None else sinks.astype(jnp.float32) * LOG2_E,
    scales[1],
    _queries(q, scales[0] * query_factor(scale, soft_cap), sizes),
    _new_keys(k_new, v_new, kv_scales, kv_pages.dtype, q.dtype, sizes),
    kv_pages,
  )
  static = Kernel(sizes, features, sinks is not None)
  cost = _cost(q, kv_pages, len(work.row), static)
  call = _call(static, given, len(work), return_lse, target, cost)
  out, kv_pages, *lse = call(*work, kv_lengths, q_starts, page_table.reshape(-1), *given)
  live = (jnp.arange(len(q)) < q_starts[-1])[:, None, None]
  first = pages.value_offset(k_new.shape[2], v_new.shape[2]) - sizes.value_lane
  out = jnp.where(live, _tokens(out, len(q), sizes)[..., first : first + v_new.shape[2]], 0)
  if not return_lse:
    return out, kv_pages
  lse = _tokens(lse[0][..., :1], len(q), sizes)
  return out, kv_pages, jnp.where(live, lse, MASKED)[..., 0]


def _queries(q: jax.Array, factor: jax.Array, sizes: Layout) -> jax.Array:
  """[T, H, K] times factor [G] -> [G, rows, key lanes], zeros behind what is there."""
  tokens, _, width = q.shape
  q = q.reshape(tokens, sizes.groups, sizes.repeat, width)
  q = (q.astype(jnp.float32) * factor[:, None, None]).astype(q.dtype).transpose(1, 0, 2, 3)
  q = q.reshape(sizes.groups, tokens * sizes.repeat, width)
  rows = up(tokens * sizes.repeat, sizes.align) + sizes.largest.rows - q.shape[1]
  return jnp.pad(q, ((0, 0), (0, rows), (0, sizes.key_lanes - width)))


def _new_keys(k_new, v_new, kv_scales, kept, dtype, sizes: Layout) -> jax.Array:
  """[T, G, K] and [T, G, V] -> [G, rows, W] with the values that pages will hold."""
  rows = pages.new_rows(k_new, v_new, kv_scales, kept).astype(dtype).transpose(1, 0, 2)
  more = up(len(k_new), sizes.align) + sizes.largest.new - len(k_new)
  return jnp.pad(rows, ((0, 0), (0, more), (0, 0)))


def _tokens(x: jax.Array, tokens: int, sizes: Layout) -> jax.Array:
  """[G, rows, lanes] -> [T, H, lanes]."""
  x = x[:, : tokens * sizes.repeat].reshape(sizes.groups, tokens, sizes.repeat, -1)
  return x.transpose(1, 0, 2, 3).reshape(tokens, sizes.groups * sizes.repeat, -1)


def _cost(q: jax.Array, kv_pages: jax.Array, count: int, static: Kernel) -> pl.CostEstimate:
  """The worst case: every step fetches, and every token sees, as many keys as a sequence may have
  or as a window shows."""
  sizes, item = static.sizes, kv_pages.dtype.itemsize
  keys = sizes.pages * sizes.page
  keys = min(keys, static.features.window or keys)
  seen = q.shape[0] * q.shape[1] * keys
  return pl.CostEstimate(
    flops=2 * seen * (sizes.key_lanes + sizes.value_lanes),
    transcendentals=seen,
    bytes_accessed=count * sizes.groups * keys * sizes.width * item + 2 * q.size * q.dtype.itemsize,
  )


def _call(
  static: Kernel,
  given,
  prefetched: int,
  return_lse: bool,
  target: chips.Chip,
  cost: pl.CostEstimate,
):
  sizes = static.sizes
  _, _, q, _, kv_pages = given
  hbm, smem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
  out = [jax.ShapeDtypeStruct((*q.shape[:2], sizes.value_lanes), q.dtype), kv_pages]
  if return_lse:
    out.append(jax.ShapeDtypeStruct((*q.shape[:2], pages.LANES), jnp.float32))
  scratch = _scratch(sizes, q.dtype, kv_pages.dtype, return_lse)
  scalars = prefetched + 3
  names = tuple(n for n in Refs._fields if return_lse or not n.startswith("lse"))
  return pl.pallas_call(
    functools.partial(kernel, static=static, names=names),
    out_shape=[varying.out(x.shape, x.dtype, *given) for x in out],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=scalars,
      grid=(sizes.groups // sizes.block,),
      in_specs=[smem, smem, hbm, hbm, hbm],
      out_specs=[hbm] * len(out),
      scratch_shapes=list(scratch.values()),
    ),
    input_output_aliases={scalars + 4: 1},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",),
      vmem_limit_bytes=int(VMEM_SHARE * target.vmem_bytes),
      has_side_effects=True,
      flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True},
    ),
    cost_estimate=cost,
    name="ragged_paged_attention",
  )


def _scratch(sizes: Layout, dtype, kept, return_lse: bool) -> dict[str, Any]:
  """Memory of the kernel, by its name in `Refs`."""
  block, width, align = sizes.block, sizes.width, sizes.align
  rows, new, lanes = sizes.largest.rows, sizes.largest.new, sizes.value_lanes
  few = sizes.classes[0].rows
  vmem = lambda dtype, *shape: pltpu.VMEM(shape, dtype)
  float32 = functools.partial(vmem, jnp.float32)
  found: dict[str, Any] = {
    "q_buffer": vmem(dtype, 2, block, rows, sizes.key_lanes),
    "new_buffer": vmem(dtype, 2, block, new, width),
    "keys": vmem(kept, 2, sizes.blocks, block, sizes.keys, sizes.lanes),
    "fresh": float32(sizes.blocks, block, new + 2 * sizes.unit, sizes.lanes),
    "stage": vmem(kept, block, new, width),
    "top": float32(block, few, pages.LANES),
    "total": float32(block, few, pages.LANES),
    "acc": float32(block, few, lanes),
    "top_columns": float32(block, 1, rows),
    "total_columns": float32(block, 1, rows),
    "acc_columns": float32(block, lanes, rows),
    "out_buffer": vmem(dtype, block, rows, lanes),
    "out_end": float32(block, align, lanes),
  }
  if return_lse:
    found["lse_buffer"] = float32(block, rows, pages.LANES)
    found["lse_end"] = float32(block, align, pages.LANES)
  found["slot"] = pltpu.SMEM((1,), jnp.int32)
  found["load_sems"] = found["key_sems"] = pltpu.SemaphoreType.DMA((2,))
  found["write_sem"] = found["out_sem"] = pltpu.SemaphoreType.DMA
  return found
