"""Chat messages: what a row may hold, and the form in which templates read it."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("role", "content", "reasoning", "tool_calls", "name", "tool_call_id")
# Data sets name it differently; templates read the last two.
REASONING_NAMES = ("reasoning", "reasoning_content", "thinking")


class Message(TypedDict, total=False):
  """One message of a chat."""

  role: Required[Literal["system", "user", "assistant", "tool"]]
  content: str  # may be missing beside tool_calls
  reasoning: str  # also read from `reasoning_content` or `thinking`
  tool_calls: Sequence[Mapping[str, Any]]  # {"function": {"name": str, "arguments": object}}
  name: str
  tool_call_id: str


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
  """Puts `where` in front of the message of a ValueError raised inside."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
  """Returns the messages in the form that templates read.

  Fields that are None are dropped, reasoning gets the names that transformers gives it, `arguments`
  given as a string of JSON become an object.

  Raises:
    ValueError: naming the message and the field.
  """
  if not isinstance(messages, (list, tuple)) or not messages:
    raise ValueError(f"expected a list of messages, found {messages!r:.60}")
  checked = []
  for i, message in enumerate(messages):
    with located(f"message {i}"):
      checked.append(_check_message(message))
  return checked


def _check_message(message: Message) -> dict[str, Any]:
  if not isinstance(message, dict):
    raise ValueError(f"expected an object with role and content, found {message!r:.60}")
  given = {k: v for k, v in message.items() if v is not None}
  for key in given:
    if key not in FIELDS and key not in REASONING_NAMES:
      raise ValueError(f"unknown field {key!r}, expected one of {', '.join(FIELDS)}")
  if given.get("role") not in ROLES:
    raise ValueError(f"role is {given.get('role')!r}, expected one of {', '.join(ROLES)}")
  calls = _check_calls(given.pop("tool_calls", []))
  for key, value in given.items():
    _check_text(key, value)
  reasonings = {given.pop(name) for name in REASONING_NAMES if name in given}
  if given["role"] != "assistant" and (calls or reasonings):
    raise ValueError(f"tool_calls and reasoning are the assistant's, role is {given['role']!r}")
  if len(reasonings) > 1:
    raise ValueError(f"two different texts under the names {', '.join(REASONING_NAMES)}")
  if not calls and "content" not in given:
    raise ValueError("content is missing")
  for reasoning in reasonings:
    given |= {"thinking": reasoning, "reasoning_content": reasoning}
  return given | ({"tool_calls": calls} if calls else {})


def _check_text(key: str, value: Any) -> None:
  if not isinstance(value, str):
    raise ValueError(f"{key} must be a string, found {value!r:.60}")
  if found := re.search("[\ufdd0-\ufdd5]", value):  # chat_templates.py marks positions with them
    raise ValueError(f"{key} holds the noncharacter U+{ord(found.group()):X}")


def _check_calls(calls: Any) -> list[dict[str, Any]]:
  if not isinstance(calls, (list, tuple)):
    raise ValueError(f"tool_calls must be a list, found {calls!r:.60}")
  return [_check_call(call) for call in calls]


def _check_call(call: Any) -> dict[str, Any]:
  function = call.get("function", call) if isinstance(call, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get("name"), str):
    raise ValueError(f"a tool call needs a function with a name, found {call!r:.60}")
  arguments = function.get("arguments", {})
  if isinstance(arguments, str):
    with contextlib.suppress(json.JSONDecodeError):
      arguments = json.loads(arguments)
  if not isinstance(arguments, dict):
    raise ValueError(
      f"arguments of tool call {function['name']!r} are no object: {arguments!r:.60}"
    )
  _check_text("tool_calls", json.dumps(function, ensure_ascii=False, default=repr))
  extra = {k: call[k] for k in ("id", "type") if k in call}
  return extra | {"function": {"name": function["name"], "arguments": arguments}}
