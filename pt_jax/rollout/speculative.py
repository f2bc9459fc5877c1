"""The launch that speculates: `programs.launch`, with k + 1 tokens read in every step.

Letters: those of `programs`; k proposals, H positions of a history.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kernels.flash_attention.reference import MASKED
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.rollout import cache as kv
from pt_jax.rollout import programs
from pt_jax.rollout.programs import Drawn, Rows
from pt_jax.rollout.proposals import Plan, accept, from_history
from pt_jax.rollout.sampling import Needs
from pt_jax.sharding import USE
from pt_jax.weights import Params

Caches = tuple[kv.View | kv.Pages, ...]  # of the model, and of the draft if there is one


@flax.struct.dataclass
class History:
  """The last tokens of the rows."""

  tokens: jax.Array  # [R, H] int32
  first: jax.Array  # [R] int32, position of the first of them


@flax.struct.dataclass
class Tally:
  """What a launch made of its proposals."""

  steps: jax.Array  # [R] int32, in which the row was active
  proposed: jax.Array  # [R] int32
  accepted: jax.Array  # [R] int32, proposals that belong to the sample


@functools.partial(jax.jit, static_argnames=("plan", "needs", "tokens", "limit"), donate_argnums=1)
def launch(
  w: tuple[Params, ...],
  caches: Caches,
  rows: Rows,
  history: History,
  steps: jax.Array,
  enough: jax.Array,
  few: jax.Array,
  *,
  plan: Plan,
  needs: Needs,
  tokens: int,
  limit: int,
) -> tuple[Caches, Drawn, Tally]:
  """Draws tokens until a row has `steps`, `enough` rows have ended or no part has more than `few`.

  Args:
    w: weights of `programs.use_layout`, of the model and of the draft if there is one.
    caches: as `programs.launch` has one; the draft's has the same rows and pages.
    rows: what is decoded, none of it under a mask. A table of pages has room for k tokens more.
    history: of the rows, with room for C more tokens.
    steps, enough, few: [] int32.
    plan: static, as what follows.
    needs: of all rows together.
    tokens: C, room for what is drawn.
    limit: positions are below it.
  """
  rows, history = jax.tree.map(kv.split, rows), jax.tree.map(kv.split, history)
  reach = limit + plan.tokens + 1
  angles = [decoder.rope_table(c, reach) for c in (plan.config, plan.draft) if c is not None]
  running, top = jnp.sum(rows.active), min(needs.top, plan.config.vocab_size)
  drawn = programs.nothing_drawn(len(rows.token), tokens, top)
  tally = Tally(*(jnp.zeros_like(drawn.count),) * 3)

  def unfinished(carry: Any) -> jax.Array:
    rows, _, _, drawn, _ = carry
    full = (rows.active & (drawn.count >= steps)).any()
    return ~full & programs.goes_on(rows, running, enough, few)

  def step(carry: Any) -> Any:
    rows, history, caches, drawn, tally = carry
    if plan.draft is None:
      proposals, found = _lookup(history, rows.position, plan)
    else:
      proposals, mirror = _sketch(w[1], caches[1], rows, angles[1], plan, needs)
      caches, found = (caches[0], mirror), rows.active
    chain = jnp.concatenate([rows.token[:, None], proposals], axis=1)
    places = rows.position[:, None] + jnp.arange(plan.tokens + 1)
    hidden, held = _read(w[0], chain, places, rows.table, caches[0], angles[0], plan.config)
    caches = (held, *caches[1:])
    found_tokens = _draw(w[0], hidden, rows, places + 1, needs)
    rows, history, drawn, tally = _commit(
      rows, history, drawn, tally, proposals, found, found_tokens, steps
    )
    return rows, history, caches, drawn, tally

  start = (rows, history, caches, drawn, tally)
  _, _, caches, drawn, tally = jax.lax.while_loop(unfinished, step, start)
  return caches, *programs.whole((drawn, tally))


def _by_rows(function: Any, *args: Any) -> Any:
  """A function of arrays [R, ...] on the rows of each device alone."""
  specs = jax.tree.map(lambda x: USE.spec("batch", *(None,) * (x.ndim - 1)), args)
  # Every result is [R, ...]: the spec of its first axis is enough.
  mapped = jax.shard_map(function, in_specs=specs, out_specs=USE.spec("batch"), check_vma=False)
  return mapped(*args)


def _lookup(history: History, position: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
  find = functools.partial(from_history, ngram=plan.ngram, count=plan.tokens)
  return _by_rows(lambda h, at: find(h.tokens, at - h.first), history, position)


def _sketch(
  w: Params, cache: Any, rows: Rows, table: decoder.Angles, plan: Plan, needs: Needs
) -> tuple[jax.Array, Any]:
  """k tokens [R, k] that the draft model draws one after the other, and its cache. It reads the
  last one, too: where all are accepted, its cache has no gap."""
  assert plan.draft is not None
  config, bare = plan.draft, dataclasses.replace(needs, top=0)

  def step(carry: Any, _: None) -> Any:
    rows, cache = carry
    hidden, cache = programs.read(w, rows, cache, table, config)
    position = rows.position + 1
    token = programs.draw_tokens(w, hidden, rows, position, bare)[0]
    return (dataclasses.replace(rows, token=token, position=position), cache), token

  (_, cache), tokens = jax.lax.scan(step, (rows, cache), None, length=plan.tokens + 1)
  return tokens[:-1].T, cache


def _read(
  w: Params,
  tokens: jax.Array,
  places: jax.Array,
  pages: jax.Array | None,
  cache: Any,
  table: decoder.Angles,
  c: ModelConfig,
) -> tuple[jax.Array, Any]:
  """Reads tokens [R, k + 1]: final hidden states [R, k + 1, width], and the cache that has them."""
  x = decoder.embed(w["embed"], tokens, jnp.dtype(c.compute_dtype))

  def attend(i: int) -> decoder.Attend:
    own = cache[i]
    if isinstance(own, kv.Rows):
      return attend_rows(c, own, places)
    assert pages is not None
    return kv.attend_pages(c, own, places[:, -1] + 1, pages)

  x, kept = programs.layers(w, c, x, decoder.rope_angles(table, places), attend)
  return x, tuple(kept)


def attend_rows(config: ModelConfig, own: kv.Rows, places: jax.Array) -> decoder.Attend:
  """`cache.attend_row` for several new tokens a row, each of which sees those before it.

  Args:
    config: the model.
    own: the layer.
    places: [R, C] int32, where the new tokens stand; what is past the view is not kept.
  """
  scale = config.head_dim**-0.5

  def local(q, k, v, keys, values, places):
    rows = jnp.arange(q.shape[0])[:, None]
    keys = keys.at[rows, :, :, places].set(k, mode="drop", unique_indices=True)
    values = values.at[rows, :, places].set(v, mode="drop", unique_indices=True)
    count, new, heads, width = q.shape
    q = (q * jnp.asarray(scale, q.dtype)).reshape(count, new, keys.shape[1], -1, width)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bsgrk,bgkt->bgrst", q, keys)
    seen = jnp.arange(keys.shape[3]) <= places[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED)).astype(v.dtype)
    out = jnp.einsum("bgrst,bgtk->bsgrk", weights, values)
    return out.reshape(count, new, heads, width), kv.Rows(keys, values)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array):
    heads = USE.spec("batch", None, "heads", None)
    kv_heads = USE.spec("batch", None, "kv_heads", None)
    held: Any = (kv.spec(), kv.spec())
    specs = (heads, kv_heads, kv_heads, *held, USE.spec("batch", None))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=(heads, kv.Rows(*held)))
    return mapped(q, k, v, own.keys, own.values, places)

  return attend


def _draw(w: Params, hidden: jax.Array, rows: Rows, places: jax.Array, needs: Needs) -> Any:
  """`programs.draw_tokens` at several places [R, C] of each row; what it returns is [R, C, ...]."""
  _, new, width = hidden.shape
  repeat = lambda x: jnp.repeat(x, new, axis=0)
  flat = lambda hidden, rows, places: (
    hidden.reshape(-1, width),
    jax.tree.map(repeat, rows),
    places.reshape(-1),
  )
  rows = dataclasses.replace(rows, table=None)
  hidden, rows, places = _by_rows(flat, hidden, rows, places)
  drawn = programs.draw_tokens(w, hidden, rows, places, needs)
  apart = lambda drawn: jax.tree.map(
    lambda x: x.reshape(x.shape[0] // new, new, *x.shape[1:]), drawn
  )
  return _by_rows(apart, drawn)


def _commit(
  rows: Rows,
  history: History,
  drawn: Drawn,
  tally: Tally,
  proposals: jax.Array,
  found: jax.Array,
  tokens: Any,
  steps: jax.Array,
) -> tuple[Rows, History, Drawn, Tally]:
  """Everything after a step, of which `tokens` is what `_draw` returned."""
  steps = jnp.broadcast_to(steps, rows.token.shape)
  steps = kv.split(steps)
  args = (rows, history, drawn, tally, proposals, found, tokens, steps)
  return _by_rows(_accepted, *args)


def _accepted(rows, history, drawn, tally, proposals, found, tokens, steps):
  token, logprob, (best, best_logprobs) = tokens
  row, offset = jnp.arange(len(token))[:, None], jnp.arange(token.shape[1])
  room = jnp.minimum(rows.end - 1 - rows.position, steps - drawn.count)
  count = jnp.where(rows.active, accept(proposals, token, rows.stop_tokens, room), 0)
  kept = offset < count[:, None]
  at = jnp.where(kept, drawn.count[:, None] + offset, drawn.tokens.shape[1])
  put = lambda into, x: into.at[row, at].set(x, mode="drop")
  agree = jnp.cumprod(proposals == token[:, :-1], axis=1).sum(1)
  one = rows.active.astype(jnp.int32)
  tally = Tally(
    tally.steps + one,
    tally.proposed + one * found * proposals.shape[1],
    tally.accepted + found * jnp.minimum(agree, count),
  )
  last = jnp.take_along_axis(token, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
  after = programs.advance(rows, last, rows.position + count)
  drawn = Drawn(
    put(drawn.tokens, token),
    put(drawn.logprobs, logprob),
    drawn.count + count,
    put(drawn.top_tokens, best),
    put(drawn.top_logprobs, best_logprobs),
  )
  # A row that has ended is read again and again in place: nothing of it may change.
  where = (rows.position - history.first)[:, None] + 1 + offset
  where = jnp.where(kept & after.active[:, None], where, history.tokens.shape[1])
  history = history.replace(tokens=history.tokens.at[row, where].set(token, mode="drop"))
  return after, history, drawn, tally
