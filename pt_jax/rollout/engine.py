"""The rollout engine: prompts to completions, on the blocks of the training model.

Completions are decoded in N slots at once. A slot whose completion ends is given the next request,
so short answers do not wait for long ones. Every request draws from its own key, folded with the
position, so what it samples does not depend on which slot it sat in or what sat beside it.

The host sees a slot only between launches; a launch decodes until enough slots are free to be worth
a refill, or `LAUNCH` tokens have been drawn. Stop tokens and limits are checked on the device, stop
strings on the host.

Left out on purpose: pages, prefix caching and chunked prefill. A prompt of n samples is prefilled
once per refill. The paged engine keeps this interface.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import weights
from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.models.layers import rms_norm
from pt_jax.rollout import cache as kv
from pt_jax.rollout.rollouts import Detokenizer, Rollouts, SamplingParams
from pt_jax.rollout.sampling import sample
from pt_jax.rollout.schedule import Drawn, Fill, Schedule
from pt_jax.sharding import USE, P
from pt_jax.weights import Params

LAUNCH = 64  # tokens per slot and launch at most


@flax.struct.dataclass
class Slots:
  """What the device knows of the N completions in flight."""

  cache: kv.Cache
  token: jax.Array  # [N] int32, drawn and not yet read
  position: jax.Array  # [N] int32, where that token stands
  end: jax.Array  # [N] int32, position that a completion may not reach
  request: jax.Array  # [N] int32, folded into the key
  active: jax.Array  # [N] bool


@dataclasses.dataclass
class EngineFigures:
  """Counters since the engine was made."""

  generated: int = 0  # tokens drawn
  prefilled: int = 0  # prompt tokens computed
  launches: int = 0
  seconds: float = 0.0  # in `generate`


class Engine:
  """Generates completions under the weights given last."""

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    slots: int,
    max_length: int,
    detokenizer: Callable[[], Detokenizer] | None = None,
    version: int = 0,
  ):
    """Call it, and everything else, inside `jax.set_mesh`.

    Args:
      config: of the model.
      params: of `decoder.table(config)`, wherever the trainer keeps them.
      slots: completions decoded at once; a multiple of the mesh's batch axes.
      max_length: tokens that a prompt and its completion may have together.
      detokenizer: makes an object with `push(token) -> str`; needed for stop strings.
      version: of the weights.
    """
    self.config, self.slots, self.max_length = config, slots, max_length
    self.figures = EngineFigures()
    self._detokenizer = detokenizer
    self._prepare = jax.jit(functools.partial(_use_layout, config=config))
    self.update(params, version)

  def update(self, params: Params, version: int) -> None:
    """Takes new weights: a reshard from where the trainer keeps them to where they are used."""
    self._weights = self._prepare(params)
    self.version = version

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    key: jax.Array,
    n: int = 1,
  ) -> Rollouts:
    """n completions of every prompt; row i * n + j is sample j of prompt i.

    Args:
      prompts: token ids, each at least one.
      sampling: how to draw, and when to stop.
      key: PRNG key; the same key, weights and prompts give the same completions.
      n: completions per prompt.

    Raises ValueError for no prompts, an empty prompt, one that leaves no room for a token, or stop
    strings without a detokenizer.
    """
    self._check(prompts, sampling, n)
    start = time.perf_counter()
    schedule = Schedule(
      prompts,
      sampling,
      n,
      slots=self.slots,
      max_length=self.max_length,
      row_multiple=_batch_parts(),
      detokenizer=self._detokenizer,
    )
    state = _empty_slots(self.config, self.slots, schedule.length)
    stop_tokens = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)
    options = dataclasses.replace(sampling, max_tokens=1, stop_tokens=(), stop_strings=())
    while schedule.unfinished:
      if (fill := schedule.seat()) is not None:
        state = _prefill(self._weights, state, fill, config=self.config)
      state, drawn = _launch(
        self._weights,
        state,
        schedule.free,
        np.int32(schedule.enough),
        key,
        stop_tokens,
        config=self.config,
        options=options,
      )
      schedule.collect(jax.device_get(drawn), self.version)
      self.figures.launches += 1
    self.figures.prefilled += schedule.prefilled
    self.figures.generated += sum(len(r.tokens) for r in schedule.requests)
    self.figures.seconds += time.perf_counter() - start
    return schedule.rollouts()

  def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int) -> None:
    if not prompts or n < 1:
      raise ValueError(f"generate: expected prompts and n >= 1, found {len(prompts)} and n = {n}")
    if sampling.stop_strings and self._detokenizer is None:
      raise ValueError("generate: stop strings need an engine with a detokenizer")
    if sampling.constraint or sampling.top_logprobs:
      raise ValueError("generate: this engine knows no constraint and no top_logprobs")
    for i, prompt in enumerate(prompts):
      if not 0 < len(prompt) < self.max_length:
        raise ValueError(
          f"generate: prompt {i} has {len(prompt)} tokens, expected 1 to {self.max_length - 1} "
          "(the engine's max_length, less one to draw)"
        )


def _batch_parts() -> int:
  mesh = jax.sharding.get_abstract_mesh().shape
  return mesh["data"] * mesh["expert"]


def _use_layout(params: Params, *, config: ModelConfig) -> Params:
  """Parameters where they are used, blocks as a list of layers, matrices in the compute dtype."""
  table = decoder.table(config)
  rows = {"embed": table["embed"], "final_norm": table["final_norm"]}
  top = {name: weights.reshard(params[name], row, USE) for name, row in rows.items()}
  top["unembed"] = decoder.unembedding(params, config)
  whole = weights.reshard(params["blocks"], table["blocks"], USE)
  layer = lambda i: jax.tree.map(lambda w: w[i], whole)
  return top | {"blocks": [layer(i) for i in range(config.layers)]}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_slots(config: ModelConfig, slots: int, length: int) -> Slots:
  zeros = lambda dtype: jnp.zeros(slots, dtype, out_sharding=USE.spec("batch"))
  return Slots(
    cache=kv.empty(config, slots, length),
    token=zeros(jnp.int32),
    position=zeros(jnp.int32),
    end=zeros(jnp.int32),
    request=zeros(jnp.int32),
    active=zeros(bool),
  )


def _draw(w, hidden, request, position, key, options: SamplingParams):
  """Logits of hidden [N, D], and a token of each row, drawn by the key of (request, position)."""
  logits = jnp.einsum(
    "nd,vd->nv", hidden, w["unembed"].astype(hidden.dtype), preferred_element_type=jnp.float32
  )

  def local(logits, request, position, key_data):
    own = lambda r, p: jax.random.fold_in(
      jax.random.fold_in(jax.random.wrap_key_data(key_data), r), p
    )
    return sample(logits, jax.vmap(own)(request, position), options)

  row = USE.spec("batch")
  specs = (USE.spec("batch", None), row, row, P(None))
  logits = jax.reshard(logits, specs[0])
  mapped = jax.shard_map(local, in_specs=specs, out_specs=(row, row), check_vma=False)
  return mapped(logits, request, position, jax.random.key_data(key))


def _layers(w: Params, c: ModelConfig, x: jax.Array, angles: Any, attend: Any) -> Any:
  """All blocks, one after the other; `attend(i)` is the attention of layer i."""
  kept = []
  for i, layer in enumerate(w["blocks"]):
    x, own = decoder.block(x, layer, c, angles, attend(i))
    kept.append(own)
  return rms_norm(x, w["final_norm"], c.norm_epsilon), kept


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def _prefill(w: Params, state: Slots, fill: Fill, *, config: ModelConfig) -> Slots:
  """Reads the prompts of a refill and seats them. A slot begins with its last prompt token unread:
  the next launch reads it (its keys are then written a second time) and draws what follows."""
  tokens = jax.reshard(fill.tokens, USE.spec("batch", "seq"))
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  positions = jax.reshard(index, USE.spec("batch", "seq"))
  length = jax.reshard(fill.length, USE.spec("batch"))
  segments = jnp.where(positions < length[:, None], 0, -1)
  packed = decoder.attend_packed(config, segments)

  def attend(_: int) -> decoder.Attend:
    return lambda q, k, v: (packed(q, k, v)[0], (k, v))

  x = decoder.embed(w["embed"], tokens, jnp.dtype(config.compute_dtype))
  angles = decoder.rope_angles(decoder.rope_table(config, tokens.shape[1]), positions)
  _, kept = _layers(w, config, x, angles, attend)
  slot = lambda x: jax.reshard(x, USE.spec("batch"))
  source, begins = slot(fill.source), slot(fill.source) >= 0
  last = fill.length - 1
  row = jnp.maximum(fill.source, 0)
  token = slot(fill.tokens[row, last[row]])
  take = lambda new, old: jnp.where(begins, new, old)
  inserted = [kv.insert(state.cache, i, new, source) for i, new in enumerate(kept)]
  return Slots(
    cache=kv.Cache(*zip(*inserted)),
    token=take(token, state.token),
    position=take(slot(last[row]), state.position),
    end=take(slot(fill.end), state.end),
    request=take(slot(fill.request), state.request),
    active=state.active | begins,
  )


@functools.partial(jax.jit, static_argnames=("config", "options"), donate_argnums=1)
def _launch(
  w: Params,
  state: Slots,
  gone: jax.Array,
  enough: jax.Array,
  key: jax.Array,
  stop_tokens: jax.Array,
  *,
  config: ModelConfig,
  options: SamplingParams,
) -> tuple[Slots, Drawn]:
  """Draws up to LAUNCH tokens per active slot, until `enough` slots are free.

  Args:
    w: weights of `_use_layout`.
    state: the slots.
    gone: [N] bool, slots that the host has freed.
    enough: [] int32, free slots at which to return.
    key: PRNG key of this `generate`.
    stop_tokens: [K] int32.
    config: the model. Static.
    options: how to draw. Static.
  """
  slots = state.token.shape[0]
  zeros = lambda dtype: jnp.zeros((slots, LAUNCH), dtype, out_sharding=USE.spec("batch", None))
  count = jnp.zeros(slots, jnp.int32, out_sharding=USE.spec("batch"))
  gone = jax.reshard(gone, USE.spec("batch"))
  state = dataclasses.replace(state, active=state.active & ~gone)
  table = decoder.rope_table(config, state.cache.values[0].shape[2])
  start = (jnp.int32(0), state, Drawn(zeros(jnp.int32), zeros(jnp.float32), count))

  def unfinished(carry: tuple[jax.Array, Slots, Drawn]) -> jax.Array:
    step, state, _ = carry
    return (step < LAUNCH) & (jnp.sum(~state.active) < enough)

  def step(carry: tuple[jax.Array, Slots, Drawn]) -> tuple[jax.Array, Slots, Drawn]:
    i, state, drawn = carry
    hidden, cache = _read(w, state, table, config)
    position = state.position + 1
    token, logprob = _draw(w, hidden, state.request, position, key, options)
    put = lambda into, x: into.at[:, i].set(jnp.where(state.active, x, 0))
    drawn = Drawn(
      put(drawn.tokens, token),
      put(drawn.logprobs, logprob),
      drawn.count + state.active.astype(jnp.int32),
    )
    ends = (token[:, None] == stop_tokens).any(-1) | (position + 1 >= state.end)
    go_on = state.active & ~ends
    state = dataclasses.replace(
      state,
      cache=cache,
      token=jnp.where(go_on, token, state.token),
      position=jnp.where(go_on, position, state.position),
      active=go_on,
    )
    return i + 1, state, drawn

  _, state, drawn = jax.lax.while_loop(unfinished, step, start)
  whole = lambda x: jax.reshard(x, P(*(None,) * x.ndim))  # every host reads every token
  return state, jax.tree.map(whole, drawn)


def _read(
  w: Params, state: Slots, table: decoder.Angles, c: ModelConfig
) -> tuple[jax.Array, kv.Cache]:
  """Reads the token of every slot: final hidden states [N, D] and the cache that now holds it."""
  tokens, positions = state.token[:, None], state.position[:, None]
  x = decoder.embed(w["embed"], tokens, jnp.dtype(c.compute_dtype))

  def attend(i: int) -> decoder.Attend:
    return kv.attend_cached(c, state.cache.keys[i], state.cache.values[i], state.position)

  x, kept = _layers(w, c, x, decoder.rope_angles(table, positions), attend)
  return x[:, 0], kv.Cache(*zip(*kept))
