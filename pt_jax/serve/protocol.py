"""Requests: JSON of OpenAI's API, checked, to what the engine is asked for.

A field that is not known, or not supported, is an error that names it: an option that is silently
ignored would change what an experiment measures. Fields that only name the caller are let through.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import jsonschema
import jsonschema.exceptions

from pt_jax.rollout.constraints import Constraint, json_schema, regex
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.serve.errors import ApiError, invalid, too_long
from pt_jax.serve.served import Served

MOST_LOGPROBS = 20  # tokens beside the chosen one, as in OpenAI's API
MOST_STOPS = 16
DEFAULT_TOKENS = 16  # of a completion without max_tokens, as in OpenAI's API; chats fill the window
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one client may ask for."""

  body_bytes: int = 4 << 20
  """Size of a request."""
  samples: int = 128
  """Completions of one request: prompts times n."""
  queue: int = 512
  """Completions of all requests that run or wait; more are answered 429."""
  seconds: float = 600.0
  """From a request's arrival to the end of its answer; later is answered 504."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) <= 0:
        found = getattr(self, field.name)
        raise ValueError(f"limits: {field.name}: expected more than 0, found {found}")


@dataclasses.dataclass(frozen=True)
class Ask:
  """A request, checked and tokenized."""

  chat: bool
  prompts: tuple[tuple[int, ...], ...]
  echoes: tuple[str, ...]  # texts of the prompts, where they are to be given back
  sampling: SamplingParams
  draw: bool  # False: only the prompt's log-probs are wanted
  n: int
  seed: int | None
  logprobs: int | None  # tokens beside the chosen one; None: no log-probs
  stream: bool
  include_usage: bool

  @property
  def echo(self) -> bool:
    """Whether answers begin with their prompts."""
    return bool(self.echoes)


_INTEGER = {"type": "integer"}
_ANYTHING: dict[str, Any] = {}
_SHARED = {
  "model": {"type": "string"},
  "temperature": {"type": "number", "minimum": 0, "maximum": 2},
  "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
  "top_k": _INTEGER,  # -1 and 0 keep all
  "min_p": {"type": "number", "minimum": 0, "maximum": 1},
  "n": _INTEGER | {"minimum": 1},
  "max_tokens": _INTEGER | {"minimum": 0},
  "stop": {
    "anyOf": [
      {"type": "string", "minLength": 1},
      {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MOST_STOPS},
    ]
  },
  "seed": _INTEGER,
  "stream": {"type": "boolean"},
  "stream_options": {
    "type": "object",
    "properties": {"include_usage": {"type": "boolean"}},
    "additionalProperties": False,
  },
  "response_format": {"type": "object", "required": ["type"]},
  "regex": {"type": "string", "minLength": 1},  # an extension: the form of the answer
  # Supported at the values that change nothing.
  "presence_penalty": {"const": 0},
  "frequency_penalty": {"const": 0},
  "logit_bias": {"type": "object", "maxProperties": 0},
  **dict.fromkeys(("user", "metadata", "store", "safety_identifier"), _ANYTHING),
}
_COMPLETION = {
  "prompt": _ANYTHING,  # read by `_prompts`
  "echo": {"type": "boolean"},
  "logprobs": _INTEGER | {"minimum": 0, "maximum": MOST_LOGPROBS},
  "best_of": _INTEGER,
  "suffix": {"const": ""},
}
_CHAT = {
  "messages": {"type": "array", "minItems": 1},
  "max_completion_tokens": _INTEGER | {"minimum": 1},
  "logprobs": {"type": "boolean"},
  "top_logprobs": _INTEGER | {"minimum": 0, "maximum": MOST_LOGPROBS},
  "tools": {"type": "array", "maxItems": 0},
  "tool_choice": {"const": "none"},
}


def _validator(required: str, fields: dict[str, Any]) -> jsonschema.Draft202012Validator:
  return jsonschema.Draft202012Validator(
    {
      "type": "object",
      "properties": _SHARED | fields,
      "required": ["model", required],
      "additionalProperties": False,
    }
  )


_COMPLETIONS, _CHATS = _validator("prompt", _COMPLETION), _validator("messages", _CHAT)


async def receive(chunks: AsyncIterator[bytes], limits: Limits) -> dict[str, Any]:
  """A request's JSON object. Raises ApiError as soon as it is too long, or takes too long."""
  data = bytearray()
  try:
    async with asyncio.timeout(limits.seconds):
      async for chunk in chunks:
        data += chunk
        if len(data) > limits.body_bytes:
          message = f"the body: expected at most {limits.body_bytes} bytes"
          raise ApiError(413, message, code="body_too_large")
  except TimeoutError:
    message = f"the body did not come within {limits.seconds:g} s"
    raise ApiError(408, message, code="timeout") from None
  return read_body(bytes(data))


