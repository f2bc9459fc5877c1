"""Packed rows to try attention on, and attention written in NumPy, one query and head at a time."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
  """Shapes and features of one call."""

  batch: int = 2
  queries: int = 40
  keys: int = 40
  heads: int = 4
  groups: int = 2
  width: int = 8
  value_width: int = 8
  offset: int = 0
  causal: bool = True
  window: int | None = None
  soft_cap: float | None = None
  sinks: bool = False
  shared: bool = False  # segments continue shared prefixes; a window measures by position

  @property
  def features(self) -> dict:
    """The keyword arguments of the call that are not arrays."""
    names = ("causal", "window", "soft_cap")
    return {name: getattr(self, name) for name in names} | {"scale": self.width**-0.5}


class Data(NamedTuple):
  """One call's arrays, and the cotangents of its outputs."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  sinks: np.ndarray | None
  q_segments: np.ndarray
  k_segments: np.ndarray
  d_out: np.ndarray
  d_lse: np.ndarray
  q_prefixes: np.ndarray | None = None
  positions: tuple[np.ndarray, np.ndarray] | None = None


def segment_rows(batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
  """[B, T] int32: row 0 holds segments and padding behind and between them, the last of several
  rows is padding alone, others are one segment."""
  rows = np.zeros((batch, length), np.int32)
  cuts = np.sort(rng.choice(np.arange(1, length), min(4, length - 1), replace=False))
  rows[0] = np.searchsorted(cuts, np.arange(length), side="right")
  rows[0][rows[0] == 2] = -1
  rows[0][rows[0] == 4] = -3
  if batch > 1:
    rows[-1] = -1
  return rows


def shared_rows(batch: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
  """Segments, prefixes and positions [B, T] int32 of rows that hold a prefix and its three
  continuations, a segment of its own, padding, and a prefix with one."""
  prefix_of = np.array([0, 0, 0, 0, -1, -1, 6, 6])
  rows = []
  for _ in range(batch):
    cuts = np.sort(rng.choice(np.arange(1, length), 7, replace=False))
    ids = np.searchsorted(cuts, np.arange(length), side="right")
    starts = np.concatenate([[0], cuts])
    lengths = np.diff([*starts, length])
    after = np.where(prefix_of == np.arange(8), 0, np.where(prefix_of < 0, 0, lengths[prefix_of]))
    positions = np.arange(length) - starts[ids] + after[ids]
    rows.append((np.where(ids == 5, -1, ids), prefix_of[ids], positions))
  segments, prefixes, positions = np.asarray(rows, np.int32).swapaxes(0, 1)
  return segments, prefixes, positions


def data(case: Case, seed: int = 0) -> Data:
  """Random arrays, of scores wide enough that a soft cap of 2 and sinks matter."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  b, s, t, h, g = case.batch, case.queries, case.keys, case.heads, case.groups
  length = max(t, case.offset + s)
  segments, shared = segment_rows(b, length, rng), {}
  mine = lambda x: x[:, case.offset : case.offset + s]
  if case.shared:
    segments, prefixes, at = shared_rows(b, length, rng)
    shared["q_prefixes"] = mine(prefixes)
    shared["positions"] = None if case.window is None else (mine(at), at[:, :t])
  return Data(
    q=2 * normal(b, s, h, case.width),
    k=normal(b, t, g, case.width),
    v=normal(b, t, g, case.value_width),
    sinks=normal(h) if case.sinks else None,
    q_segments=mine(segments),
    k_segments=segments[:, :t],
    d_out=normal(b, s, h, case.value_width),
    d_lse=normal(b, s, h),
    **shared,
  )


def numpy_attention(case: Case, x: Data) -> tuple[np.ndarray, np.ndarray]:
  """out and lse of one query and head at a time, in float64."""
  b, s, h = x.q.shape[:3]
  out = np.zeros((b, s, h, case.value_width))
  lse = np.full((b, s, h), -1e30)
  for i, row, head in np.ndindex(b, s, h):
    group, place = head // (case.heads // case.groups), case.offset + row
    last = place + 1 if case.causal else case.keys
    ids = {x.q_segments[i, row], -1 if x.q_prefixes is None else x.q_prefixes[i, row]} - {-1, -3}
    q_at, k_at = (place, np.arange(case.keys))
    if x.positions is not None:
      q_at, k_at = x.positions[0][i, row], x.positions[1][i]
    window = 1 << 30 if case.window is None else case.window
    may = range(min(last, case.keys))
    mine = [t for t in may if x.k_segments[i, t] in ids and q_at - k_at[t] < window]
    scores = x.k[i, mine, group].astype(np.float64) @ x.q[i, row, head] / math.sqrt(case.width)
    if case.soft_cap is not None:
      scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    if mine or case.sinks:
      sink = [x.sinks[head]] if case.sinks else []
      lse[i, row, head] = np.log(np.sum(np.exp([*scores, *sink])))
      out[i, row, head] = np.exp(scores - lse[i, row, head]) @ x.v[i, mine, group]
  return out, lse


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(attend, case, options, gradients, x: Data, offset):
  def total(q, k, v, sinks):
    out, lse = attend(
      q,
      k,
      v,
      sinks=sinks,
      q_segments=x.q_segments,
      k_segments=x.k_segments,
      q_offset=case.offset if offset is None else offset,
      q_prefixes=x.q_prefixes,
      positions=x.positions,
      return_lse=True,
      **case.features,
      **dict(options),
    )
    some = lse > -1e29
    value = jnp.sum(out.astype(jnp.float32) * x.d_out) + jnp.sum(jnp.where(some, lse * x.d_lse, 0))
    return value, (out, lse)

  if not gradients:
    return total(x.q, x.k, x.v, x.sinks)[1]
  wanted = (0, 1, 2, 3) if case.sinks else (0, 1, 2)
  found, kept = jax.grad(total, wanted, has_aux=True)(x.q, x.k, x.v, x.sinks)
  return *kept, *found


def run(
  attend, case: Case, x: Data, *, offset: int | None = None, gradients: bool = True, **options
) -> list[np.ndarray]:
  """[out, lse] of `attend` on the case and, with `gradients`, [dq, dk, dv (, dsinks)]; with an
  `offset` it is traced, and is instead of the case's."""
  traced = None if offset is None else np.int32(offset)
  return list(_run(attend, case, tuple(options.items()), gradients, x, traced))


def half(x: Data) -> Data:
  """The same with q, k and v in bfloat16."""
  return x._replace(**{n: jnp.asarray(getattr(x, n), jnp.bfloat16) for n in ("q", "k", "v")})
