"""What both forms of the kernel are told."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Rows and tokens of a tile of logits, forward and backward."""

  rows: int
  tokens: int
  backward_rows: int
  backward_tokens: int


@dataclasses.dataclass(frozen=True)
class Options:
  """Of a call; static."""

  temperature: float
  soft_cap: float | None
  ignore: int
  axis_name: str | None
  chunk: int
  tiles: Tiles | None
  chip: str | None


class Coefficients(NamedTuple):
  """What the gradient by a row's logits z is made of, all float32:

  dz = sum_k label_k onehot_k - p (through + slope (z - lse)), p = exp(z - lse).
  """

  lse: jax.Array  # [N]
  through: jax.Array  # [N]
  slope: jax.Array  # [N]
  label: jax.Array  # [N, K]


def cap(x: jax.Array, options: Options) -> jax.Array:
  """Logits of products: c tanh(x / c) / temperature."""
  if options.soft_cap:
    x = options.soft_cap * jnp.tanh(x * (1 / options.soft_cap))
  return x if options.temperature == 1 else x * (1 / options.temperature)


def cap_slope(z: jax.Array, options: Options) -> jax.Array | float:
  """The derivative of `cap`, from its value."""
  if not options.soft_cap:
    return 1 / options.temperature
  return (1 - jnp.square(z * (options.temperature / options.soft_cap))) * (1 / options.temperature)
