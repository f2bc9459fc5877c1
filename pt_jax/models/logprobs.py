"""Log-prob, entropy and most likely token from hidden states, without ever holding [B, S, V].

The vocabulary is visited in tiles, forward and backward (`kernels.linear_logprob`); where it is
split over `tensor`, each shard visits its own part.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kernels.linear_logprob import linear_logprob
from pt_jax import weights
from pt_jax.models import vocabulary
from pt_jax.models.vocabulary import TENSOR
from pt_jax.sharding import USE, chip


@flax.struct.dataclass
class TokenStatistics:
  """Of the next-token distribution at each position. Gradients flow through all but `top1`."""

  logprobs: jax.Array  # [B, S] float32, log-prob of the label, nats
  entropy: jax.Array  # [B, S] float32, nats
  top1: jax.Array  # [B, S] int32, the most likely token
  logsumexp: jax.Array  # [B, S] float32, log of the sum of exp(logits / temperature)


def token_statistics(
  hidden: jax.Array,
  unembedding: jax.Array,
  labels: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 8192,
) -> TokenStatistics:
  """Statistics of softmax(hidden @ unembedding.T / temperature) at every position, in float32.

  Args:
    hidden: [B, S, D].
    unembedding: [V, D], split over `tensor` along V, wherever it is stored along D.
    labels: [B, S] int32, the tokens whose log-prob is wanted.
    temperature: divides the logits.
    chunk: logits held at once per position and device where there is no TPU; rounded down to a
      divisor of the shard.
  """

  here = chip()

  def local(h: jax.Array, w: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
    out = linear_logprob(
      h.reshape(-1, h.shape[-1]),
      weights.whole(w, stored, h.dtype),
      ids.reshape(-1),
      temperature=temperature,
      axis_name=TENSOR,
      chunk=chunk,
      chip=here,
    )
    return tuple(x.reshape(ids.shape) for x in out)

  row, stored = USE.spec("batch", "seq"), jax.typeof(unembedding).sharding.spec
  specs = (USE.spec("batch", "seq", "embed"), stored, row)
  out = jax.shard_map(local, in_specs=specs, out_specs=(row,) * 4)(hidden, unembedding, labels)
  return TokenStatistics(*out)


def next_token_statistics(
  hidden: jax.Array,
  unembedding: jax.Array,
  tokens: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 8192,
) -> TokenStatistics:
  """`token_statistics` aligned with the token that is predicted: entry t speaks of tokens[:, t]
  given what stands before it. Entry 0 is 0, and so is meaningless at the first token of any
  segment."""
  stats = token_statistics(
    hidden, unembedding, vocabulary.shift(tokens, -1), temperature=temperature, chunk=chunk
  )
  return vocabulary.at_next_token(stats)


def next_token_mean_logit(
  hidden: jax.Array, unembedding: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
  """Mean over the vocabulary of the logits / temperature that predict each token, [B, S] float32.

  Minus `next_token_statistics`' logsumexp it is the mean over the vocabulary of log p, which label
  smoothing needs: hidden times the mean row of the output matrix, one row for all V of them.
  """
  row = jax.reshard(unembedding.astype(jnp.float32).mean(0), jax.P(None))
  mean = jnp.einsum("bsd,d->bs", hidden.astype(jnp.float32), row) / temperature
  return vocabulary.at_next_token(mean)
