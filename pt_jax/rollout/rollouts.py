"""What a rollout engine takes and gives: sampling parameters, stop reasons, `Rollouts`."""

import dataclasses
import enum
from typing import Protocol

import flax.struct
import jax

from pt_jax.rollout.constraints import Constraint
from pt_jax.rollout.guides import Thinking


class Detokenizer(Protocol):
  """Turns tokens to text as they come, never showing half a character."""

  def push(self, token: int) -> str:
    """The text that became certain with this token."""
    ...


class StopReason(enum.IntEnum):
  """Why a completion ended."""

  TOKEN = 0  # sampled one of the stop tokens (it is the last token of the completion)
  LENGTH = 1  # reached max_tokens
  STRING = 2  # the text holds a stop string (the token that completed it is the last one)
  BUDGET = 3  # reached the end of the engine's window
  ABORTED = 4  # cancelled by the caller
  FAILED = 5  # its constraint could not be followed any further; the log says why


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How completions are drawn.

  Log-probs that the engine reports are of the full softmax at `temperature`, before top-k, top-p
  and min-p cut it (the distribution that the trainer differentiates).
  """

  max_tokens: int
  temperature: float = 1.0  # 0 is greedy; log-probs are then those at temperature 1
  top_k: int = 0  # keep the k most likely tokens; 0 keeps all
  top_p: float = 1.0  # keep the smallest set with this probability mass; 1 keeps all
  min_p: float = 0.0  # drop tokens less likely than min_p times the most likely one; 0 keeps all
  stop_tokens: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  top_logprobs: int = 0  # most likely tokens that are reported beside each drawn one
  constraint: Constraint | None = None  # form that a completion has to have; needs stop_tokens
  thinking: Thinking | None = (
    None  # a cap that forces the closing tag; a constraint holds behind it
  )

  def __post_init__(self):
    for field, holds, expected in (
      ("top_logprobs", self.top_logprobs >= 0, "0 or more"),
      ("constraint", self.constraint is None or self.stop_tokens, "stop_tokens beside it"),
      ("max_tokens", self.max_tokens >= 1, "at least 1"),
      ("temperature", self.temperature >= 0, "a number >= 0"),
      ("top_k", self.top_k >= 0, "0 or more"),
      ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
      ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
      ("stop_strings", all(self.stop_strings), "no empty string"),
    ):
      if not holds:
        raise ValueError(f"sampling.{field}: expected {expected}, found {getattr(self, field)!r}")


@dataclasses.dataclass(frozen=True)
class Output:
  """What is new of one completion since the last step of the engine."""

  request: int  # as `submit` returned it
  sample: int  # 0 to n - 1
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]  # of the tokens, as in `Rollouts`
  text: str  # what became certain with them, if the engine has a detokenizer
  stop: StopReason | None  # set with the last output of the completion
  version: int  # of the weights
  # Per token, `SamplingParams.top_logprobs` of (token, log-prob), the most likely first.
  top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@flax.struct.dataclass
class Rollouts:
  """Completions of a group of prompts; row i * n + j is sample j of prompt i."""

  tokens: jax.Array  # [B, S] int32, prompt then completion, right-padded with 0
  prompt_length: jax.Array  # [B] int32
  length: jax.Array  # [B] int32, prompt + completion, the stop token included
  logprobs: jax.Array  # [B, S] float32, log-prob under the weights that sampled, 0 on the prompt
  version: jax.Array  # [B, S] int32, which weights sampled each token, -1 on prompt and padding
  stop: jax.Array  # [B] int8, StopReason
  # [B, S] bool, tokens that a thinking budget forced: the policy did not choose them.
  forced: jax.Array
