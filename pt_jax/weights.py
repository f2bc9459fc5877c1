"""Weights: the rows of a parameter table, and `project`, the one place that multiplies by a weight.

A model describes its parameters as a nested dict of `Param` rows. Initialisation, sharding,
checkpoints, HF loading, optimizer groups and memory estimates all read that table. A leaf of the
parameter tree is an `Array` today; a typed leaf (quantised, low-rank) is a pytree node that
`project` and `gather` learn of here, and no model changes.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pt_jax import sharding
from pt_jax.sharding import Axes, Rules

Params = Any  # a nested dict of weights
Table = Any  # a nested dict of Param, of the same structure


class Param(NamedTuple):
  """One row of a parameter table."""

  shape: tuple[int, ...]
  axes: Axes  # one logical axis name (or None) per dimension
  std: float = 0.0  # initialised to mean + std * standard normal
  mean: float = 0.0
  decay: bool = False  # whether weight decay applies

  def stack(self, layers: int) -> "Param":
    """The row of `layers` such parameters on a leading `layer` axis."""
    return self._replace(shape=(layers, *self.shape), axes=("layer", *self.axes))

  def unstack(self) -> "Param":
    """The row of one of such stacked parameters."""
    return self._replace(shape=self.shape[1:], axes=self.axes[1:])


def is_param(x: Any) -> bool:
  """Whether x is a table row (a leaf of a table)."""
  return isinstance(x, Param)


def map_table(f: Callable[..., Any], table: Table, *trees: Params) -> Any:
  """`jax.tree.map` over the rows of a table and the matching weights."""
  return jax.tree.map(f, table, *trees, is_leaf=is_param)


def named_rows(table: Table) -> list[tuple[str, Param]]:
  """(dotted name, row) of every parameter, in tree order."""
  rows, _ = jax.tree.flatten_with_path(table, is_leaf=is_param)
  return [(".".join(str(entry.key) for entry in path), row) for path, row in rows]


def count(table: Table) -> int:
  """Number of parameters."""
  return sum(math.prod(row.shape) for _, row in named_rows(table))


def check_mesh(table: Table, rules: Rules, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError naming the first parameter that the mesh does not divide."""
  for name, row in named_rows(table):
    sharding.check_divides(f"parameter {name}", row.shape, row.axes, rules, mesh)


def init(key: jax.Array, table: Table, rules: Rules, dtype: jnp.dtype) -> Params:
  """Random parameters, each made already sharded; call it under `jit` so nothing is built whole.

  Every parameter draws from the key folded with its name, so values depend neither on the mesh nor
  on which other parameters the table has.
  """

  def leaf(name: str, row: Param) -> jax.Array:
    where = rules.spec(*row.axes)
    if not row.std:
      return jnp.full(row.shape, row.mean, dtype, out_sharding=where)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    noise = jax.random.normal(own, row.shape, jnp.float32, out_sharding=where)
    return (row.mean + row.std * noise).astype(dtype)

  _, tree = jax.tree.flatten(table, is_leaf=is_param)
  return tree.unflatten([leaf(name, row) for name, row in named_rows(table)])


def abstract(table: Table, rules: Rules, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Params:
  """ShapeDtypeStructs of the parameters with their shardings: what a restore or a plan needs."""

  def leaf(row: Param) -> jax.ShapeDtypeStruct:
    where = jax.sharding.NamedSharding(mesh, rules.spec(*row.axes, mesh=mesh))
    return jax.ShapeDtypeStruct(row.shape, dtype, sharding=where)

  return map_table(leaf, table)


def reshard(params: Params, table: Table, rules: Rules) -> Params:
  """Moves every parameter to where `rules` want it. Its transpose moves the gradient back."""
  return map_table(lambda row, w: jax.reshard(w, rules.spec(*row.axes)), table, params)


def project(
  x: jax.Array,
  weight: jax.Array,
  equation: str,
  *,
  out_sharding: jax.P | None = None,
) -> jax.Array:
  """`einsum(equation, x, weight)` in the dtype of x.

  Args:
    x: activations; its first two axes, B and S, are those of the result, the others are contracted.
    weight: the weight, in whatever form its leaf type stores it; cast to the dtype of x.
    equation: e.g. "bsd,dhk->bshk": what is contracted comes first in the weight, and what is left
      of it keeps its order.
    out_sharding: needed when a contracted axis is split on both sides (the product is then summed
      over that mesh axis).

  Where S is whole, the product is one of two matrices, [B S, in] and [in, out], and so are its
  gradients: with more axes XLA on CPU transposes an operand of the weight's gradient first.

  Raises ValueError for an equation of another form.
  """
  inputs = x.ndim - 2
  given, letters, result = equation.replace("->", ",").split(",")
  if given[:2] != "bs" or letters[:inputs] != given[2:] or result != "bs" + letters[inputs:]:
    raise ValueError(f"project: expected an equation like 'bsd,dhk->bshk', found {equation!r}")
  weight = weight.astype(x.dtype)
  if jax.typeof(x).sharding.spec[1] is not None:
    return jnp.einsum(equation, x, weight, out_sharding=out_sharding)
  kept = weight.shape[inputs:]
  matrix = _merge(_merge(weight, 0, inputs), 1, len(kept))
  rows = _merge(_merge(x, 0, 2), 1, inputs)
  if out_sharding is not None:
    out_sharding = jax.P(out_sharding[0], *out_sharding[2:])
  out = jnp.einsum("nd,df->nf", rows, matrix, out_sharding=out_sharding)
  return out.reshape(-1, *kept).reshape(*x.shape[:2], *kept)


def _merge(x: jax.Array, first: int, count: int) -> jax.Array:
  """x with `count` axes from `first` on made into one."""
  return x.reshape(*x.shape[:first], -1, *x.shape[first + count :])
