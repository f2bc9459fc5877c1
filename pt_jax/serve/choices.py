"""One completion as a client sees it: text as it becomes certain, log-probs, why it ended."""

import dataclasses
from typing import Any

from pt_jax.rollout.rollouts import Output, StopReason
from pt_jax.serve.protocol import Ask
from pt_jax.serve.score import Scores
from pt_jax.serve.served import Served

FINISH = {
  StopReason.TOKEN: "stop",
  StopReason.STRING: "stop",
  StopReason.LENGTH: "length",
  StopReason.BUDGET: "length",
  StopReason.ABORTED: "abort",
  StopReason.FAILED: "abort",
}


@dataclasses.dataclass(frozen=True)
class Token:
  """A token with its log-prob and those of the most likely ones in its place."""

  id: int
  logprob: float | None  # None: nothing stands before it
  top: tuple[tuple[int, float], ...]
  offset: int  # characters of the text before it


@dataclasses.dataclass(frozen=True)
class Delta:
  """What is new of a completion."""

  text: str
  tokens: tuple[Token, ...]
  finish: str | None


class Choice:
  """Follows one completion. Its text has no stop token, no stop string and no half character; what
  may become the beginning of a stop string is held back until it is certain."""

  def __init__(self, served: Served, ask: Ask, prompt: int = 0):
    """
    Args:
      served: the model.
      ask: the request.
      prompt: which of its prompts is completed.
    """
    self._stops = ask.sampling.stop_strings
    self._stop_tokens = ask.sampling.stop_tokens
    self._detokenizer = served.detokenizer()
    self._held = ""  # certain, but perhaps the beginning of a stop string
    self._cut = False  # a stop string was found
    self._base = len(ask.echoes[prompt]) if ask.echo else 0
    self._kept = ask.logprobs
    self.count = 0  # tokens so far

  def push(self, output: Output) -> Delta:
    """Takes what the engine drew."""
    shown, tokens = "", []
    final = output.stop is not None
    self.count += len(output.tokens)
    top = output.top_logprobs or [()] * len(output.tokens)
    for i, (token, logprob) in enumerate(zip(output.tokens, output.logprobs)):
      if self._kept is not None:
        offset = self._base + len(self._detokenizer.text)
        tokens.append(Token(token, logprob, tuple(top[i])[: self._kept], offset))
      is_end = output.stop == StopReason.TOKEN and i == len(output.tokens) - 1
      shown += "" if is_end else self._text(self._detokenizer.push(token))
    if final:
      shown += self._text(self._detokenizer.flush())
      shown, self._held = shown + self._held, ""
    return Delta(shown, tuple(tokens), FINISH[output.stop] if output.stop is not None else None)

  def _text(self, piece: str) -> str:
    """What can be shown now that `piece` has become certain."""
    if self._cut or not self._stops:
      return "" if self._cut else piece
    text = self._held + piece
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self._cut, self._held = True, ""
      return text[: min(found)]
    keep = _open_end(text, self._stops)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]


def _open_end(text: str, stops: tuple[str, ...]) -> int:
  """Length of the longest end of `text` that one of `stops` begins with."""
  longest = min(len(text), max(map(len, stops)) - 1)
  ends = (k for k in range(longest, 0, -1) if any(s.startswith(text[-k:]) for s in stops))
  return next(ends, 0)


def prompt_tokens(served: Served, prompt: tuple[int, ...], scores: Scores, k: int) -> list[Token]:
  """The prompt's tokens with their log-probs."""
  detokenizer, tokens = served.detokenizer(), []
  for t, token in enumerate(prompt):
    top = zip(scores.top[t, :k].tolist(), scores.top_logprobs[t, :k].tolist()) if t else ()
    own = float(scores.logprobs[t]) if t else None
    tokens.append(Token(token, own, tuple(top), len(detokenizer.text)))
    detokenizer.push(token)
  return tokens


def completion_logprobs(served: Served, tokens: list[Token] | tuple[Token, ...]) -> dict[str, Any]:
  """The `logprobs` of a text completion: four lists, and the chosen token among the top ones."""
  top: list[dict[str, float] | None] = []
  for token in tokens:
    named = {name(served, i): p for i, p in token.top}
    if token.logprob is not None:
      named.setdefault(name(served, token.id), token.logprob)
    top.append(named or None)
  return {
    "tokens": [name(served, token.id) for token in tokens],
    "token_logprobs": [token.logprob for token in tokens],
    "top_logprobs": top,
    "text_offset": [token.offset for token in tokens],
  }


def chat_logprobs(served: Served, tokens: tuple[Token, ...]) -> dict[str, Any]:
  """The `logprobs` of a chat completion."""

  def entry(i: int, logprob: float | None) -> dict[str, Any]:
    piece = served.pieces[i]
    return {"token": name(served, i), "logprob": logprob, "bytes": list(piece)}

  content = [
    entry(t.id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top]} for t in tokens
  ]
  return {"content": content, "refusal": None}


def name(served: Served, token: int) -> str:
  """A token as text, as OpenAI and vLLM write those that are none: "bytes:\\xc3", "token_id:7"."""
  piece = served.pieces[token]
  if not piece:
    return f"token_id:{token}"
  try:
    return piece.decode()
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
