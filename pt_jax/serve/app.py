"""The HTTP side: routes, limits, streams, and what happens when a client goes away."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pt_jax.serve import protocol, tokenizing
from pt_jax.serve.errors import ApiError, busy, failed, invalid, timed_out
from pt_jax.serve.metrics import Metrics
from pt_jax.serve.protocol import Ask, Limits
from pt_jax.serve.responses import Answer, jobs
from pt_jax.serve.served import Served
from pt_jax.serve.worker import Ticket, Worker

log = logging.getLogger("pt_jax.serve")
Read = Callable[[dict[str, Any], Served, Limits], Ask]
UNREAD = 10.0  # seconds that a stream may outlive its request, for a client that reads slowly
GONE = 499  # nginx's status for a client that did not wait; only metrics see it


def make_app(served: Served, worker: Worker, metrics: Metrics, limits: Limits) -> Starlette:
  """The ASGI application. It starts the worker, and stops it when the server stops."""
  server = Server(served, worker, metrics, limits)
  metrics.watch(server.gauges)

  @contextlib.asynccontextmanager
  async def lifespan(_: Starlette) -> AsyncIterator[None]:
    await worker.start()
    yield
    await worker.stop()

  routes = [
    Route("/v1/completions", server.completions, methods=["POST"]),
    Route("/v1/chat/completions", server.chat, methods=["POST"]),
    Route("/v1/models", server.models),
    Route("/v1/models/{name:path}", server.model),
    Route("/health", server.health),
    Route("/metrics", server.figures),
    *tokenizing.routes(served, limits),
  ]
  handlers: Any = {HTTPException: _http_error, Exception: _server_error}
  return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class Server:
  """The endpoints."""

  def __init__(self, served: Served, worker: Worker, metrics: Metrics, limits: Limits):
    self._served, self._worker = served, worker
    self._metrics, self._limits = metrics, limits

  def gauges(self) -> dict[str, float]:
    """What /metrics shows of this moment."""
    waiting, samples = self._worker.waiting, self._worker.samples
    own = {"running": samples - waiting, "waiting": waiting, "healthy": self._worker.healthy}
    return own | {f"engine_{k}": v for k, v in self._worker.figures.items()}

  async def completions(self, request: Request) -> Response:
    """POST /v1/completions."""
    return await self._counted(request, protocol.read_completion)

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await self._counted(request, protocol.read_chat)

  async def models(self, _: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [self._card()]})

  async def model(self, request: Request) -> Response:
    """GET /v1/models/NAME."""
    name = request.path_params["name"]
    if name != self._served.name:
      error = invalid("model", f"model: no {name!r:.80} here", "model_not_found")
      return JSONResponse(error.body(), 404)
    return JSONResponse(self._card())

  async def health(self, _: Request) -> Response:
    """GET /health: 200 while requests are taken, 503 otherwise."""
    healthy = self._worker.healthy
    return JSONResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

  async def figures(self, _: Request) -> Response:
    """GET /metrics."""
    return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

  def _card(self) -> dict[str, Any]:
    return {
      "id": self._served.name,
      "object": "model",
      "created": self._served.created,
      "owned_by": "pt_jax",
      "max_model_len": self._served.max_length,
    }

  async def _counted(self, request: Request, read: Read) -> Response:
    path = request.url.path
    try:
      response = await self._answer(request, read)
    except ApiError as error:
      response = JSONResponse(error.body(), error.status, error.headers())
    except ClientDisconnect:
      response = Response(status_code=GONE)
    self._metrics.requests.labels(path, str(response.status_code)).inc()
    return response

  async def _answer(self, request: Request, read: Read) -> Response:
    """Reads, submits and answers. Tickets are closed whatever happens."""
    arrived = asyncio.get_running_loop().time()
    body = await protocol.receive(request.stream(), self._limits)
    ask = await asyncio.to_thread(read, body, self._served, self._limits)
    wanted = jobs(ask)
    if (there := self._worker.samples) + sum(max(1, j.n) for j in wanted) > self._limits.queue:
      raise busy(there, self._limits.queue)
    tickets = self._worker.submit(wanted)
    self._metrics.prompt_tokens.inc(sum(map(len, ask.prompts)))
    answer, end = Answer(self._served, ask), arrived + self._limits.seconds
    if ask.stream:
      finish = lambda: self._finish(tickets, arrived)
      return EventStream(self._timed(answer.stream(tickets), end), finish, end + UNREAD)
    try:
      whole = await self._unless_gone(request, answer.whole(tickets), end)
      return JSONResponse(whole)
    finally:
      self._finish(tickets, arrived)

  def _finish(self, tickets: Sequence[Ticket], arrived: float) -> None:
    self._worker.close(tickets)
    self._metrics.whole.observe(asyncio.get_running_loop().time() - arrived)

  async def _unless_gone(self, request: Request, work: Coroutine, end: float) -> Any:
    """The result of `work`. Raises ApiError when its time is over, ClientDisconnect when nobody
    waits for it any more; it is cancelled then."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(request))
    try:
      async with asyncio.timeout_at(end):
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError:
      raise timed_out(self._limits.seconds) from None
    finally:
      gone.cancel()
      if not working.done():
        working.cancel()
    if not working.done():
      raise ClientDisconnect
    return working.result()

  async def _timed(self, chunks: AsyncGenerator[bytes], end: float) -> AsyncGenerator[bytes]:
    """The chunks, until their time is over; then an error as the last one."""
    async with contextlib.aclosing(chunks):
      while True:
        try:
          async with asyncio.timeout_at(end):
            chunk = await anext(chunks)
        except StopAsyncIteration:
          return
        except TimeoutError:
          body = json.dumps(timed_out(self._limits.seconds).body())
          yield f"data: {body}\n\n".encode()
          return
        yield chunk


class EventStream(StreamingResponse):
  """Server-sent events, with something to do at their end, however they end."""

  def __init__(self, chunks: AsyncGenerator[bytes], finish: Callable[[], None], end: float):
    """
    Args:
      chunks: what is sent.
      finish: called at the end.
      end: on the loop's clock, when to give up on a client that does not read.
    """
    super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    self._chunks, self._finish, self._end = chunks, finish, end

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends them; a client that goes away cancels the sending."""
    try:
      async with asyncio.timeout_at(self._end):
        await super().__call__(scope, receive, send)
    except (ClientDisconnect, TimeoutError) as error:
      log.debug("a stream was left: %r", error)
    finally:
      self._finish()
      await self._chunks.aclose()


async def _until_gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


async def _http_error(_: Request, error: Exception) -> Response:
  """No such route, or another method: in the shape of the others."""
  assert isinstance(error, HTTPException)
  shaped = ApiError(error.status_code, error.detail, code=error.detail.lower().replace(" ", "_"))
  return JSONResponse(shaped.body(), error.status_code, error.headers)


async def _server_error(_: Request, error: Exception) -> Response:
  log.error("a request failed", exc_info=error)
  return JSONResponse(failed("the request failed; the server's log says why").body(), 500)
