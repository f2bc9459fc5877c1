"""Errors that a client is told of, in the shape of OpenAI's API."""

from typing import Any


class ApiError(Exception):
  """An answer that is no answer."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
  ):
    """
    Args:
      status: of HTTP.
      message: one line: what, expected, found.
      kind: the API's word for whose fault it is.
      param: the field of the request.
      code: the API's word for what it is.
      retry_after: seconds after which another try may succeed.
    """
    super().__init__(message)
    self.status, self.message, self.kind = status, message, kind
    self.param, self.code, self.retry_after = param, code, retry_after

  def body(self) -> dict[str, Any]:
    """The JSON of the answer."""
    return {
      "error": {
        "message": self.message,
        "type": self.kind,
        "param": self.param,
        "code": self.code,
      }
    }

  def headers(self) -> dict[str, str]:
    """`Retry-After` where there is one."""
    return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
  """A request that cannot be answered, whenever it comes."""
  return ApiError(400, message, param=param, code=code)


def too_long(message: str, param: str) -> ApiError:
  """A prompt that does not fit, under the code that clients look for."""
  return invalid(param, message, "context_length_exceeded")


def failed(message: str) -> ApiError:
  """What is the server's fault."""
  return ApiError(500, message, kind="server_error", code="internal_error")


def timed_out(seconds: float) -> ApiError:
  """A request that took longer than it may."""
  message = f"no whole answer within {seconds:g} s, which is this server's limit"
  return ApiError(504, message, kind="server_error", code="timeout")


def busy(waiting: int, limit: int) -> ApiError:
  """More work than is taken on at once."""
  message = f"{waiting} completions are on their way, of at most {limit}: try again later"
  return ApiError(429, message, kind="rate_limit_error", code="queue_full", retry_after=1)


def closing() -> ApiError:
  """A server that takes on nothing new."""
  message = "the server is shutting down"
  return ApiError(503, message, kind="server_error", code="shutting_down", retry_after=5)
