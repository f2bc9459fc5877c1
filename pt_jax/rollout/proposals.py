"""Speculative decoding, the parts that are plain functions: what to propose, what to accept.

Position t of a sample has a key of its own, so the token that decoding draws there is a function of
the text before it and nothing else. A step of speculation reads k proposed tokens behind the last
one, draws at all k + 1 positions with exactly these keys, and keeps a proposal only where it is the
token that was drawn. What comes out is, token for token, what decoding without proposals draws.

For a proposal that is given (an n-gram), the chance to be kept is p(proposal), as in rejection
sampling (arXiv 2211.17192). A draft model draws its proposals with the same keys: by the Gumbel
trick both models add the same noise to their logits, and agree with a chance of at least
(1 - d) / (1 + d) for a total variation of d between them (arXiv 2408.07978).

R rows, H positions of the history, k proposals, m tokens of an n-gram.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pt_jax.models.config import ModelConfig
from pt_jax.weights import Params

MOST = 16  # proposals of a step; more are hardly ever all accepted


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
  """A smaller model that proposes. Its weights stay as they are when the policy's change."""

  config: ModelConfig
  params: Params = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is static of a launch that speculates."""

  config: ModelConfig
  draft: ModelConfig | None  # None: by n-grams
  tokens: int  # k
  ngram: int  # m


@dataclasses.dataclass(frozen=True)
class Speculation:
  """How an engine guesses several tokens ahead: by looking them up in the text of the sample, or
  with a draft model."""

  tokens: int = 4  # that are proposed at once, k
  ngram: int = 3  # longest end of the text that is looked up in it, m; unread with a draft
  draft: Draft | None = None

  def __post_init__(self):
    for name, found, most in (("tokens", self.tokens, MOST), ("ngram", self.ngram, MOST)):
      if not 1 <= found <= most:
        raise ValueError(f"speculation.{name}: expected 1 to {most}, found {found}")

  def plan(self, config: ModelConfig) -> Plan:
    """For this model. Raises ValueError where the draft cannot propose for it."""
    if self.draft is not None and self.draft.config.vocab_size != config.vocab_size:
      raise ValueError(
        f"speculation.draft: expected a vocabulary of {config.vocab_size}, "
        f"found {self.draft.config.vocab_size}"
      )
    draft = None if self.draft is None else self.draft.config
    return Plan(config, draft, self.tokens, self.ngram)


def from_history(
  history: jax.Array, position: jax.Array, *, ngram: int, count: int
) -> tuple[jax.Array, jax.Array]:
  """What followed when the text last went as it goes now (prompt lookup).

  Of all places before the last token, the one behind which the most tokens (at most `ngram`) are
  those at the end of the text; of several, the last one. Where the text ends before `count` tokens
  came behind it, it is taken to go on repeating itself.

  Args:
    history: [R, H] int32, tokens by position.
    position: [R] int32, of the last token.
    ngram: m.
    count: k.

  Returns:
    proposals [R, k] int32, and whether there are any [R] bool: not where the last token is new.
  """
  places = jnp.arange(history.shape[1])
  last = position[:, None]
  same, length = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
  for i in range(ngram):
    token = jnp.take_along_axis(history, jnp.maximum(last - i, 0), axis=1)
    before = jnp.roll(history, i, axis=1)  # at place e, the token of e - i
    same &= (before == token) & (places >= i) & (last >= i)
    length += same
  score = jnp.where((places < last) & (length > 0), length * history.shape[1] + places, -1)
  best = jnp.argmax(score, axis=1)[:, None]
  period = jnp.maximum(last - best, 1)
  index = jnp.minimum(best + 1 + jnp.arange(count) % period, history.shape[1] - 1)
  found = (score >= 0).any(1)
  proposals = jnp.take_along_axis(history, index, axis=1)
  return jnp.where(found[:, None], proposals, 0), found


def accept(
  proposals: jax.Array, drawn: jax.Array, stop_tokens: jax.Array, room: jax.Array
) -> jax.Array:
  """How many of the drawn tokens count: those behind proposals that were drawn themselves, up to
  the first stop token.

  Args:
    proposals: [R, k] int32.
    drawn: [R, k + 1] int32, at the position of each proposal and behind the last.
    stop_tokens: [R, any] int32, -1 for none.
    room: [R] int32, tokens that a row may have, at least 1.

  Returns:
    [R] int32, 1 to k + 1.
  """
  agree = jnp.cumprod((proposals == drawn[:, :-1]).astype(jnp.int32), axis=1).sum(1)
  stops = (drawn[:, :, None] == stop_tokens[:, None]).any(-1)
  first = jnp.where(stops.any(1), jnp.argmax(stops, axis=1) + 1, drawn.shape[1])
  return jnp.minimum(jnp.minimum(agree + 1, first), room).astype(jnp.int32)