def read_body(data: bytes) -> dict[str, Any]:
  """A request's JSON object. Raises ApiError for anything else, also for text that is not
  Unicode and numbers that are none."""
  try:
    body = json.loads(data, parse_constant=_no_number)
    json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
  except (ValueError, RecursionError) as error:
    raise invalid(None, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from error
  if not isinstance(body, dict):
    raise invalid(None, f"expected a JSON object, found {type(body).__name__}")
  return body


def read_completion(body: dict[str, Any], served: Served, limits: Limits) -> Ask:
  """A request to /v1/completions. Raises ApiError."""
  given = _checked(body, _COMPLETIONS, served)
  n, echo = given.get("n", 1), given.get("echo", False)
  if given.get("best_of", n) != n:
    raise invalid("best_of", f"best_of: expected n ({n}) or nothing, found {given['best_of']}")
  pairs = [_prompt(prompt, served) for prompt in _prompts(given["prompt"])]
  prompts = tuple(ids for ids, _ in pairs)
  max_tokens = given.get("max_tokens", DEFAULT_TOKENS)
  logprobs = given.get("logprobs")
  if max_tokens == 0 and not echo:
    raise invalid("max_tokens", "max_tokens: expected at least 1 without echo, found 0")
  if echo and logprobs is not None and given.get("stream"):
    raise invalid("echo", "echo with logprobs is not streamed: leave out stream")
  if echo and logprobs is not None and not served.scores:
    raise invalid("echo", "this server was started without log-probs of prompts")
  for prompt in prompts:
    _check_length(len(prompt), max_tokens, served, "prompt")
  return Ask(
    chat=False,
    prompts=prompts,
    echoes=tuple(text for _, text in pairs) if echo else (),
    sampling=_sampling(given, served, max(1, max_tokens), logprobs),
    draw=max_tokens > 0,
    logprobs=logprobs,
    **_how(given, len(prompts), limits),
  )


def read_chat(body: dict[str, Any], served: Served, limits: Limits) -> Ask:
  """A request to /v1/chat/completions. Raises ApiError."""
  given = _checked(body, _CHATS, served)
  if given.get("top_logprobs") and not given.get("logprobs"):
    raise invalid("top_logprobs", "top_logprobs: expected none without logprobs: true")
  if {"max_tokens", "max_completion_tokens"} <= given.keys():
    raise invalid("max_tokens", "expected max_tokens or max_completion_tokens, found both")
  try:
    prompt = served.encode_chat(given["messages"])
  except ValueError as error:
    raise invalid("messages", f"messages: {' '.join(str(error).split())[:300]}") from error
  rest = served.max_length - len(prompt)
  max_tokens = given.get("max_completion_tokens", given.get("max_tokens", max(1, rest)))
  if max_tokens == 0:
    raise invalid("max_tokens", "max_tokens: expected at least 1, found 0")
  _check_length(len(prompt), max_tokens, served, "messages")
  logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
  return Ask(
    chat=True,
    prompts=(prompt,),
    echoes=(),
    sampling=_sampling(given, served, max_tokens, logprobs),
    draw=True,
    logprobs=logprobs,
    **_how(given, 1, limits),
  )


def _checked(
  body: dict[str, Any], validator: jsonschema.Draft202012Validator, served: Served
) -> dict[str, Any]:
  """The fields that are given; null is not given."""
  given = {name: value for name, value in body.items() if value is not None}
  error = jsonschema.exceptions.best_match(validator.iter_errors(given))
  if error is not None:
    param = str(error.absolute_path[0]) if error.absolute_path else None
    message = f"{param}: {error.message}" if param else error.message
    raise invalid(param, " ".join(message.split())[:300])
  if given["model"] != served.name:
    raise _no_model(given["model"], served)
  return given


def _no_model(name: str, served: Served) -> Exception:
  error = invalid("model", f"model: no {name!r:.80} here, only {served.name!r}", "model_not_found")
  error.status = 404
  return error


def _how(given: dict[str, Any], prompts: int, limits: Limits) -> dict[str, Any]:
  n = given.get("n", 1)
  if n * prompts > limits.samples:
    raise invalid(
      "n", f"n: expected at most {limits.samples} completions a request, found {n * prompts}"
    )
  stream, options = given.get("stream", False), given.get("stream_options")
  if options is not None and not stream:
    raise invalid("stream_options", "stream_options: expected none without stream: true")
  seed = given.get("seed")
  return {
    "n": n,
    "seed": None if seed is None else seed % SEEDS,
    "stream": stream,
    "include_usage": bool((options or {}).get("include_usage")),
  }


def _sampling(
  given: dict[str, Any], served: Served, max_tokens: int, logprobs: int | None
) -> SamplingParams:
  stop = given.get("stop", [])
  try:
    constraint = _constraint(given)
  except ValueError as error:
    raise invalid("regex" if "regex" in given else "response_format", str(error)) from error
  if constraint is not None:
    served.check(constraint)
  return SamplingParams(
    max_tokens=max_tokens,
    temperature=float(given.get("temperature", 1.0)),
    top_k=max(0, given.get("top_k", 0)),
    top_p=float(given.get("top_p", 1.0)),
    min_p=float(given.get("min_p", 0.0)),
    stop_tokens=served.stop_tokens,
    stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
    constraint=constraint,
    top_logprobs=logprobs or 0,
  )


def _constraint(given: dict[str, Any]) -> Constraint | None:
  """The form that the answer has to have."""
  form, pattern = given.get("response_format", {"type": "text"}), given.get("regex")
  kind = form["type"]
  if pattern is not None:
    if kind != "text":
      raise invalid("regex", "expected regex or response_format, found both")
    return regex(pattern)
  if kind == "text":
    return None
  if kind == "json_object":
    return json_schema({"type": "object"})
  schema = form.get("json_schema")
  if kind == "json_schema" and isinstance(schema, dict):
    form_of = schema.get("schema")
    if isinstance(form_of, dict | bool):
      return json_schema(form_of)
  raise invalid(
    "response_format",
    "response_format: expected type text, json_object, or json_schema with json_schema.schema, "
    f"found {json.dumps(form)[:100]}",
  )


def _prompts(prompt: Any) -> Sequence[Any]:
  """A string, strings, token ids, or lists of them, as a list of prompts."""
  if isinstance(prompt, str):
    return [prompt]
  if isinstance(prompt, list) and prompt:
    if all(isinstance(item, str) for item in prompt):
      return prompt
    if _are_ids(prompt):
      return [prompt]
    if all(isinstance(item, list) and item and _are_ids(item) for item in prompt):
      return prompt
  raise invalid(
    "prompt", "prompt: expected a string, strings, token ids or lists of token ids, not empty"
  )


def _are_ids(items: list[Any]) -> bool:
  return all(type(item) is int for item in items)


def _prompt(prompt: str | list[int], served: Served) -> tuple[tuple[int, ...], str]:
  """Tokens and text of one prompt."""
  if isinstance(prompt, str):
    ids = served.encode(prompt)
    if not ids:
      raise invalid("prompt", "prompt: expected at least one token, found an empty string")
    return ids, prompt
  if wrong := [i for i in prompt if not 0 <= i < served.vocab_size]:
    raise invalid(
      "prompt", f"prompt: expected token ids from 0 to {served.vocab_size - 1}, found {wrong[0]}"
    )
  return tuple(prompt), served.tokenizer.decode(prompt)


def _check_length(length: int, max_tokens: int, served: Served, param: str) -> None:
  if length + max_tokens > served.max_length:
    raise too_long(
      f"{param}: this server's context is {served.max_length} tokens, found {length} of the "
      f"prompt and {max_tokens} to generate",
      param,
    )


def _no_number(text: str) -> NoReturn:
  raise ValueError(f"{text} is no number of JSON")
