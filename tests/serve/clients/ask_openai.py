"""Asks a server by OpenAI's own client, in an environment that has it; prints what it got as JSON.

python ask_openai.py http://127.0.0.1:PORT/v1 MODEL
"""

import asyncio
import json
import sys
import typing

import openai
import pydantic


class Point(pydantic.BaseModel):
  """What `parse` is asked for; a model without manners would write a number for ever."""

  ok: bool
  n: typing.Literal[1, 2, 30]


def main(url: str, model: str) -> None:
  """Every kind of request that the client has a method for."""
  client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
  chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12}
  text = {"model": model, "prompt": "Hello", "max_tokens": 12, "temperature": 0}
  out = {"models": [m.id for m in client.models.list()]}
  out["retrieved"] = client.models.retrieve(model).id
  whole = client.completions.create(**text, logprobs=2, n=2)
  out["completions"] = [c.text for c in whole.choices]
  out["logprobs"] = whole.choices[0].logprobs.token_logprobs
  out["usage"] = whole.usage.model_dump()
  out["several"] = [
    c.text for c in client.completions.create(**text | {"prompt": ["Hello", "Hello"]}).choices
  ]
  out["stream"] = "".join(c.choices[0].text for c in client.completions.create(**text, stream=True))
  answer = client.chat.completions.create(**chat, temperature=0, logprobs=True, top_logprobs=2)
  out["chat"] = answer.choices[0].message.content
  out["chat_logprobs"] = [t.logprob for t in answer.choices[0].logprobs.content]
  pieces, usage = [], None
  options = {"stream": True, "stream_options": {"include_usage": True}}
  for chunk in client.chat.completions.create(**chat, temperature=0, **options):
    pieces += [c.delta.content or "" for c in chunk.choices]
    usage = chunk.usage or usage
  out["chat_stream"], out["chat_usage"] = "".join(pieces), usage.model_dump()
  parsed = client.chat.completions.parse(**chat | {"max_tokens": 60}, seed=1, response_format=Point)
  out["parsed"] = parsed.choices[0].message.parsed.model_dump()
  form = client.completions.create(**text | {"max_tokens": 30}, extra_body={"regex": "(a|b){3,9}c"})
  out["regex"] = form.choices[0].text
  out["errors"] = [_error(client, fields) for fields in ({"max_tokens": 10**6}, {"model": "x"})]
  out["async"] = asyncio.run(_many(url, text))
  print(json.dumps(out))


def _error(client: openai.OpenAI, fields: dict) -> list:
  text = {"model": "tiny", "prompt": "Hello"} | fields
  try:
    client.completions.create(**text)
  except openai.APIStatusError as error:
    return [type(error).__name__, error.status_code, error.code, error.param]
  return []


async def _many(url: str, text: dict) -> list[str]:
  client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
  answers = await asyncio.gather(*(client.completions.create(**text) for _ in range(16)))
  return [a.choices[0].text for a in answers]


if __name__ == "__main__":
  main(*sys.argv[1:])
