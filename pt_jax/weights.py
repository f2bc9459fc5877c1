"""Weights: the rows of a parameter table, and `project`, the one place that multiplies by a weight.

A model describes its parameters as a nested dict of `Param` rows. Initialisation, sharding,
checkpoints, HF loading, optimizer groups and memory estimates all read that table. A leaf of the
parameter tree is an `Array` today; a typed leaf (quantised, low-rank) is a pytree node that
`project` and `gather` learn of here, and no model changes.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import varying
from pt_jax import sharding
from pt_jax.sharding import Axes, Rules

LANES = 128  # columns of a TPU's tile
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


def gather(params: Params, table: Table, rules: Rules, dtype: jnp.dtype) -> Params:
  """Every parameter where `rules` want it for a product, in `dtype` where that takes a transfer.

  Where a parameter is split over more mesh axes than `rules` say, its gradient is summed and split
  in one reduce-scatter. (What a reshard's transpose becomes is left to XLA, on TPU an all-reduce
  for every axis that is the last of its array: see docs/results.md.)
  """

  def leaf(row: Param, w: jax.Array) -> jax.Array:
    stored, used = jax.typeof(w).sharding.spec, rules.spec(*row.axes)
    split = [i for i, (a, b) in enumerate(zip(stored, used)) if a != b]
    if len(split) != 1 or used[split[0]] is not None:
      return jax.reshard(w, used)
    summed = frozenset(_names(rules.spec("batch", "seq")))
    return _gather(w.astype(dtype), split[0], tuple(stored), tuple(used), summed)

  return map_table(leaf, table, params)


def _names(parts: Iterable[Any]) -> list[str]:
  """The mesh axes in parts of a PartitionSpec."""
  return [n for part in parts if part for n in ((part,) if isinstance(part, str) else part)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(
  w: jax.Array,
  axis: int,
  stored: tuple[Any, ...],
  used: tuple[Any, ...],
  summed: frozenset[str],
) -> jax.Array:
  """w, split as `stored` says, whole along `axis`. The type of the result says that it is the same
  on the mesh axes of `summed`, and that its gradient is still to be summed over them."""
  return jax.reshard(w, jax.P(*used, reduced=summed))


def _gather_forward(w, axis, stored, used, summed):
  return _gather(w, axis, stored, used, summed), None


def _gather_backward(axis, stored, used, summed, _, g):
  """The sum over the mesh axes, split along `axis`."""
  scattered = tuple(_names([stored[axis]]))
  others = tuple(sorted(summed.difference(scattered)))

  def scatter(g: jax.Array) -> jax.Array:
    g = _scatter(g, scattered, axis)
    return jax.lax.psum(g, others) if others else g

  partial = jax.P(*used, unreduced=summed)
  return (jax.shard_map(scatter, in_specs=partial, out_specs=jax.P(*stored))(g),)


_gather.defvjp(_gather_forward, _gather_backward)


def _scatter(g: jax.Array, names: tuple[str, ...], axis: int) -> jax.Array:
  """The sum of g over `names`, of which a device keeps its part along `axis`; inside
  `jax.shard_map`.

  The axis is moved to the front, where TPUs scatter. XLA moves it back by its choice of a layout,
  and makes an all-reduce of the whole, where a part is no whole tiles of 128 columns: such arrays
  are sent as rows of 128.
  """
  g = jnp.moveaxis(g, axis, 0)
  part = (g.shape[0] // jax.lax.axis_size(names), *g.shape[1:])
  if axis == g.ndim - 1 and part[0] % LANES and math.prod(part) % LANES == 0:
    g = g.reshape(-1, LANES)
  g = jax.lax.psum_scatter(g, names, scatter_dimension=0, tiled=True)
  return jnp.moveaxis(g.reshape(part), 0, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole(w: jax.Array, stored: jax.P, dtype: jnp.dtype) -> jax.Array:
  """The part [V/t, D/z] of a matrix that a device stores -> [V/t, D]; inside `jax.shard_map`.

  What `gather` does elsewhere: gradients are summed and scattered at once.

  Args:
    w: the part.
    stored: where the matrix [V, D] lives.
    dtype: of the result, where that takes a transfer.
  """
  names = tuple(_names(stored[1:]))
  return jax.lax.all_gather(w.astype(dtype), names, axis=1, tiled=True) if names else w


def _whole_forward(w, stored, dtype):
  return whole(w, stored, dtype), w


def _whole_backward(stored, dtype, w, g):
  if names := tuple(_names(stored[1:])):
    g = _scatter(g, names, 1)
  return (varying.like(g, w),)


whole.defvjp(_whole_forward, _whole_backward)


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
  split = jax.typeof(x).sharding.spec[1] is not None
  if split or jax.typeof(weight).sharding.spec.reduced:  # JAX 0.10 does not reshape the latter
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
