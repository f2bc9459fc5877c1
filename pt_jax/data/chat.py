"""Chats to text and tokens.

Three rules hold for every template and tokenizer:

1. The string of a special token inside a message stays text: a user who writes `<|im_end|>` ends no
   turn. Markup (`<think>`) is recognised wherever it stands; see `tokenizers.py`.
2. The tokens of a chat begin with the tokens of the prompt that each of its assistant turns
   answered, so what is trained is what a rollout samples. Where a tokenizer would merge across the
   end of a prompt, the text is cut there.
3. A special token that the template writes must be in the vocabulary.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pt_jax.data.chat_templates import LITERAL, RESULT, ChatTemplate, Rendering, strip_marks
from pt_jax.data.messages import Message, check_messages, located
from pt_jax.data.tokenizers import Encoding, Tokenizer

Tools = Sequence[Mapping[str, Any]] | None  # JSON schemas of functions
_TOKEN_LIKE = r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>"


def render(
  messages: Sequence[Message],
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  tools: Tools = None,
  add_generation_prompt: bool = False,
) -> str:
  """Returns the text of a chat, as transformers' `apply_chat_template(tokenize=False)` gives it.

  Args:
    tools: JSON schemas of the functions that the assistant may call.
    add_generation_prompt: end with what opens the assistant's turn.
  Raises:
    ValueError: a message that is not one, a chat that the template refuses, a special token that
      the vocabulary lacks, or tools that the template leaves out.
  """
  chat = Chat(check_messages(messages), template, tokenizer, tools)
  return chat.rendering(prompt=add_generation_prompt).text


def encode_prompt(
  messages: Sequence[Message],
  tokenizer: Tokenizer,
  template: ChatTemplate,
  *,
  tools: Tools = None,
  where: str = "chat",
) -> np.ndarray:
  """Returns the tokens that a rollout starts from: the chat and the opening of the answer.

  `masks.encode_chat` of the same messages with an answer behind them begins with these tokens.

  Args:
    where: what to call the row in an error, such as "prompts.jsonl:17".
  Returns:
    [T] int32.
  Raises:
    ValueError: as `render`, and if the last message is the assistant's.
  """
  with located(where):
    chat = Chat(check_messages(messages), template, tokenizer, tools)
    if chat.messages[-1]["role"] == "assistant":
      raise ValueError("the last message is the assistant's, so nothing is left to answer")
    rendering = chat.rendering(prompt=True)
    return np.asarray(chat.tokenize(rendering, chat.turn_starts(rendering.text)).ids, np.int32)


@dataclasses.dataclass(frozen=True)
class Chat:
  """Checked messages with all that renders and encodes them."""

  messages: list[dict[str, Any]]  # from `check_messages`
  template: ChatTemplate
  tokenizer: Tokenizer
  tools: Tools

  def __post_init__(self):
    if self.tools and self._run(self.messages, self.tools) == self._run(self.messages, None):
      raise ValueError(f"template {self.template.name!r} leaves the tools out")

  def rendering(
    self, count: int | None = None, *, prompt: bool = False, mark_results: bool = False
  ) -> Rendering:
    """Renders the first `count` messages (all of them by default).

    Where literals and tool results stand comes from a rendering with marks around them, which must
    be the plain rendering once the marks are gone.

    Args:
      prompt: end with what opens the assistant's turn.
      mark_results: find the contents of tool messages.
    """
    messages = self.messages[:count]
    marked = [self._mark(m, mark_results) for m in messages]
    tools = self._mark_literals(self.tools)
    rendering = self._run(marked, tools, prompt)
    if (marked, tools) != (messages, self.tools):
      plain = self._run(messages, self.tools, prompt)
      if plain.text != rendering.text:
        raise ValueError(
          f"template {self.template.name!r} reads the special token in the text of a message"
        )
    self._check_special_tokens(rendering)
    return rendering

  def turn_starts(self, text: str) -> dict[int, int]:
    """Returns where in `text` the assistant turns start, by message.

    A turn starts where the prompt that it answered ends. A turn is left out if `text` does not
    begin with its prompt.
    """
    starts = {}
    for i, message in enumerate(self.messages):
      if message["role"] == "assistant" and i > 0:
        prompt = self.rendering(i, prompt=True).text
        if text.startswith(prompt):
          starts[i] = len(prompt)
    return starts

  def tokenize(self, rendering: Rendering, starts: Mapping[int, int]) -> Encoding:
    """Encodes a rendering, cut at those turn starts where the prompt's own tokens end otherwise."""
    cuts: list[int] = []
    whole = self._encode(rendering, len(rendering.text), cuts)
    for start in starts.values():
      prompt = self._encode(rendering, start, cuts)
      if whole.ids[: len(prompt.ids)] != prompt.ids:
        cuts.append(start)
        whole = self._encode(rendering, len(rendering.text), cuts)
    return whole

  def _run(self, messages, tools, prompt: bool = False) -> Rendering:
    variables = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
    return strip_marks(self.template.run({**self.tokenizer.template_variables, **variables}))

  def _mark(self, message: dict[str, Any], results: bool) -> dict[str, Any]:
    marked = self._mark_literals(message)
    if results and message["role"] == "tool" and (core := marked["content"].strip()):
      # Inside the outer spaces, so that a template that trims does the same to the marked text.
      marked["content"] = marked["content"].replace(core, RESULT[0] + core + RESULT[1], 1)
    return marked

  def _mark_literals(self, value: Any) -> Any:
    """Marks what looks like a special token in every string of a message or tool, keys included."""
    if isinstance(value, str):
      pattern = _special_pattern(tuple(self.tokenizer.special_tokens))
      return pattern.sub(rf"{LITERAL[0]}\g<0>{LITERAL[1]}", value)
    if isinstance(value, Mapping):
      return {self._mark_literals(k): self._mark_literals(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [self._mark_literals(v) for v in value]
    return value

  def _check_special_tokens(self, rendering: Rendering) -> None:
    literal = {start for start, _ in rendering.literal}
    for match in re.finditer(_TOKEN_LIKE, rendering.text):
      if match.start() not in literal and match.group() not in self.tokenizer.special_tokens:
        with located(f"template {self.template.name!r}"):
          self.tokenizer.token_id(match.group())  # markup passes, an unknown piece raises

  def _encode(self, rendering: Rendering, end: int, cuts: Sequence[int]) -> Encoding:
    """Encodes text[:end], cut at `cuts` and around literals that would become special tokens."""
    text = rendering.text
    literals = {s for s in rendering.literal if text[slice(*s)] in self.tokenizer.special_tokens}
    edges = {0, end, *cuts, *itertools.chain(*literals)}
    ids, offsets = [], []
    for a, b in itertools.pairwise(sorted(e for e in edges if e <= end)):
      piece = self.tokenizer.encode_with_offsets(
        text[a:b], special=(a, b) not in literals, first=a == 0
      )
      ids += piece.ids
      offsets += [(a + i, a + j) for i, j in piece.offsets]
    return Encoding(ids, offsets)


@functools.lru_cache(maxsize=16)
def _special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
  longest_first = sorted(special_tokens, key=len, reverse=True)
  return re.compile("|".join([*map(re.escape, longest_first), _TOKEN_LIKE]))
