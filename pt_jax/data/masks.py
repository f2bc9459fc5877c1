"""Which tokens of a chat are trained: exact masks, by assistant turn or by segment of a turn.

Where an assistant turn stands in the text:

- It starts where the prompt that it answered ends: the messages before it, rendered with the
  generation prompt.
- It ends where the rendering of the messages up to it ends, without the spaces behind the token
  that closes the turn (a rollout stops at that token). An `eos_token` that the template writes
  behind a whole chat (Phi-3) belongs to the last turn only.
- If the template has `{% generation %}` blocks, they say which part of the turn is trained, as in
  transformers' `return_assistant_tokens_mask`. A template without them loses nothing.

Both renderings must be beginnings of the whole one. Otherwise what would be trained is not what the
model will see (Qwen3 drops the reasoning of earlier turns), and that is an error.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pt_jax.data.chat import Chat, Tools
from pt_jax.data.chat_templates import ChatTemplate, Rendering
from pt_jax.data.messages import Message, check_messages, located
from pt_jax.data.segments import SEGMENTS, divide
from pt_jax.data.tokenizers import Encoding, Tokenizer

KINDS = ("assistant", *SEGMENTS, "tool_result")


@dataclasses.dataclass(frozen=True)
class Span:
  """A trained range of tokens, half-open."""

  kind: str  # one of KINDS
  message: int  # index of the message it belongs to
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class EncodedChat:
  """A chat as tokens."""

  tokens: np.ndarray  # [T] int32
  mask: np.ndarray  # [T] float32, weight of the token as a target: 1, or that of its kind
  spans: tuple[Span, ...]  # the trained ranges, in order


@dataclasses.dataclass(frozen=True)
class _Turn:
  """An assistant message in the text; ranges of characters."""

  message: int
  start: int
  end: int
  trained: tuple[tuple[int, int], ...]  # what of it is trained, if all of it is wanted


def encode_chat(
  messages: Sequence[Message],
  tokenizer: Tokenizer,
  template: ChatTemplate,
  *,
  train_on: str | Collection[str] | Mapping[str, float] = "assistant",
  turns: Literal["all", "last"] = "all",
  tools: Tools = None,
  where: str = "chat",
) -> EncodedChat:
  """Encodes a chat with the mask of the tokens to train.

  Args:
    train_on: one or more kinds of text. "assistant" is all that assistant turns generate, the token
      that closes a turn included. "think", "tool_call" and "answer" are its parts (`segments.py`).
      "tool_result" is the content of tool messages. A mapping gives the tokens of each kind a
      weight > 0, {"think": 0.1, "answer": 1.0} for example.
    turns: "last" trains only the last assistant message, and so allows templates that change
      earlier turns as a chat grows.
    tools: JSON schemas of the functions that the assistant may call.
    where: what to call the row in an error, such as "train.jsonl:17".
  Raises:
    ValueError: a wrong message or template (see `chat.render`); a turn that is rendered otherwise
      once the chat goes on; a trained message that the template leaves out; segments that cannot
      be told apart; nothing to train on.
  """
  weights = _weights(train_on)
  kinds = set(weights)
  if turns not in ("all", "last"):
    raise ValueError(f"turns is {turns!r}, expected 'all' or 'last'")
  with located(where):
    chat = Chat(check_messages(messages), template, tokenizer, tools)
    whole = chat.rendering(mark_results="tool_result" in kinds)
    starts = chat.turn_starts(whole.text)
    encoding = chat.tokenize(whole, starts)
    spans = []
    if kinds != {"tool_result"}:
      for i in _indices(chat, turns):
        spans += _turn_spans(chat, whole, _find_turn(chat, whole, starts, i), encoding, kinds)
    if "tool_result" in kinds:
      spans += _result_spans(chat, whole, encoding)
    return _masked(encoding, spans, weights)


def _weights(train_on: str | Collection[str] | Mapping[str, float]) -> dict[str, float]:
  """Kinds to be trained -> weight of their tokens."""
  names = (train_on,) if isinstance(train_on, str) else train_on
  weighed = isinstance(names, Mapping)
  weights = dict(names) if weighed else dict.fromkeys(sorted(names), 1.0)
  if not weights or set(weights) - set(KINDS):
    raise ValueError(f"train_on is {train_on!r}, expected some of {', '.join(KINDS)}")
  if weighed and "assistant" in weights and not weights.keys().isdisjoint(SEGMENTS):
    raise ValueError(f"train_on is {train_on!r}, expected a weight for the assistant or its parts")
  for kind, weight in weights.items():
    if not 0 < weight < np.inf:
      raise ValueError(f"train_on: {kind}: expected a finite weight > 0, found {weight}")
  return weights


def stop_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
  """Returns the special tokens that end an assistant turn, for a rollout's `stop_tokens`.

  They are those that the template writes behind an answer, and the tokenizer's end of text.

  Raises:
    ValueError: there is none.
  """
  chat: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  encoded = encode_chat(chat, tokenizer, template, where=f"template {template.name!r}")
  special = set(tokenizer.special_tokens.values())
  found = [int(i) for i in encoded.tokens[encoded.mask > 0] if int(i) in special]
  found += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  if not found:
    raise ValueError(
      f"template {template.name!r} closes a turn with no special token and tokenizer "
      f"{tokenizer.name} has no eos_token: a rollout could not stop"
    )
  return tuple(dict.fromkeys(found))


def _indices(chat: Chat, turns: str) -> list[int]:
  """Returns which messages are trained."""
  indices = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
  return indices if turns == "all" else indices[-1:]


def _find_turn(chat: Chat, whole: Rendering, starts: dict[int, int], i: int) -> _Turn:
  """Finds message `i` in the text of the chat."""
  if i == 0:
    raise ValueError("message 0 is the assistant's: there is no prompt that it answers")
  closed = chat.rendering(i + 1).text
  if not whole.text.startswith(closed):
    closed = closed.removesuffix(chat.tokenizer.template_variables.get("eos_token", ""))
  if i not in starts or not whole.text.startswith(closed):
    raise ValueError(_not_preserving(chat, whole.text, closed, i))
  start = starts[i]
  end = start + len(_closed(closed[start:], chat.tokenizer))
  trained = ((start, end),)
  if chat.template.has_generation_marks:
    trained = tuple((a, b) for a, b in whole.generated if a < len(closed) and b > start)
    if not trained:
      raise ValueError(f"template {chat.template.name!r} marks no generation in message {i}")
    end = max(end, trained[-1][1])
  _check_nothing_lost(chat, i, whole.text[start:end])
  return _Turn(i, start, end, trained)


def _closed(turn: str, tokenizer: Tokenizer) -> str:
  """Cuts the spaces behind the special token that closes a turn."""
  core = turn.rstrip()
  return core if core.endswith(tuple(tokenizer.special_tokens)) else turn


def _not_preserving(chat: Chat, text: str, closed: str, i: int) -> str:
  at = next((k for k, (a, b) in enumerate(zip(closed, text)) if a != b), len(text))
  return (
    f"template {chat.template.name!r} does not preserve prefixes: up to message {i} (assistant) it "
    f"writes {closed[at : at + 24]!r} where the whole chat has {text[at : at + 24]!r}; train the "
    "last turn only (turns='last') or use a template that leaves earlier turns as they were"
  )


def _check_nothing_lost(chat: Chat, i: int, turn: str) -> None:
  """Raises ValueError if the turn does not show what is to be trained."""
  message, name = chat.messages[i], chat.template.name
  tags = "|".join(map(re.escape, chat.template.think))
  parts = [("content", part) for part in re.split(tags, message.get("content", ""))]
  parts.append(("reasoning", message.get("reasoning_content", "")))
  parts += [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls", [])]
  if not any(text.strip() for _, text in parts):
    raise ValueError(f"nothing to train on: message {i} (assistant) is empty")
  for field, text in parts:
    if text.strip() not in turn:
      raise ValueError(f"template {name!r} leaves out {field} of message {i} (assistant)")


def _turn_spans(
  chat: Chat, whole: Rendering, turn: _Turn, encoding: Encoding, kinds: set[str]
) -> list[Span]:
  """Returns one turn as token spans: whole, or those of its segments that are wanted."""
  if "assistant" in kinds:
    return [Span("assistant", turn.message, *_tokens(encoding, a, b)) for a, b in turn.trained]
  with located(f"message {turn.message}"):
    before, text = whole.text[: turn.start], whole.text[turn.start : turn.end]
    message: dict[str, Any] = chat.messages[turn.message]
    segments = divide(before, text, message, chat.template, chat.tokenizer.special_tokens)
  # A token belongs to the segment in which it starts.
  first, last = _tokens(encoding, turn.trained[0][0], turn.trained[-1][1])
  starts = np.asarray(encoding.offsets)[:, 0]
  inner = np.searchsorted(starts, [turn.start + at for _, at in segments[1:]])
  edges = [first, *map(int, inner), last]
  return [
    Span(kind, turn.message, a, b)
    for (kind, _), a, b in zip(segments, edges, edges[1:])
    if kind in kinds
  ]


def _tokens(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
  """Returns the range of tokens that overlap the characters [start, end)."""
  offsets = np.asarray(encoding.offsets)
  first = np.searchsorted(offsets[:, 1], start, side="right")
  return int(first), int(np.searchsorted(offsets[:, 0], end, side="left"))


def _result_spans(chat: Chat, whole: Rendering, encoding: Encoding) -> list[Span]:
  results = [i for i, m in enumerate(chat.messages) if m["role"] == "tool" and m["content"].strip()]
  if len(results) != len(whole.result):
    raise ValueError(
      f"template {chat.template.name!r} shows {len(whole.result)} of {len(results)} tool results"
    )
  return [
    Span("tool_result", i, *_tokens(encoding, a, b)) for i, (a, b) in zip(results, whole.result)
  ]


def _masked(encoding: Encoding, spans: list[Span], weights: dict[str, float]) -> EncodedChat:
  mask = np.zeros(len(encoding.ids), np.float32)
  spans = sorted((s for s in spans if s.end > s.start), key=lambda s: s.start)
  for span in spans:
    mask[span.start : span.end] = weights[span.kind]
  if not spans:
    raise ValueError(f"nothing to train on: the chat has no {' or '.join(sorted(weights))}")
  return EncodedChat(np.asarray(encoding.ids, np.int32), mask, tuple(spans))
