"""The mesh axes that a value varies over inside `jax.shard_map`, which checks them.

A kernel has to say them of what it returns, and a backward pass has to sum over those that its
gradient varies over and the value does not.
"""

import jax


def axes(*values: jax.Array) -> frozenset[str]:
  """The axes that one of the values varies over; none outside of `shard_map`."""
  return frozenset().union(*(jax.typeof(x).mat.varying for x in values))


def out(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *inputs: jax.Array):
  """The `out_shape` of a Pallas call on these inputs."""
  kind = jax.sharding.ManualAxisType(varying=axes(*inputs))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def like(gradient: jax.Array, x: jax.Array) -> jax.Array:
  """A gradient by x, in x's dtype, summed over the axes that it varies over and x does not: those
  devices hold the same x."""
  for axis in sorted(axes(gradient) - axes(x)):
    gradient = jax.lax.psum(gradient, axis)
  return gradient.astype(x.dtype)
