"""Log-probs, entropy and logsumexp from hidden states and the output matrix, without the logits.

The log-sum-exp and its weighted sum are gathered over parts of the vocabulary (tiles, chunks and
devices); the backward pass computes each tile of logits again.
"""

import dataclasses
import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from kernels import varying
from kernels.linear_logprob import partial, tpu, xla
from kernels.linear_logprob.options import Coefficients, Options, Tiles
from kernels.linear_logprob.reference import IGNORE, Statistics


def linear_logprob(
  hidden: jax.Array,
  matrix: jax.Array,
  labels: jax.Array,
  *,
  temperature: float = 1.0,
  soft_cap: float | None = None,
  ignore: int = IGNORE,
  axis_name: str | None = None,
  chunk: int = 8192,
  tiles: Mapping[str, int] | None = None,
  chip: str | None = None,
) -> Statistics:
  """`reference.linear_logprob` without [N, V] logits in memory, and with the vocabulary split.

  Args:
    hidden: [N, E].
    matrix: [V, E], or this device's part of its rows, inside `shard_map`.
    labels: [N] or [N, K] int32, ids of the whole vocabulary, or `ignore`.
    temperature: divides the logits.
    soft_cap: c in c tanh(x / c); None for no cap.
    ignore: the label that gives a log-prob of 0 and no gradient.
    axis_name: the mesh axis that the vocabulary is split over, in equal parts in order.
    chunk: logits held at once per row by the XLA form; rounded down to a divisor of V.
    tiles: fields of `options.Tiles`, of the TPU form, instead of those of `kernels/tiles.py`.
    chip: a name of `kernels.chip.CHIPS`; None for the XLA form.

  Returns:
    `reference.Statistics`. Gradients to hidden states and matrix through log-probs, entropy and lse
    are computed tile by tile; they are summed over the mesh axes over which the other of the two
    is split.

  Raises ValueError for a temperature or a cap that is not above 0, or unknown tiles.
  """
  chex.assert_rank([hidden, matrix, labels], [2, 2, {1, 2}])
  chex.assert_equal(hidden.shape[1], matrix.shape[1])
  chex.assert_equal_shape_prefix([hidden, labels], 1)
  if not temperature > 0 or not (soft_cap is None or soft_cap > 0):
    raise ValueError(
      f"linear_logprob: expected temperature and soft_cap > 0, found {temperature}, {soft_cap}"
    )
  fields = {field.name for field in dataclasses.fields(Tiles)}
  if tiles is not None and (set(tiles) != fields or min(tiles.values()) < 1):
    raise ValueError(f"linear_logprob: tiles: expected {sorted(fields)} >= 1, found {dict(tiles)}")
  options = Options(
    temperature=temperature,
    soft_cap=soft_cap,
    ignore=ignore,
    axis_name=axis_name,
    chunk=chunk,
    tiles=Tiles(**tiles) if tiles else None,
    chip=chip,
  )
  each = labels if labels.ndim == 2 else labels[:, None]
  stats = _statistics(options, hidden, matrix, each)
  return stats._replace(logprobs=stats.logprobs.reshape(labels.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: Options, h: jax.Array, w: jax.Array, labels: jax.Array) -> Statistics:
  return _forward(options, h, w, labels)[0]


def _local(options: Options, w: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first id of this device's part, and the labels as its rows; -1 for one elsewhere."""
  size = w.shape[0]
  first = jax.lax.axis_index(options.axis_name) * size if options.axis_name else jnp.int32(0)
  rows = labels - first
  here = (labels != options.ignore) & (rows >= 0) & (rows < size)
  return first, jnp.where(here, rows, -1)


def _forward(options, h, w, labels):
  form = tpu if options.chip else xla
  first, rows = _local(options, w, labels)
  part = form.partials(h, w, rows, options)
  part = part._replace(best=part.best + first)
  if options.axis_name:
    part = partial.merge_over(part, options.axis_name)
  log_total = jnp.log(part.total)
  lse, entropy = part.top + log_total, log_total - part.weighted / part.total
  logprobs = jnp.where(labels == options.ignore, 0, part.label - lse[:, None])
  return Statistics(logprobs, entropy, part.best, lse), (h, w, labels, lse, entropy)


def _backward(options, saved, cotangents):
  """dz = sum_k g_k onehot_k - p (sum_k g_k - g_lse + g_entropy (log p + entropy))."""
  h, w, labels, lse, entropy = saved
  g = jnp.where(labels == options.ignore, 0, cotangents.logprobs)
  through = g.sum(-1) - cotangents.lse + cotangents.entropy * entropy
  form = tpu if options.chip else xla
  _, rows = _local(options, w, labels)
  by = Coefficients(lse, through, cotangents.entropy, g)
  dh, dw = form.gradients(h, w, rows, by, options)
  return varying.like(dh, h), varying.like(dw, w), None


_statistics.defvjp(_forward, _backward)
