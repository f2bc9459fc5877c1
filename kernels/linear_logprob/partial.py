"""What is known of a softmax after a part of the vocabulary, and how two parts are merged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
  """Of the logits z of a part. Sums are relative to its highest, so that a large logit costs the
  entropy no digits."""

  top: jax.Array  # [N] float32, the highest
  total: jax.Array  # [N] float32, sum of exp(z - top)
  weighted: jax.Array  # [N] float32, sum of exp(z - top) (z - top), <= 0
  label: jax.Array  # [N, K] float32, the logits of the labels, 0 where one is elsewhere
  best: jax.Array  # [N] int32, the token of the highest logit, the first of equals


def relative_to(part: Partial, top: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sums of a part relative to another, higher logit: total, weighted."""
  scale, gap = jnp.exp(part.top - top), part.top - top
  return part.total * scale, (part.weighted + part.total * gap) * scale


def merge(a: Partial, b: Partial) -> Partial:
  """Of two parts, a's tokens before b's."""
  top = jnp.maximum(a.top, b.top)
  (total_a, weighted_a), (total_b, weighted_b) = relative_to(a, top), relative_to(b, top)
  return Partial(
    top,
    total_a + total_b,
    weighted_a + weighted_b,
    a.label + b.label,
    jnp.where(b.top > a.top, b.best, a.best),
  )


def merge_over(part: Partial, axis_name: str) -> Partial:
  """Of the parts on all devices of a mesh axis."""
  top = jax.lax.pmax(part.top, axis_name)
  total, weighted = relative_to(part, top)
  nowhere = jnp.iinfo(jnp.int32).max
  best = jax.lax.pmin(jnp.where(part.top == top, part.best, nowhere), axis_name)
  total, weighted, label = jax.lax.psum((total, weighted, part.label), axis_name)
  return Partial(top, total, weighted, label, best)
