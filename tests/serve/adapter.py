"""The engine's streaming interface on top of `generate`: one request a step, in pieces of three."""

import dataclasses

from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import Output, StopReason


class Adapter:
  def __init__(self, engine: Engine):
    self._engine, self._waiting, self._next = engine, {}, 0
    self.figures, self.aborted, self.generate = engine.figures, [], engine.generate

  @property
  def unfinished(self):
    return bool(self._waiting)

  def submit(self, prompt, sampling, *, key, n=1):
    if len(prompt) >= self._engine.max_length:
      raise ValueError("too long")
    self._next += 1
    self._waiting[self._next] = (prompt, sampling, key, n, [])
    return self._next

  def abort(self, request):
    self._waiting.pop(request, None)
    self.aborted.append(request)

  def step(self):
    request = next(iter(self._waiting))
    prompt, sampling, key, n, pieces = self._waiting[request]
    if not pieces:
      plain = dataclasses.replace(sampling, constraint=None, top_logprobs=0)
      out = self._engine.generate([prompt], plain, key=key, n=n)
      for i in range(n):
        a, b = int(out.prompt_length[i]), int(out.length[i])
        for start in range(a, b, 3):
          end = min(start + 3, b)
          stop = StopReason(int(out.stop[i])) if end == b else None
          tokens = tuple(out.tokens[i, start:end].tolist())
          logprobs = tuple(out.logprobs[i, start:end].tolist())
          top = tuple(((t, p),) for t, p in zip(tokens, logprobs)) if sampling.top_logprobs else ()
          pieces.append(Output(request, i, tokens, logprobs, "", stop, 0, top))
    output = pieces.pop(0)
    if not pieces:
      self._waiting.pop(request)
    return [output]
