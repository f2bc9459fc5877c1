"""The tokenizer over HTTP, as vLLM has it: lm-eval then needs no tokenizer of its own."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pt_jax.serve import protocol
from pt_jax.serve.errors import ApiError, invalid
from pt_jax.serve.protocol import Limits
from pt_jax.serve.served import Served


def routes(served: Served, limits: Limits) -> list[Route]:
  """GET /tokenizer_info, POST /tokenize and POST /detokenize."""

  async def info(_: Request) -> Response:
    named = served.tokenizer.template_variables
    template = served.template.source if served.template else None
    tokens = {name: named.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return JSONResponse(tokens | {"chat_template": template})

  async def tokenize(request: Request) -> Response:
    return await _answered(request, lambda body: _tokenize(body, served), limits)

  async def detokenize(request: Request) -> Response:
    return await _answered(request, lambda body: _detokenize(body, served), limits)

  return [
    Route("/tokenizer_info", info),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
  ]


async def _answered(request: Request, answer: Any, limits: Limits) -> Response:
  try:
    body = await protocol.receive(request.stream(), limits)
    return JSONResponse(await asyncio.to_thread(answer, body))
  except ApiError as error:
    return JSONResponse(error.body(), error.status, error.headers())


def _tokenize(body: dict[str, Any], served: Served) -> dict[str, Any]:
  """Tokens of `prompt`, with the one that begins a text unless `add_special_tokens` is false."""
  text, begins = body.get("prompt"), body.get("add_special_tokens", True)
  if not isinstance(text, str) or not isinstance(begins, bool):
    raise invalid("prompt", "expected a string prompt and perhaps add_special_tokens: false")
  ids = list(served.encode(text)) if begins else served.tokenizer.encode(text, special=True)
  return {"tokens": ids, "count": len(ids), "max_model_len": served.max_length}


def _detokenize(body: dict[str, Any], served: Served) -> dict[str, Any]:
  """The text of `tokens`."""
  ids = body.get("tokens")
  if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
    raise invalid("tokens", "tokens: expected a list of token ids")
  return {"prompt": served.tokenizer.decode(ids)}
