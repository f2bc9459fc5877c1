"""Many clients at once, some of which go away, some of which ask for nonsense."""

import collections
import json
import random
import socket
import threading
import time
from typing import Any

from tests.serve import tiny

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "birds", "fly", "by", "far")
MAX_TOKENS = 12


def prompts(count: int) -> list[str]:
  """Distinct prompts of 1 to 8 words."""
  rng = random.Random(0)
  made = {" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(4 * count)}
  return sorted(made)[:count]


class Crowd:
  """So many clients, each asking again and again until the time is over.

  `expected` has the one right answer to every prompt: one that was mixed up with another request's
  is seen.
  """

  def __init__(self, client: tiny.Client, expected: dict[str, str], clients: int, seconds: float):
    self.counts: collections.Counter[str] = collections.Counter()
    self.wrong: list[Any] = []
    self._client, self._expected = client, expected
    self._end = time.monotonic() + seconds
    self._lock = threading.Lock()
    self._threads = [threading.Thread(target=self._one, args=(i,)) for i in range(clients)]

  def run(self) -> None:
    """Returns when all of them are done."""
    for thread in self._threads:
      thread.start()
    for thread in self._threads:
      thread.join()

  def _one(self, seed: int) -> None:
    rng = random.Random(seed)
    while time.monotonic() < self._end:
      prompt = rng.choice(list(self._expected))
      act = rng.choices((self._whole, self._stream, self._leave, self._nonsense), (4, 3, 3, 1))[0]
      try:
        found = act(prompt, rng)
      except Exception as error:  # a request that is lost times out
        found = f"{type(error).__name__}: {error}"
        with self._lock:
          self.wrong.append((act.__name__, prompt, found))
      with self._lock:
        self.counts[found] += 1

  def _ask(self, prompt: str, **fields: Any) -> dict[str, Any]:
    given = {"model": tiny.NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    return given | fields

  def _whole(self, prompt: str, rng: random.Random) -> str:
    status, headers, body = self._client.send("POST", "/v1/completions", self._ask(prompt))
    if status == 429:
      assert int(headers["retry-after"]) > 0
      time.sleep(rng.random())
      return "busy"
    assert status == 200, body
    assert json.loads(body)["choices"][0]["text"] == self._expected[prompt]
    return "whole"

  def _stream(self, prompt: str, rng: random.Random) -> str:
    status, _, body = self._client.send(
      "POST", "/v1/completions", self._ask(prompt, stream=True, n=2)
    )
    if status == 429:
      time.sleep(rng.random())
      return "busy"
    events = body.decode().split("\n\n")
    assert events[-2] == "data: [DONE]", events[-2]
    texts = ["", ""]
    for event in events[:-2]:
      choice = json.loads(event.removeprefix("data: "))["choices"][0]
      texts[choice["index"]] += choice["text"]
    assert texts == [self._expected[prompt]] * 2
    return "stream"

  def _leave(self, prompt: str, rng: random.Random) -> str:
    ask = self._ask(prompt, stream=rng.random() < 0.5, max_tokens=60, n=rng.randint(1, 3))
    connection = self._client.open("POST", "/v1/completions", ask)
    time.sleep(rng.random() * 0.3)
    if connection.sock:
      if rng.random() < 0.5:  # a reset in place of an orderly end
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
      connection.sock.close()
    connection.close()
    return "left"

  def _nonsense(self, prompt: str, rng: random.Random) -> str:
    fields = rng.choice(({"n": 10**6}, {"max_tokens": 10**6}, {"model": "x"}, {"colour": 1}))
    status, _, body = self._client.send("POST", "/v1/completions", self._ask(prompt, **fields))
    assert status in (400, 404) and json.loads(body)["error"]["message"], body
    return "refused"
