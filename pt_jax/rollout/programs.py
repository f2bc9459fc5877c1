"""What the engine compiles: prefill, which computes pieces of sequences, the launch, which draws,
and what moves keys and values between pages and the view (`cache`).

Letters: D parts of the batch axes, S tokens of a prefill in each part, N sequences of each part, P
pages of a sequence, R rows of a launch (of all parts, one part after the other), C tokens per row
that a launch may draw, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.layers import rms_norm
from pt_jax.rollout import cache as kv
from pt_jax.rollout.sampling import Needs, draw
from pt_jax.sharding import USE, P
from pt_jax.weights import Params


@flax.struct.dataclass
class Chunk:
  """Pieces of sequences, laid one behind the other."""

  tokens: jax.Array  # [D, S] int32
  positions: jax.Array  # [D, S] int32
  lengths: jax.Array  # [D, N] int32, tokens of each sequence, those of the chunk included
  table: jax.Array  # [D, N, P] int32, pages within the part
  starts: jax.Array  # [D, N + 1] int32, first token of each sequence in the chunk


@flax.struct.dataclass
class Rows:
  """What a launch knows of its rows."""

  token: jax.Array  # [R] int32, drawn and not yet read
  position: jax.Array  # [R] int32, where that token stands
  end: jax.Array  # [R] int32, position that no token may reach now
  active: jax.Array  # [R] bool
  key: jax.Array  # [R, ...] uint32, data of PRNG keys
  number: jax.Array  # [R] int32, folded into the key
  temperature: jax.Array  # [R] float32, as what follows see `SamplingParams`
  top_k: jax.Array  # [R] int32
  top_p: jax.Array  # [R] float32
  min_p: jax.Array  # [R] float32
  stop_tokens: jax.Array  # [R, any] int32, -1 for none
  table: jax.Array | None  # [R, P] int32, pages of the part; None where a launch has a view
  allowed: jax.Array | None  # [R, V / 32] uint32, see `guides`


@flax.struct.dataclass
class Drawn:
  """Tokens of one launch; entries past `count` are 0."""

  tokens: jax.Array  # [R, C] int32
  logprobs: jax.Array  # [R, C] float32
  count: jax.Array  # [R] int32
  top_tokens: jax.Array  # [R, C, any] int32, the most likely ones
  top_logprobs: jax.Array  # [R, C, any] float32


def use_layout(params: Params, *, config: ModelConfig) -> Params:
  """Parameters where they are used, blocks as a list of layers. Matrices are in the compute dtype,
  in which every step reads them; gains of norms, which are used in float32, stay."""
  table = decoder.table(config)
  matrix = lambda row: any(axis not in (None, "layer") for axis in row.axes)
  cast = lambda row, w: w.astype(config.compute_dtype) if matrix(row) else w
  params = weights.map_table(cast, table, params)
  rows = {name: row for name, row in table.items() if name != "blocks"}
  top = {name: weights.reshard(params[name], row, USE) for name, row in rows.items()}
  whole = weights.reshard(params["blocks"], table["blocks"], USE)
  layer = lambda i: jax.tree.map(lambda w: w[i], whole)
  return top | {"blocks": [layer(i) for i in range(config.layers)]}


prepare = jax.jit(use_layout, static_argnames="config")
# See the functions of `cache`.
empty_pages = jax.jit(kv.empty, static_argnums=(0, 1, 2))
resize = jax.jit(kv.resize, static_argnums=(0, 3))
seat = jax.jit(kv.seat, static_argnums=0, donate_argnums=1)
store = jax.jit(kv.store, static_argnums=0, donate_argnums=1)
copy = jax.jit(kv.copy, donate_argnums=0)


def layers(w: Params, c: ModelConfig, x: jax.Array, angles: Any, attend: Any) -> Any:
  """All blocks, one after the other; `attend(i)` is the attention of layer i."""
  kept = []
  for i, layer in enumerate(w["blocks"]):
    x, own = decoder.block(x, layer, c, angles, attend(i))
    kept.append(own)
  return rms_norm(x, w["final_norm"], c.norm_epsilon), kept


@functools.partial(jax.jit, static_argnames=("config", "limit"), donate_argnums=1)
def prefill(
  w: Params, pages: kv.Pages, chunk: Chunk, *, config: ModelConfig, limit: int
) -> kv.Pages:
  """Computes keys and values of a chunk and writes them into its pages.

  Args:
    w: weights of `use_layout`.
    pages: of all sequences.
    chunk: what is computed.
    config: the model. Static.
    limit: positions are below it. Static.
  """
  tokens, positions = (
    jax.reshard(x, USE.spec("batch", "seq")) for x in (chunk.tokens, chunk.positions)
  )
  places = [kv.split(x) for x in (chunk.lengths, chunk.table, chunk.starts)]
  attend = lambda i: kv.attend_pages(config, pages[i], *places)
  x = decoder.embed(w["embed"], tokens, jnp.dtype(config.compute_dtype))
  angles = decoder.rope_angles(decoder.rope_table(config, limit), positions)
  _, kept = layers(w, config, x, angles, attend)
  return tuple(kept)


def draw_tokens(w: Params, hidden: jax.Array, rows: Rows, position: jax.Array, needs: Needs):
  """Logits of hidden [R, width], and a token of each row, drawn by its key folded with where the
  token will stand. Returns what `sampling.draw` does."""
  matrix = w.get("unembed", w["embed"])  # one of both where they are tied
  logits = jnp.einsum(
    "nd,vd->nv", hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
  vocab_size = logits.shape[1]

  def local(logits, rows, position):
    own = lambda key, number, at: jax.random.fold_in(
      jax.random.fold_in(jax.random.wrap_key_data(key), number), at
    )
    keys = jax.vmap(own)(rows.key, rows.number, position)
    allowed = None if rows.allowed is None else unpack(rows.allowed, vocab_size)
    return draw(logits, keys, rows, needs, allowed)

  row, wide = USE.spec("batch"), USE.spec("batch", None)
  specs = jax.tree.map(lambda x: USE.spec("batch", *(None,) * (x.ndim - 1)), rows)
  logits = jax.reshard(logits, wide)
  out = (row, row, (wide, wide))
  mapped = jax.shard_map(local, in_specs=(wide, specs, row), out_specs=out, check_vma=False)
  return mapped(logits, rows, position)


def unpack(bits: jax.Array, vocab_size: int) -> jax.Array:
  """[R, V] bool from masks [R, V / 32] uint32: bit t % 32 of word t // 32 is token t."""
  shifted = bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)
  return (shifted & 1).astype(bool).reshape(bits.shape[0], -1)[:, :vocab_size]


