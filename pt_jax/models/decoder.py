"""The dense decoder: Llama 3, Qwen 2.5 and Qwen 3 by `ModelConfig`. Plain trees in, arrays out.

Shape suffixes and einsum letters: B batch, S query position, T key position, D model width, H query
heads, G key/value heads, K head width, F MLP hidden units, V vocabulary, L layers.

`block` is the only implementation of a layer. It takes `attend`, so that training passes attention
over packed segments and the rollout engine passes attention over its cache.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.flash_attention import flash_attention
from pt_jax import weights
from pt_jax.models import remat
from pt_jax.models.config import Llama3Rope, ModelConfig
from pt_jax.models.layers import rms_norm, rotate, swiglu
from pt_jax.sharding import USE, Rules, chip
from pt_jax.weights import Param, Params, Table, project

# (q [B,S,H,K], k [B,S,G,K], v [B,S,G,K]) -> (out [B,S,H,K], what the caller keeps of this layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
Angles = tuple[jax.Array, jax.Array]  # cos and sin


def table(c: ModelConfig) -> Table:
  """Every parameter of the model; blocks are stacked on a leading `layer` axis."""
  d, h, g, k, f, v = c.width, c.heads, c.kv_heads, c.head_dim, c.hidden, c.vocab_size

  def matrix(fan_in: int, *shape_and_axes: tuple[int, str]) -> Param:
    shape, axes = zip(*shape_and_axes)
    return Param(shape, axes, std=fan_in**-0.5, decay=True)

  gain = lambda size: Param((size,), (None,), mean=1.0)
  block = {
    "attention_norm": gain(d),
    "q": matrix(d, (d, "embed"), (h, "heads"), (k, "head")),
    "k": matrix(d, (d, "embed"), (g, "kv_heads"), (k, "head")),
    "v": matrix(d, (d, "embed"), (g, "kv_heads"), (k, "head")),
    "o": matrix(h * k, (h, "heads"), (k, "head"), (d, "embed")),
    "mlp_norm": gain(d),
    "gate": matrix(d, (d, "embed"), (f, "hidden")),
    "up": matrix(d, (d, "embed"), (f, "hidden")),
    "down": matrix(f, (f, "hidden"), (d, "embed")),
  }
  # The two projections that write to the residual stream start smaller (GPT-2's 1 / sqrt(2 L)).
  for name in ("o", "down"):
    block[name] = block[name]._replace(std=block[name].std * (2 * c.layers) ** -0.5)
  if c.attention_bias:
    block["q_bias"] = Param((h, k), ("heads", "head"))
    block["k_bias"] = Param((g, k), ("kv_heads", "head"))
    block["v_bias"] = Param((g, k), ("kv_heads", "head"))
  if c.qk_norm:
    block["q_norm"] = gain(k)
    block["k_norm"] = gain(k)
  rows = {
    "embed": Param((v, d), ("vocab", "embed"), std=d**-0.5),
    "blocks": weights.map_table(lambda row: row.stack(c.layers), block),
    "final_norm": gain(d),
  }
  if not c.tied_embeddings:
    rows["unembed"] = Param((v, d), ("vocab", "embed"), std=d**-0.5)
  return rows


def rope_frequencies(c: ModelConfig) -> jax.Array:
  """[K/2] float32 angular frequencies theta^(-2i/K), stretched as `c.rope_scaling` says."""
  frequency = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
  scaling = c.rope_scaling
  return frequency if scaling is None else _llama3_frequencies(frequency, scaling)


def _llama3_frequencies(frequency: jax.Array, s: Llama3Rope) -> jax.Array:
  """Wavelengths over L/low are divided by `factor`, under L/high kept, interpolated in between."""
  turns = s.original_length * frequency / (2 * math.pi)  # turns within the original context
  share = (turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
  keep = jnp.clip(share, 0.0, 1.0)
  return frequency * (keep + (1 - keep) / s.factor)


def rope_table(c: ModelConfig, limit: int) -> Angles:
  """cos and sin [limit, K/2] float32 of the rotary angles at positions 0, 1, ... limit - 1.

  Angles are looked up: where they are computed in place, XLA does so again in every fusion of every
  layer.
  """
  turns = jnp.arange(limit, dtype=jnp.float32)[:, None] * rope_frequencies(c)
  return jnp.cos(turns), jnp.sin(turns)


def rope_angles(table: Angles, positions: jax.Array) -> Angles:
  """Rows of `rope_table` as [B, S, 1, K/2] for positions [B, S]; past its limit they are NaN."""
  where = jax.P(*jax.typeof(positions).sharding.spec, None)
  cos, sin = (x.at[positions].get(mode="fill", out_sharding=where)[:, :, None] for x in table)
  return cos, sin


def block(
  x: jax.Array, w: Params, c: ModelConfig, angles: Angles, attend: Attend
) -> tuple[jax.Array, Any]:
  """One layer. x [B, S, D] -> ([B, S, D], what `attend` kept of this layer)."""
  act = USE.spec("batch", "seq", "embed")
  y = rms_norm(x, w["attention_norm"], c.norm_epsilon)
  q, k, v = (project(y, w[name], "bsd,dhk->bshk") for name in ("q", "k", "v"))
  if c.attention_bias:
    q, k, v = (z + w[f"{n}_bias"].astype(z.dtype) for n, z in (("q", q), ("k", k), ("v", v)))
  if c.qk_norm:
    q = rms_norm(q, w["q_norm"], c.norm_epsilon)
    k = rms_norm(k, w["k_norm"], c.norm_epsilon)
  q, k, v = remat.named(remat.HEADS, rotate(q, *angles), rotate(k, *angles), v)
  out, kept = attend(q, k, v)
  x = x + project(out, w["o"], "bshk,hkd->bsd", out_sharding=act)
  y = rms_norm(x, w["mlp_norm"], c.norm_epsilon)
  gated = swiglu(
    *remat.named(remat.MLP, *(project(y, w[name], "bsd,df->bsf") for name in ("gate", "up")))
  )
  return x + project(gated, w["down"], "bsf,fd->bsd", out_sharding=act), kept


def embed(table_vd: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rows of the embedding table, from where it is stored: tokens [B, S] -> [B, S, D]. Every shard
  of the vocabulary looks up what it owns, and the rest is zero until the sum."""
  table_vd = _split_vocabulary(table_vd)
  stored = jax.typeof(table_vd).sharding.spec

  def local(rows: jax.Array, ids: jax.Array) -> jax.Array:
    rows = weights.whole(rows, stored, dtype).astype(dtype)
    ids = ids - jax.lax.axis_index("tensor") * rows.shape[0]
    mine = (ids >= 0) & (ids < rows.shape[0])
    found = rows[jnp.clip(ids, 0, rows.shape[0] - 1)]
    return jax.lax.psum(jnp.where(mine[..., None], found, 0), "tensor")

  out = USE.spec("batch", "seq", "embed")
  mapped = jax.shard_map(local, in_specs=(stored, USE.spec("batch", "seq")), out_specs=out)
  return mapped(table_vd, tokens)


