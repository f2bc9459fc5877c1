"""The two halves of the kernel in XLA, in chunks of the vocabulary: what CPU and GPU run."""

import jax
import jax.numpy as jnp

from kernels.linear_logprob import chunks, partial
from kernels.linear_logprob.options import Coefficients, Options, cap, cap_slope
from kernels.linear_logprob.partial import Partial


def partials(h: jax.Array, w: jax.Array, labels: jax.Array, options: Options) -> Partial:
  """h [N, E], w [V, E], labels [N, K] (outside 0..V-1: elsewhere) -> what w says of each row."""

  def measure(part: chunks.Part) -> Partial:
    (rows,), first = part
    z = cap(chunks.products(h, rows), options)
    top = z.max(-1)
    d = z - top[:, None]
    p = jnp.exp(d)
    ids = first + jnp.arange(z.shape[1])
    label = [jnp.where(ids == labels[:, k, None], z, 0).sum(-1) for k in range(labels.shape[1])]
    best = first + jnp.argmax(z, -1)
    return Partial(top, p.sum(-1), (p * d).sum(-1), jnp.stack(label, -1), best.astype(jnp.int32))

  return chunks.fold(measure, partial.merge, (w,), chunks.divisor(w.shape[0], options.chunk))


def gradients(
  h: jax.Array, w: jax.Array, labels: jax.Array, by: Coefficients, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Gradients by h and by w in float32, of this device's rows and part of the vocabulary."""

  def by_products(x: jax.Array, part: chunks.Part) -> jax.Array:
    _, first = part
    z = cap(x, options)
    d = z - by.lse[:, None]
    dz = -jnp.exp(d) * (by.through[:, None] + by.slope[:, None] * d)
    ids = first + jnp.arange(x.shape[1])
    for k in range(labels.shape[1]):
      dz += jnp.where(ids == labels[:, k, None], by.label[:, k, None], 0)
    return dz * cap_slope(z, options)

  return chunks.gradients(by_products, h, (w,), chunks.divisor(w.shape[0], options.chunk))