@functools.partial(
  jax.jit, static_argnames=("config", "needs", "tokens", "limit"), donate_argnums=1
)
def launch(
  w: Params,
  cache: kv.View | kv.Pages,
  rows: Rows,
  steps: jax.Array,
  enough: jax.Array,
  few: jax.Array,
  *,
  config: ModelConfig,
  needs: Needs,
  tokens: int,
  limit: int,
) -> tuple[kv.View | kv.Pages, Drawn]:
  """Draws up to `steps` tokens per active row, until `enough` of these rows have ended or no part
  has more than `few` left.

  Args:
    w: weights of `use_layout`.
    cache: pages of all sequences where `rows` has a table of them, else the view.
    rows: what is decoded. Those that are not active are read again and again in place: where no
      sample sits, the table names a page that no other has.
    steps: [] int32, at most `tokens`.
    enough, few: [] int32.
    config: the model. Static.
    needs: of all rows together. Static.
    tokens: C, room for what is drawn. Static.
    limit: positions are below it. Static.
  """
  rows = jax.tree.map(kv.split, rows)
  table = decoder.rope_table(config, limit)
  empty = nothing_drawn(len(rows.token), tokens, min(needs.top, config.vocab_size))
  running = jnp.sum(rows.active)

  def unfinished(carry: Any) -> jax.Array:
    step, rows, _, _ = carry
    return (step < steps) & goes_on(rows, running, enough, few)

  def step(carry: Any) -> Any:
    i, rows, cache, drawn = carry
    hidden, cache = read(w, rows, cache, table, config)
    position = rows.position + 1
    token, logprob, best = draw_tokens(w, hidden, rows, position, needs)
    put = lambda into, x: into.at[:, i].set(
      jnp.where(rows.active.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    )
    drawn = Drawn(
      put(drawn.tokens, token),
      put(drawn.logprobs, logprob),
      drawn.count + rows.active.astype(jnp.int32),
      put(drawn.top_tokens, best[0]),
      put(drawn.top_logprobs, best[1]),
    )
    return i + 1, advance(rows, token, position), cache, drawn

  start = (jnp.int32(0), rows, cache, empty)
  _, _, cache, drawn = jax.lax.while_loop(unfinished, step, start)
  return cache, whole(drawn)


def nothing_drawn(count: int, tokens: int, top: int) -> Drawn:
  """Room for `tokens` of each of R rows, and for the `top` most likely in the place of each."""

  def zeros(dtype: Any, *more: int) -> jax.Array:
    where = USE.spec("batch", *(None,) * len(more))
    return jnp.zeros((count, *more), dtype, out_sharding=where)

  ints, floats = functools.partial(zeros, jnp.int32), functools.partial(zeros, jnp.float32)
  return Drawn(ints(tokens), floats(tokens), ints(), ints(tokens, top), floats(tokens, top))


def goes_on(rows: Rows, running: jax.Array, enough: jax.Array, few: jax.Array) -> jax.Array:
  """Whether fewer than `enough` of the `running` rows have ended and a part has more than `few`."""
  left = jnp.sum(rows.active.reshape(kv.parts(), -1), 1)
  return (running - jnp.sum(left) < enough) & (jnp.max(left) > few)


def advance(rows: Rows, token: jax.Array, position: jax.Array) -> Rows:
  """The active rows with the token [R] that now is their last one, at `position` [R]; one that ends
  with it stays as it was and is active no more."""
  ends = (token[:, None] == rows.stop_tokens).any(-1) | (position + 1 >= rows.end)
  go_on = rows.active & ~ends
  return dataclasses.replace(
    rows,
    token=jnp.where(go_on, token, rows.token),
    position=jnp.where(go_on, position, rows.position),
    active=go_on,
  )


def whole(tree: Any) -> Any:
  """Arrays that every host can read."""
  return jax.tree.map(lambda x: jax.reshard(x, P(*(None,) * x.ndim)), tree)


def read(
  w: Params, rows: Rows, cache: kv.View | kv.Pages, table: decoder.Angles, c: ModelConfig
) -> tuple[jax.Array, kv.View | kv.Pages]:
  """Reads the token of every row: final hidden states [R, width], and the cache that now has it."""
  tokens, positions = rows.token[:, None], rows.position[:, None]
  x = decoder.embed(w["embed"], tokens, jnp.dtype(c.compute_dtype))

  def attend(i: int) -> decoder.Attend:
    own = cache[i]
    if isinstance(own, kv.Rows):
      return kv.attend_row(c, own, rows.position)
    assert rows.table is not None
    return kv.attend_pages(c, own, rows.position + 1, rows.table)

  x, kept = layers(w, c, x, decoder.rope_angles(table, positions), attend)
  return x[:, 0], tuple(kept)
