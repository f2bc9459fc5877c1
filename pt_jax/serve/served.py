"""What is served: a model with its tokenizer and chat template."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from pt_jax.data.chat import encode_prompt
from pt_jax.data.chat_templates import ChatTemplate
from pt_jax.data.tokenizers import IncrementalDetokenizer, Tokenizer
from pt_jax.rollout.constraints import Constraint, Grammars
from pt_jax.serve.errors import invalid


@dataclasses.dataclass(frozen=True)
class Served:
  """A model as its clients see it. Nothing of it touches JAX."""

  name: str
  tokenizer: Tokenizer
  template: ChatTemplate | None  # None: no chats
  vocab_size: int  # of the model
  max_length: int  # tokens of a prompt and its answer
  stop_tokens: tuple[int, ...]
  created: int  # Unix seconds
  scores: bool = True  # whether log-probs of prompts can be had

  @functools.cached_property
  def grammars(self) -> Grammars:
    """Forms compiled against the vocabulary."""
    return Grammars(self.tokenizer, self.vocab_size)

  def check(self, constraint: Constraint) -> None:
    """Raises ApiError unless the form can be compiled, which it then is."""
    field = "regex" if constraint.kind == "regex" else "response_format"
    try:
      self.grammars.matcher(constraint, self.stop_tokens)
    except ValueError as error:
      raise invalid(field, f"{field}: {error}") from error

  def encode(self, text: str) -> tuple[int, ...]:
    """Tokens of a raw prompt: special tokens are read as such, and the one that begins a text goes
    in front where the tokenizer has one and the prompt does not begin with it."""
    ids = self.tokenizer.encode(text, special=True)
    bos = self.tokenizer.bos_id
    return tuple(ids if bos is None or ids[:1] == [bos] else [bos, *ids])

  def encode_chat(self, messages: Sequence[Any]) -> tuple[int, ...]:
    """Tokens that an answer follows. Raises ValueError for what is no chat."""
    if self.template is None:
      raise ValueError(f"{self.name} has no chat template")
    plain = [_plain(message) for message in messages]
    ids = encode_prompt(plain, self.tokenizer, self.template)
    return tuple(ids.tolist())

  def detokenizer(self) -> IncrementalDetokenizer:
    """Text of tokens as they come."""
    return IncrementalDetokenizer(self.tokenizer)

  @functools.cached_property
  def pieces(self) -> list[bytes]:
    """The bytes of every token, [V]; special tokens by their names."""
    pieces = list(self.tokenizer.token_bytes())
    for name, i in self.tokenizer.special_tokens.items():
      pieces[i] = name.encode()
    return pieces + [b""] * (self.vocab_size - len(pieces))


def _plain(message: Any) -> Any:
  """Content given in parts, as one text."""
  if not isinstance(message, dict) or not isinstance(message.get("content"), list):
    return message
  parts = message["content"]
  for part in parts:
    if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
      raise ValueError(f"content: expected parts of type text, found {part!r:.60}")
  return message | {"content": "".join(str(part["text"]) for part in parts)}
