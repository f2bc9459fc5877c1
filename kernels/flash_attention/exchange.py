"""The way of the queries' gradients between HBM and VMEM while a backward kernel adds to them.

Blocks of sums lie in HBM. A turn adds to one of them in VMEM; meanwhile the next one arrives and
the last one leaves, so that there are three places. Turns one after the other with the same block
keep it where it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PLACES = 3
NOTHING = -1


class Exchange(NamedTuple):
  """Shapes of what it takes in a core, or references."""

  sums: Any  # [3, K, queries] float32
  arriving: Any  # [3] semaphores
  leaving: Any  # [3]
  place: Any  # [1] int32 in SMEM, of this turn's block
  sent: Any  # [3] int32 in SMEM, the block that is leaving from a place, or `NOTHING`


class Turn(NamedTuple):
  """What a turn knows of itself and the next."""

  first: jax.Array  # bool, of all; then nothing has been fetched
  last: jax.Array
  again: jax.Array  # its block is the one of the turn before
  keeps: jax.Array  # the next turn's block is this one
  block: jax.Array  # int32, names the block; two blocks may have the same name
  following: jax.Array  # the same of the next turn


def scratch(width: int, queries: int) -> Exchange:
  """Shapes for blocks of sums [width, queries]."""
  return Exchange(
    pltpu.VMEM((PLACES, width, queries), jnp.float32),
    pltpu.SemaphoreType.DMA((PLACES,)),
    pltpu.SemaphoreType.DMA((PLACES,)),
    pltpu.SMEM((1,), jnp.int32),
    pltpu.SMEM((PLACES,), jnp.int32),
  )


def begin(x: Exchange, turn: Turn, here: Callable[[], jax.Ref], there: Callable[[], jax.Ref]):
  """Waits for this turn's block, and starts to fetch the next one.

  Args:
    x, turn: the state, and the turn.
    here, there: the blocks of this turn and of the next in HBM.

  Returns:
    The place [] int32 of this turn's block.
  """

  @pl.when(turn.first)
  def _():
    x.place[0] = 0
    for place in range(PLACES):
      x.sent[place] = NOTHING
    pltpu.make_async_copy(here(), x.sums.at[0], x.arriving.at[0]).start()

  place = x.place[0]
  after, before = _next(place), _next(_next(place))

  @pl.when(~turn.again)
  def _():
    pltpu.make_async_copy(here(), x.sums.at[place], x.arriving.at[place]).wait()

  @pl.when(~(turn.keeps | turn.last))
  def _():
    _left(x, after, here())
    pl.when(x.sent[before] == turn.following)(lambda: _left(x, before, here()))
    pltpu.make_async_copy(there(), x.sums.at[after], x.arriving.at[after]).start()

  return place


def end(x: Exchange, turn: Turn, here: Callable[[], jax.Ref]) -> None:
  """Sends this turn's block back unless the next turn adds to it."""
  place = x.place[0]

  @pl.when(~turn.keeps)
  def _():
    pltpu.make_async_copy(x.sums.at[place], here(), x.leaving.at[place]).start()
    x.sent[place] = turn.block
    x.place[0] = _next(place)

  @pl.when(turn.last)
  def _():
    for each in range(PLACES):
      _left(x, each, here())


def _next(place: jax.Array) -> jax.Array:
  return jnp.where(place == PLACES - 1, 0, place + 1)


def _left(x: Exchange, place: int | jax.Array, block: jax.Ref) -> None:
  """Waits until what is leaving from a place has arrived in HBM (of the size of `block`)."""

  @pl.when(x.sent[place] != NOTHING)
  def _():
    pltpu.make_async_copy(x.sums.at[place], block, x.leaving.at[place]).wait()
    x.sent[place] = NOTHING