def attention_ids(segment_ids: jax.Array, prefix_ids: jax.Array) -> jax.Array:
  """Whose keys are whose: a shared prompt, which is in no segment of the batch, is one here."""
  return jnp.where(segment_ids < 0, prefix_ids, segment_ids)


def attend_packed(
  c: ModelConfig, segment_ids: jax.Array, prefix_ids: jax.Array | None = None
) -> Attend:
  """Training attention: causal within the segments of a row, and of each to its prefix. Keys are
  gathered over `context`."""
  if prefix_ids is not None:
    segment_ids = attention_ids(segment_ids, prefix_ids)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    queries, keys = (
      USE.spec("batch", "seq", "heads", None),
      USE.spec("batch", None, "kv_heads", None),
    )
    row, whole_row = USE.spec("batch", "seq"), USE.spec("batch", None)

    def local(q, k, v, q_segments, k_segments, q_prefixes=None):
      split = jax.lax.axis_size("context") > 1
      return flash_attention(
        q,
        k,
        v,
        q_segments=q_segments,
        k_segments=k_segments,
        q_prefixes=q_prefixes,
        q_offset=jax.lax.axis_index("context") * q.shape[1] if split else 0,
        scale=c.head_dim**-0.5,
        chip=chip(),
      )

    k, v = jax.reshard(k, keys), jax.reshard(v, keys)
    ids = (segment_ids, jax.reshard(segment_ids, whole_row))
    specs = (queries, keys, keys, row, whole_row)
    if prefix_ids is not None:
      ids, specs = (*ids, prefix_ids), (*specs, row)
    return jax.shard_map(local, in_specs=specs, out_specs=queries)(q, k, v, *ids), None

  return attend


def forward(
  params: Params,
  c: ModelConfig,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  prefix_ids: jax.Array | None = None,
) -> jax.Array:
  """Final hidden states (after the last norm) of packed rows.

  Args:
    params: tree of `table(c)`, anywhere: each block is gathered to where it is used.
    c: the model's configuration.
    tokens, positions, segment_ids: [B, S] int32, see `pt_jax.data.batch`. A position that is not
      below S gives NaN.
    prefix_ids: [B, S] int32 where segments share prefixes, see `PolicyBatch`.

  Returns:
    [B, S, D] in the compute dtype. `models.logprobs` turns them into log-probs.
  """
  rows = table(c)
  x = embed(params["embed"], tokens, jnp.dtype(c.compute_dtype))
  angles = rope_angles(rope_table(c, tokens.shape[1]), positions)
  attend = attend_packed(c, segment_ids, prefix_ids)
  block_rows = weights.map_table(Param.unstack, rows["blocks"])

  def layer(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
    return block(x, weights.gather(w, block_rows, USE, x.dtype), c, angles, attend)

  layer = remat.remember(layer, c.remat, prevent_cse=c.unroll)
  x, _ = jax.lax.scan(layer, x, params["blocks"], unroll=c.layers if c.unroll else 1)
  return rms_norm(x, params["final_norm"], c.norm_epsilon)


def unembedding(params: Params, c: ModelConfig) -> jax.Array:
  """The output matrix [V, D], gathered to where it is used: for many uses without a gradient."""
  return weights.reshard(stored_unembedding(params, c), table(c)[_output(c)], USE)


def stored_unembedding(params: Params, c: ModelConfig) -> jax.Array:
  """The output matrix [V, D] where it is stored along D; `models.logprobs` gathers it."""
  return _split_vocabulary(params[_output(c)])


def _split_vocabulary(w: jax.Array) -> jax.Array:
  """A matrix [V, D] with V where it is used. Parameters in a layout of `sharding.zero` are so."""
  return jax.reshard(w, jax.P(USE.spec("vocab")[0], *jax.typeof(w).sharding.spec[1:]))


def _output(c: ModelConfig) -> str:
  return "embed" if c.tied_embeddings else "unembed"


def init(key: jax.Array, c: ModelConfig, rules: Rules) -> Params:
  """Random parameters living where `rules` say; call it under `jit` inside `jax.set_mesh`."""
  return weights.init(key, table(c), rules, jnp.dtype(c.param_dtype))
