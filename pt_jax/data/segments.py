"""Divides what the assistant wrote in one turn into thinking, tool calls and answer.

The division has no rest. Tags belong to what they enclose, spaces in front of a tag too, and
spaces behind reasoning. The token that closes the turn belongs to the call if nothing else follows
one (the model must learn to stop after it), to the answer otherwise, even to an empty one.
"""

import re
from collections.abc import Collection
from typing import Any

from pt_jax.data.chat_templates import ChatTemplate

SEGMENTS = ("think", "tool_call", "answer")


def divide(
  before: str,
  turn: str,
  message: dict[str, Any],
  template: ChatTemplate,
  special_tokens: Collection[str],
) -> list[tuple[str, int]]:
  """Returns kind and first character, counted in `turn`, of each segment in order.

  Args:
    before: the prompt; if it ends with the tag that opens reasoning, the turn starts inside.
    turn: what the assistant wrote, with the token that closes the turn.
    message: the message that was rendered.
  Raises:
    ValueError: the tags in the text do not fit the fields of the message.
  """
  segments = _scan(before, turn, template, special_tokens)
  thinks, calls = (sum(kind == k for k, _ in segments) for kind in ("think", "tool_call"))
  given_calls = len(message.get("tool_calls", []))
  alone = not (message.get("content") or message.get("reasoning_content"))
  if given_calls == 1 and not calls and alone:
    return [("tool_call", 0)]  # a call without tags (Llama 3.1) is all there is
  if message.get("reasoning_content", "").strip() and thinks != 1:
    raise ValueError(_misfit("reasoning", 1, thinks, template.think, template))
  if given_calls and calls != given_calls:
    raise ValueError(_misfit("tool_calls", given_calls, calls, template.tool_call, template))
  for (kind, a), (_, b) in zip(segments, [*segments[1:], ("", len(turn))]):
    if kind == "answer" and any(tag in turn[a:b] for tag in template.think + template.tool_call):
      raise ValueError(f"a tag without its partner in {turn[a:b]!r:.60}")
  return segments


def _scan(
  before: str, turn: str, template: ChatTemplate, special_tokens: Collection[str]
) -> list[tuple[str, int]]:
  think, call = (tuple(map(re.escape, tags)) for tags in (template.think, template.tool_call))
  inside = rf"\A.*?{think[1]}\s*|" if before.rstrip().endswith(template.think[0]) else ""
  pattern = rf"(?P<think>{inside}\s*{think[0]}.*?{think[1]}\s*)|\s*{call[0]}.*?{call[1]}"
  segments, at = [], 0
  for match in re.finditer(pattern, turn, re.DOTALL):
    if match.start() > at:
      segments.append(("answer", at))
    segments.append(("think" if match["think"] else "tool_call", match.start()))
    at = match.end()
  rest = turn[at:]
  for token in special_tokens:
    rest = rest.replace(token, "")
  if rest.strip() or not segments or segments[-1][0] != "tool_call":
    segments.append(("answer", at))
  return segments


def _misfit(field: str, given: int, found: int, tags: tuple[str, str], template: ChatTemplate):
  return (
    f"the message has {given} {field}, but template {template.name!r} shows {found} between "
    f"{tags[0]!r} and {tags[1]!r}"
  )
