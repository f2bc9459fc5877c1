"""Constrained output: which tokens may come next, so that a completion is of a given form.

A form is a regular expression or a JSON schema. `Grammars` compiles it against a vocabulary; a
`Matcher` follows one completion on the host and gives, before every token, a mask of V bits. What
the mask forbids has probability 0, the rest is renormalised. A token may end in the middle of a
character or stand for several; masks are exact all the same, since matching is on bytes.

Stop tokens are allowed where the text is complete, and nothing else where it cannot go on: so a
completion that ends by a stop token has the form. One that ends by `max_tokens` is the beginning of
one.

The matching is llguidance's (derivatives of regular expressions, an Earley parser above them): a
mask is computed when it is needed, not looked up in a table of all states times V. Left out:
look-around and backreferences in expressions, and keywords of JSON schema that it lacks; both are
errors.

V vocabulary, N sequences, W = ceil(V / 32) words.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.data.tokenizers import Tokenizer

LONGEST = 16_384  # characters of an expression or schema
COMPILED = 64  # forms that are kept
# Where the next bytes are certain the library would allow their most usual token only.
EXACT = '%llguidance {"no_forcing": true}'


@dataclasses.dataclass(frozen=True)
class Constraint:
  """The form that a completion has to have; `regex` and `json_schema` make one."""

  kind: Literal["regex", "json_schema"]
  text: str  # the expression, or the schema as JSON

  def __post_init__(self):
    if self.kind not in ("regex", "json_schema"):
      raise ValueError(f"constraint: kind: expected regex or json_schema, found {self.kind!r}")
    if not 0 < len(self.text) <= LONGEST:
      raise ValueError(
        f"constraint: expected 1 to {LONGEST} characters of {self.kind}, found {len(self.text)}"
      )


def regex(pattern: str) -> Constraint:
  """The whole text matches `pattern`, in the syntax of Rust's regex (Python's, without look-around
  and backreferences; character classes are those of Unicode)."""
  return Constraint("regex", pattern)


def json_schema(schema: Mapping[str, Any] | bool) -> Constraint:
  """The text is one JSON value that `schema` describes, written without space between its parts."""
  return Constraint("json_schema", json.dumps(schema))


class Matcher:
  """Follows one completion. `Grammars.matcher` makes it; `fork` copies it where it stands."""

  def __init__(self, state: Any, stop_tokens: Sequence[int], never: np.ndarray):
    self._state, self._stop, self._never = state, tuple(stop_tokens), never

  def mask(self) -> np.ndarray:
    """[W] uint32: bit t % 32 of word t // 32 says whether token t may come next."""
    if self._state.is_stopped():  # complete, and nothing can be added
      bits = np.zeros_like(self._never)
    else:
      words = np.frombuffer(self._state.compute_bitmask(), np.uint32)
      bits = words[: len(self._never)] & ~self._never
    self._check()
    if self._state.is_accepting():
      for token in self._stop:
        bits[token // 32] |= np.uint32(1 << token % 32)
    return bits

  def advance(self, token: int) -> None:
    """Takes the token that was drawn. Raises ValueError for one that `mask` forbids."""
    if token in self._stop and self._state.is_accepting():
      return  # the completion is over
    if self._state.is_stopped() or not self._state.consume_token(token):
      raise ValueError(f"constraint: token {token} cannot come next")

  def fork(self) -> "Matcher":
    """A copy that goes its own way."""
    return Matcher(self._state.deep_copy(), self._stop, self._never)

  def _check(self) -> None:
    if self._state.is_error():
      raise ValueError(f"constraint: {_line(self._state.get_error())}")


class Grammars:
  """Forms compiled against one vocabulary.

  Args:
    tokenizer: gives the bytes of every token.
    vocab_size: V, of the model; tokens past the tokenizer's are never allowed.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int):
    import llguidance  # here: its import is only paid for by who constrains

    pieces = tokenizer.token_bytes()
    pieces = [*pieces, *[b""] * (vocab_size - len(pieces))]
    self.vocab_size = vocab_size
    empty = [i for i, piece in enumerate(pieces) if not piece]
    # The library wants an end token of its own. It gets one past V, whose bit nobody reads.
    wrapper = _Vocabulary([*pieces, b"<end>"], special=[*empty, vocab_size], end=vocab_size)
    self._matcher = llguidance.LLMatcher
    self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(wrapper))
    self._never = _bits(empty, vocab_size)
    self._compiled = functools.lru_cache(COMPILED)(self._compile)

  def matcher(self, constraint: Constraint, stop_tokens: Sequence[int]) -> Matcher:
    """The matcher of a completion that has not begun.

    Args:
      constraint: the form.
      stop_tokens: that end the completion; at least one.

    Raises ValueError for a form that cannot be compiled, or without a stop token.
    """
    if not stop_tokens or not all(0 <= token < self.vocab_size for token in stop_tokens):
      raise ValueError(
        f"constraint: expected stop tokens below {self.vocab_size}, found {list(stop_tokens)}"
      )
    return Matcher(self._compiled(constraint).deep_copy(), stop_tokens, self._never)

  def _compile(self, constraint: Constraint) -> Any:
    if constraint.kind == "regex":
      made = json.loads(self._matcher.grammar_from_regex(constraint.text))
      lark = made["grammars"][0]["lark_grammar"]
    else:
      schema = json.loads(constraint.text)
      # The library takes objects only; these two say the same as true and false do.
      schema = ({} if schema else {"not": {}}) if isinstance(schema, bool) else schema
      options = {"x-guidance": {"whitespace_flexible": False}}
      lark = f"start: %json {json.dumps(schema | options)}"
    grammar = self._matcher.grammar_from_lark(f"{EXACT}\n{lark}")
    if error := self._matcher.validate_grammar(grammar, self._tokens):
      raise ValueError(f"constraint: {constraint.kind}: {_line(error)}")
    state = self._matcher(self._tokens, grammar, log_level=0)
    if state.is_error():
      raise ValueError(f"constraint: {constraint.kind}: {_line(state.get_error())}")
    return state


def allowed(bits: jax.Array, vocab_size: int) -> jax.Array:
  """[N, V] bool from masks [N, W] uint32 of `Matcher.mask`."""
  shifted = bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)
  return (shifted & 1).astype(bool).reshape(bits.shape[0], -1)[:, :vocab_size]


class _Vocabulary:
  """What llguidance reads of a tokenizer. It encodes only the forced parts of a grammar, bytes
  that a matcher never asks for."""

  bos_token_id = None

  def __init__(self, tokens: list[bytes], special: list[int], end: int):
    self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end

  def __call__(self, text: bytes) -> list[int]:
    del text
    return []


def _bits(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
  """[W] uint32 with the bits of `tokens`, and those past V, set."""
  out = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
  out[list(tokens)] = 1
  out[vocab_size:] = 1
  return np.packbits(out, bitorder="little").view(np.uint32)


def _line(text: str) -> str:
  """What the library says, without the place in a grammar that the caller never saw."""
  text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
  return " ".join(re.split(r"\n +1 \|", text)[0].split())[:200]
