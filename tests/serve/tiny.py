"""A tiny byte-level model behind a server on a free port, and a client of few lines."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import uvicorn

from launch.serve import Server
from pt_jax import sharding
from pt_jax.data.chat_templates import load_template
from pt_jax.data.tokenizers import ByteTokenizer
from pt_jax.models.config import ModelConfig
from pt_jax.serve.app import make_app
from pt_jax.serve.load import Source
from pt_jax.serve.metrics import Metrics
from pt_jax.serve.protocol import Limits
from pt_jax.serve.score import Scorer
from pt_jax.serve.worker import Worker
from tests.rollout import tiny

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(
  vocab_size=TOKENIZER.vocab_size,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=48,
  max_length=128,
  qk_norm=True,
  remat="none",
)
NAME, LENGTH, SLOTS = "tiny", 96, 8


@contextlib.contextmanager
def serving(
  engine: Callable[[], Any], params: Any, limits: Limits | None = None
) -> Iterator["Client"]:
  """A server in threads of this process."""
  source = Source(MODEL, TOKENIZER, load_template("chatml"), lambda mesh: params)
  served, metrics = source.served(NAME, LENGTH, scores=True), Metrics()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  worker = Worker(NAME, lambda: (engine(), Scorer(MODEL, params, 20)), mesh, metrics)
  app = make_app(served, worker, metrics, limits or Limits())
  config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
  server = Server(config, worker, seconds=20)
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    assert thread.is_alive(), "the server did not start"
    time.sleep(0.01)
  client = Client(server.servers[0].sockets[0].getsockname()[1])
  client.server, client.worker = server, worker
  try:
    yield client
  finally:
    server.should_exit = True
    thread.join()


def params(seed: int = 0) -> Any:
  """Weights with opinions."""
  return tiny.params(seed, MODEL)


class Client:
  """Talks to a server on this machine."""

  server: Server
  worker: Worker

  def __init__(self, port: int):
    self.port = port

  def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
    """Sends a request and returns the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"})
    return connection

  def send(self, method: str, path: str, body: Any = None) -> tuple[int, dict, bytes]:
    """Status, headers and body of an answer."""
    with contextlib.closing(self.open(method, path, body)) as connection:
      response = connection.getresponse()
      return response.status, dict(response.getheaders()), response.read()

  def get(self, path: str) -> Any:
    """The JSON of a GET that must succeed."""
    status, _, body = self.send("GET", path)
    assert status == 200, body
    return json.loads(body)

  def post(self, path: str, **fields: Any) -> Any:
    """The JSON of a POST that must succeed."""
    status, _, body = self.send("POST", path, {"model": NAME} | fields)
    assert status == 200, body
    return json.loads(body)

  def complete(self, **fields: Any) -> Any:
    """A text completion."""
    return self.post("/v1/completions", **fields)

  def chat(self, text: str, **fields: Any) -> Any:
    """A chat of one message."""
    messages = [{"role": "user", "content": text}]
    return self.post("/v1/chat/completions", messages=messages, **fields)

  def stream(self, path: str, **fields: Any) -> list[Any]:
    """The events of a stream, which must end with [DONE]."""
    status, headers, body = self.send("POST", path, {"model": NAME, "stream": True} | fields)
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), body
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

  def figure(self, name: str) -> float:
    """A value of /metrics, summed over its labels."""
    _, _, text = self.send("GET", "/metrics")
    lines = [line for line in text.decode().splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
