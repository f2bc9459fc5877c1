"""What came of a request, in the shapes of OpenAI's API, whole or as server-sent events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from pt_jax.rollout.rollouts import Output
from pt_jax.serve.choices import (
  Choice,
  Delta,
  Token,
  chat_logprobs,
  completion_logprobs,
  prompt_tokens,
)
from pt_jax.serve.errors import ApiError, failed
from pt_jax.serve.protocol import Ask
from pt_jax.serve.served import Served
from pt_jax.serve.worker import Job, Ticket


def jobs(ask: Ask) -> list[Job]:
  """What the engine has to do, one job a prompt."""
  score = ask.echo and ask.logprobs is not None
  n = ask.n if ask.draw else 0
  return [
    Job(prompt, ask.sampling, n=n, seed=ask.seed, index=i, score=score)
    for i, prompt in enumerate(ask.prompts)
    if n or score or not ask.draw
  ]


class Answer:
  """Puts together the answer to one request."""

  def __init__(self, served: Served, ask: Ask):
    self._served, self._ask = served, ask
    self._id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{secrets.token_hex(12)}"
    self._created = int(time.time())
    self._choices = [
      Choice(served, ask, prompt) for prompt in range(len(ask.prompts)) for _ in range(ask.n)
    ]

  async def whole(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The answer in one piece. Raises ApiError where a job failed."""
    parts = await asyncio.gather(*(self._one(i, t) for i, t in enumerate(tickets)))
    choices = [choice for part in parts for choice in part]
    return self._envelope("chat.completion" if self._ask.chat else "text_completion") | {
      "choices": choices,
      "usage": self._usage(),
    }

  async def stream(self, tickets: Sequence[Ticket]) -> AsyncGenerator[bytes]:
    """The answer as server-sent events, which end with [DONE]; an error is one, and the last."""
    merged: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    readers = [asyncio.create_task(_forward(i, t, merged)) for i, t in enumerate(tickets)]
    try:
      for chunk in self._openings():
        yield chunk
      left = len(tickets)
      while left:
        prompt, event = await merged.get()
        if isinstance(event, Output):
          index = prompt * self._ask.n + event.sample
          yield self._chunk(index, self._choices[index].push(event))
        elif isinstance(event, ApiError):
          yield _event(event.body())
          return
        elif event is None:
          left -= 1
      if self._ask.include_usage:
        yield _event(self._chunk_envelope() | {"choices": [], "usage": self._usage()})
      yield b"data: [DONE]\n\n"
    finally:
      for reader in readers:
        reader.cancel()

  async def _one(self, prompt: int, ticket: Ticket) -> list[dict[str, Any]]:
    """All choices of one prompt."""
    ask, served = self._ask, self._served
    texts, finish = [""] * ask.n, ["length"] * ask.n
    tokens: list[list[Token]] = [[] for _ in range(ask.n)]
    before: list[Token] = []
    async for event in ticket.events():
      if isinstance(event, Output):
        delta = self._choices[prompt * ask.n + event.sample].push(event)
        texts[event.sample] += delta.text
        tokens[event.sample] += delta.tokens
        finish[event.sample] = delta.finish or "length"
      else:
        before = prompt_tokens(served, ask.prompts[prompt], event, ask.logprobs or 0)
    if "abort" in finish:
      raise failed("the engine aborted the request")
    echo = ask.echoes[prompt] if ask.echo else ""
    return [
      self._choice(prompt * ask.n + i, echo + texts[i], [*before, *tokens[i]], finish[i])
      for i in range(ask.n)
    ]

  def _choice(self, index: int, text: str, tokens: list[Token], finish: str) -> dict[str, Any]:
    rest = {"index": index, "finish_reason": finish, "logprobs": self._logprobs(tokens)}
    if self._ask.chat:
      return rest | {"message": {"role": "assistant", "content": text, "refusal": None}}
    return rest | {"text": text}

  def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if self._ask.logprobs is None:
      return None
    shape = chat_logprobs if self._ask.chat else completion_logprobs
    return shape(self._served, tuple(tokens))

  def _openings(self) -> list[bytes]:
    """The role that begins each chat, the prompt that an echo begins with."""
    if self._ask.chat:
      role = {"role": "assistant", "content": ""}
      return [self._raw(i, {"delta": role}) for i in range(self._ask.n)]
    if self._ask.echo:
      texts = [text for text in self._ask.echoes for _ in range(self._ask.n)]
      return [self._raw(i, {"text": text}) for i, text in enumerate(texts)]
    return []

  def _chunk(self, index: int, delta: Delta) -> bytes:
    if self._ask.chat:
      new: dict[str, Any] = {"delta": {"content": delta.text} if delta.text else {}}
    else:
      new = {"text": delta.text}
    if delta.tokens:
      new["logprobs"] = self._logprobs(delta.tokens)
    return self._raw(index, new | {"finish_reason": delta.finish})

  def _raw(self, index: int, new: dict[str, Any]) -> bytes:
    choice = {"index": index, "logprobs": None, "finish_reason": None} | new
    usage = {"usage": None} if self._ask.include_usage else {}
    return _event(self._chunk_envelope() | {"choices": [choice]} | usage)

  def _chunk_envelope(self) -> dict[str, Any]:
    return self._envelope("chat.completion.chunk" if self._ask.chat else "text_completion")

  def _envelope(self, kind: str) -> dict[str, Any]:
    return {
      "id": self._id,
      "object": kind,
      "created": self._created,
      "model": self._served.name,
    }

  def _usage(self) -> dict[str, int]:
    prompt = sum(map(len, self._ask.prompts))
    drawn = sum(choice.count for choice in self._choices)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


async def _forward(index: int, ticket: Ticket, merged: asyncio.Queue[tuple[int, Any]]) -> None:
  """Everything of one ticket into the queue of all, then None."""
  try:
    async for event in ticket.events():
      merged.put_nowait((index, event))
    merged.put_nowait((index, None))
  except ApiError as error:
    merged.put_nowait((index, error))


def _event(body: dict[str, Any]) -> bytes:
  return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
