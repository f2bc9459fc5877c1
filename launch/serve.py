"""Serves a model over HTTP, in the shapes of OpenAI's API, until SIGTERM or Ctrl-C.

  python -m launch.serve runs/quickstart/seed=0/params/grpo
  python -m launch.serve CHECKPOINT --port 8000 --slots 64      a folder in HF format

docs/serving.md says what it answers.
"""

import asyncio
import dataclasses
import logging
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import jax
import tyro
import uvicorn

from launch import host
from pt_jax import sharding
from pt_jax.experiment import MeshShape
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.proposals import Draft, Speculation
from pt_jax.serve.app import make_app
from pt_jax.serve.load import Source, find
from pt_jax.serve.metrics import Metrics
from pt_jax.serve.protocol import MOST_LOGPROBS, Limits
from pt_jax.serve.score import Scorer
from pt_jax.serve.served import Served
from pt_jax.serve.worker import Made, Worker
from pt_jax.weights import Params

log = logging.getLogger("pt_jax.serve")


@dataclasses.dataclass(frozen=True)
class Serve:
  """Serves a model over HTTP, in the shapes of OpenAI's API."""

  folder: Annotated[Path, tyro.conf.Positional]
  """RUN/params/STAGE, a run (its last policy), or a checkpoint in HF format."""
  host: str = "127.0.0.1"
  """Address to listen on. There is no authentication: think before making it public."""
  port: int = 8000
  """Port to listen on; 0 takes a free one, which is logged."""
  name: str | None = None
  """What clients call the model; by default the folder's name."""
  tokenizer: str | None = None
  """In place of the folder's own: "bytes", or a path."""
  template: str | None = None
  """Chat template in place of the folder's own: a built-in name, a .jinja file, or "tokenizer"."""
  max_length: int | None = None
  """Tokens of a prompt and its answer; by default the model's."""
  slots: int = 32
  """Completions decoded at once."""
  launch: int = 8
  """Tokens of a completion that are drawn before the server looks for new requests and sends."""
  speculate: int = 0
  """Tokens that are guessed at once and verified together, 1 to 16; 0 guesses none. The answers
  stay the same."""
  speculate_ngram: int = 3
  """The last tokens, at most so many, are looked up in the text: what followed is the guess."""
  speculate_draft: Path | None = None
  """A smaller model with the same tokenizer that guesses instead, a folder as the first argument.
  It draws in its own way: the same seed gives other answers than without."""
  scores: bool = True
  """Log-probs of prompts (echo with logprobs). They need the weights a second time in memory."""
  mesh: MeshShape = dataclasses.field(default_factory=lambda: MeshShape(data=1))
  """Sizes of the mesh axes."""
  limits: Limits = dataclasses.field(default_factory=Limits)
  """What one client may ask for."""
  drain_seconds: float = 30.0
  """How long SIGTERM waits for answers that are on their way; new requests are answered 503."""
  debug: bool = False
  """A traceback where an error is one line otherwise."""


class Server(uvicorn.Server):
  """uvicorn, that first drains: a signal closes the door, and what was let in is answered."""

  def __init__(self, config: uvicorn.Config, worker: Worker, seconds: float):
    super().__init__(config)
    self._worker, self._seconds = worker, seconds
    self._draining: asyncio.Task[None] | None = None
    self.failed = False
    worker.on_failure = self._fail

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Listens, and says where."""
    await super().startup(sockets)
    if self.started:
      where = self.servers[0].sockets[0].getsockname()
      log.info("serving %s on http://%s:%d", self._worker.name, *where[:2])

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """The first signal drains, the second one ends at once."""
    if self._draining is None and self.started:
      asyncio.get_running_loop().call_soon_threadsafe(self._drain)
      return
    super().handle_exit(sig, frame)

  def _drain(self) -> None:
    if self._draining is None:
      log.info("draining: %d completions are on their way", self._worker.samples)
      self._draining = asyncio.get_running_loop().create_task(self._drained())

  async def _drained(self) -> None:
    await self._worker.drain(self._seconds)
    self.should_exit = True

  def _fail(self) -> None:
    self.failed = self.should_exit = True


def main(argv: Sequence[str] | None = None) -> int:
  """Serves until it is told to stop.

  Returns the exit status: 0; 1 after an error of the engine; 2 after one line on what was wrong.
  """
  options = tyro.cli(Serve, prog="python -m launch.serve", args=argv)
  _log_to_stderr()
  try:
    server = prepare(options)
    server.run()
  except (ValueError, OSError) as error:
    if options.debug:
      traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 1 if server.failed or not server.started else 0


def _log_to_stderr() -> None:
  """Ours only: libraries that were imported have set up the root logger each in their own way."""
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  log.handlers.clear()
  log.addHandler(handler)
  log.propagate = False
  log.setLevel(logging.INFO)


def prepare(options: Serve) -> Server:
  """Everything but the listening. Raises ValueError for what cannot be served."""
  source = find(options.folder, tokenizer=options.tokenizer, template=options.template)
  served = source.served(
    options.name or options.folder.name,
    options.max_length or source.config.max_length,
    scores=options.scores,
  )
  if host.choose_platform() == "cpu":
    host.use_cpu(max(1, options.mesh.data) * options.mesh.tensor)
  mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh))
  with jax.set_mesh(mesh):
    speculation = _speculation(options, mesh)
    if speculation is not None:
      speculation.plan(source.config)  # raises for a draft that does not fit
    params = [source.params(mesh)]  # a list, so that the engine's thread can take them away
  metrics = Metrics()
  make_engine = lambda: make(source, served, params.pop(), options, speculation)
  worker = Worker(served.name, make_engine, mesh, metrics)
  app = make_app(served, worker, metrics, options.limits)
  config = uvicorn.Config(
    app,
    host=options.host,
    port=options.port,
    log_level="warning",
    access_log=False,
    timeout_graceful_shutdown=5,
    backlog=2048,
  )
  return Server(config, worker, options.drain_seconds)


def _speculation(options: Serve, mesh: jax.sharding.Mesh) -> Speculation | None:
  if not options.speculate:
    if options.speculate_draft is not None:
      raise ValueError("speculate-draft: expected --speculate of 1 or more beside it, found 0")
    return None
  draft = None
  if options.speculate_draft is not None:
    source = find(options.speculate_draft)
    draft = Draft(source.config, source.params(mesh))
  return Speculation(options.speculate, options.speculate_ngram, draft)


def make(
  source: Source,
  served: Served,
  params: Params,
  options: Serve,
  speculation: Speculation | None = None,
) -> Made:
  """The engine, and what scores prompts."""
  engine = Engine(
    source.config,
    params,
    slots=options.slots,
    max_length=served.max_length,
    detokenizer=served.detokenizer,
    grammars=served.grammars,
    launch=options.launch,
    speculation=speculation,
  )
  scorer = Scorer(source.config, params, MOST_LOGPROBS) if served.scores else None
  return engine, scorer


if __name__ == "__main__":
  sys.exit(main())
