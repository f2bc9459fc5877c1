"""Log-probs of given tokens: what evaluation harnesses ask for (`echo` with `logprobs`).

One forward pass of the training model over whole prompts; the logits of a few positions at a time.
R rows, S positions, D width, V vocabulary, C positions at once, K tokens beside the given one.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.models import decoder
from pt_jax.models.config import ModelConfig
from pt_jax.sharding import USE, P
from pt_jax.weights import Params

ROWS = 8  # prompts scored together at most
SHORTEST = 64  # lengths are rounded up to powers of two from here on, so few programs are compiled
POSITIONS = 128  # whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Scores:
  """Of one prompt; entry t speaks of token t given what stands before it, entry 0 of nothing."""

  logprobs: np.ndarray  # [T] float32, nats
  top: np.ndarray  # [T, K] int32, the most likely tokens, in order
  top_logprobs: np.ndarray  # [T, K] float32


class Scorer:
  """Scores prompts under one set of weights, at temperature 1. Call it inside `jax.set_mesh`."""

  def __init__(self, config: ModelConfig, params: Params, top: int):
    """
    Args:
      config: of the model.
      params: of `decoder.table(config)`, anywhere.
      top: K, tokens that are returned beside the given one.
    """
    self._config, self._params = config, params
    self._top = min(top, config.vocab_size)
    mesh = jax.sharding.get_abstract_mesh().shape
    parts = mesh["data"] * mesh["expert"]
    self.rows = max(parts, ROWS // parts * parts)
    self._least = parts
    self._context = mesh["context"]

  def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Scores]:
    """Scores at most `rows` prompts."""
    rows = self._least if len(prompts) <= self._least else self.rows
    length = SHORTEST * self._context
    while length < max(map(len, prompts)):
      length *= 2
    tokens, ends = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)], ends[row] = prompt, len(prompt)
    out = _score(self._params, tokens, ends, config=self._config, top=self._top)
    logprobs, top, top_logprobs = jax.device_get(out)
    return [
      Scores(logprobs[i, : len(p)], top[i, : len(p)], top_logprobs[i, : len(p)])
      for i, p in enumerate(prompts)
    ]


@functools.partial(jax.jit, static_argnames=("config", "top"))
def _score(
  params: Params, tokens: jax.Array, ends: jax.Array, *, config: ModelConfig, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """tokens [R, S], ends [R] -> log-probs [R, S] and top [R, S, K] with theirs."""
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  segments = jnp.where(index < ends[:, None], 0, -1)
  row = USE.spec("batch", "seq")
  placed = [jax.reshard(x, row) for x in (tokens, index, segments)]
  hidden = decoder.forward(params, config, *placed)
  unembed = decoder.unembedding(params, config).astype(hidden.dtype)
  whole = USE.spec("batch", None, None)
  hidden = jax.reshard(hidden, whole)
  label = jax.reshard(jnp.roll(tokens, -1, 1), USE.spec("batch", None))

  def local(h, labels, w):
    return _top(h, labels, w, top)

  out = (USE.spec("batch", None), whole, whole)
  specs = (whole, USE.spec("batch", None), P(None, None))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)
  scored = mapped(hidden, label, jax.reshard(unembed, P(None, None)))
  return jax.tree.map(lambda x: jnp.roll(x, 1, 1), scored)


def _top(
  hidden: jax.Array, labels: jax.Array, w: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """hidden [R, S, D], labels [R, S], w [V, D] -> of the next token at every position."""
  rows, length, _ = hidden.shape
  size = min(POSITIONS, length)

  def part(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    h, ids = piece
    z = jnp.einsum("rcd,vd->rcv", h, w, preferred_element_type=jnp.float32)
    logprobs = jax.nn.log_softmax(z)
    own = jnp.take_along_axis(logprobs, ids[..., None], -1)[..., 0]
    best, which = jax.lax.top_k(logprobs, top)
    return own, which.astype(jnp.int32), best

  cut = lambda x: jnp.moveaxis(x.reshape(rows, length // size, size, *x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, length, *x.shape[3:])
  return jax.tree.map(join, jax.lax.map(part, (cut(hidden), cut(labels))))
