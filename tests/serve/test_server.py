"""The server over real sockets: answers are the engine's own, errors name what is wrong."""

import json
import re
import socket
import threading
import time

import jax
import jsonschema
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data.chat import encode_prompt
from pt_jax.data.chat_templates import load_template
from pt_jax.data.tokenizers import IncrementalDetokenizer
from pt_jax.models import decoder
from pt_jax.models.logprobs import next_token_statistics
from pt_jax.rollout.constraints import Grammars
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.serve.protocol import Limits
from tests.serve import tiny

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
STOPS = (257, 259)  # <|endoftext|> and what ends a turn
PROMPTS = ("Hello", "two plus two", "é", "a b c d e f g h i j k l m n o p q r s t")
GRAMMARS = Grammars(tiny.TOKENIZER, tiny.MODEL.vocab_size)
LIMITS = Limits(body_bytes=20_000, samples=16, queue=24, seconds=20)


def make_engine():
  return Engine(
    tiny.MODEL,
    tiny.params(),
    slots=tiny.SLOTS,
    max_length=tiny.LENGTH,
    detokenizer=lambda: IncrementalDetokenizer(tiny.TOKENIZER),
    grammars=GRAMMARS,
    launch=8,
  )


@pytest.fixture(scope="module")
def mesh():
  made = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(made):
    yield made


@pytest.fixture(scope="module")
def engine(mesh):
  """Another engine on the same weights: what it answers is the truth."""
  return make_engine()


@pytest.fixture(scope="module")
def client(mesh):
  params = tiny.params()
  with tiny.serving(make_engine, params, LIMITS) as client:
    yield client


def greedy(engine, prompts, max_tokens=12):
  """Tokens and log-probs of the engine's own greedy answers."""
  sampling = SamplingParams(max_tokens=max_tokens, temperature=0, stop_tokens=STOPS)
  out = engine.generate(prompts, sampling, key=jax.random.key(0))
  spans = zip(out.prompt_length, out.length)
  return [(out.tokens[i, a:b].tolist(), out.logprobs[i, a:b]) for i, (a, b) in enumerate(spans)]


def text_of(tokens):
  return tiny.TOKENIZER.decode([t for t in tokens if t not in STOPS])


def ids(text):
  return tiny.TOKENIZER.encode(text)


def test_the_stop_tokens_are_those_of_the_template():
  assert {tiny.TOKENIZER.token_id(name) for name in ("<|endoftext|>", "<|im_end|>")} == set(STOPS)


@pytest.mark.parametrize(
  "prompt",
  [PROMPTS[0], list(PROMPTS), ids(PROMPTS[1]), [ids(p) for p in PROMPTS]],
  ids=["string", "strings", "ids", "lists of ids"],
)
def test_greedy_completions_are_the_engines(client, engine, prompt):
  answer = client.complete(prompt=prompt, temperature=0, max_tokens=12)
  many = isinstance(prompt, list) and not isinstance(prompt[0], int)
  prompts = [ids(p) if isinstance(p, str) else p for p in (prompt if many else [prompt])]
  expected = greedy(engine, prompts)
  assert [c["index"] for c in answer["choices"]] == list(range(len(prompts)))
  for choice, (tokens, _) in zip(answer["choices"], expected):
    assert choice["text"] == text_of(tokens) and choice["logprobs"] is None
    assert choice["finish_reason"] == ("stop" if tokens[-1] in STOPS else "length")
  usage = answer["usage"]
  assert usage["prompt_tokens"] == sum(map(len, prompts))
  assert usage["completion_tokens"] == sum(len(tokens) for tokens, _ in expected)
  assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
  assert (answer["object"], answer["model"]) == ("text_completion", tiny.NAME)


def test_logprobs_are_the_engines(client, engine):
  answer = client.complete(prompt=PROMPTS[1], temperature=0, max_tokens=12, logprobs=3)
  ((tokens, expected),) = greedy(engine, [ids(PROMPTS[1])])
  found = answer["choices"][0]["logprobs"]
  np.testing.assert_allclose(found["token_logprobs"], expected, atol=1e-4)
  names = [tiny.TOKENIZER.decode([t]) for t in tokens]
  for name, own, top, written in zip(
    names, found["token_logprobs"], found["top_logprobs"], found["tokens"]
  ):
    assert written == name or written.startswith(("bytes:", "token_id:"))
    assert top[written] == max(top.values()) == own  # greedy
    assert len(top) == 3
  assert found["text_offset"][0] == 0 and found["text_offset"] == sorted(found["text_offset"])


def trainer(text):
  """Log-probs of every token of a text but the first, and the most likely tokens, by training."""
  tokens = np.array([ids(text)], np.int32)
  index = np.arange(tokens.shape[1], dtype=np.int32)[None]
  params = tiny.params()

  @jax.jit
  def score():
    hidden = decoder.forward(params, tiny.MODEL, tokens, index, np.zeros_like(index))
    return next_token_statistics(hidden, decoder.unembedding(params, tiny.MODEL), tokens)

  stats = score()
  return np.asarray(stats.logprobs)[0, 1:], np.asarray(stats.top1)[0, 1:]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_gives_the_trainers_logprobs_of_the_prompt(client, max_tokens):
  """As lm-eval asks for a loglikelihood."""
  text = "two plus two is four"
  answer = client.complete(prompt=text, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
  (choice,) = answer["choices"]
  found, (expected, top1) = choice["logprobs"], trainer(text)
  assert choice["text"].startswith(text) and len(found["tokens"]) == len(text) + max_tokens
  assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
  np.testing.assert_allclose(found["token_logprobs"][1 : len(text)], expected, atol=1e-4)
  assert found["text_offset"][: len(text)] == list(range(len(text)))
  for t, best in enumerate(top1, start=1):
    top, own = found["top_logprobs"][t], found["token_logprobs"][t]
    assert (own == max(top.values())) == (best == ids(text)[t])
  assert answer["usage"]["completion_tokens"] == max_tokens


def test_samples_differ_and_repeat_with_the_seed(client):
  ask = lambda **fields: client.complete(prompt="Hello", max_tokens=10, n=3, **fields)["choices"]
  first, again, other = ask(seed=7), ask(seed=7), ask(seed=8)
  texts = [choice["text"] for choice in first]
  assert len(set(texts)) == 3 and texts == [choice["text"] for choice in again]
  assert texts != [choice["text"] for choice in other]
  assert [choice["index"] for choice in first] == [0, 1, 2]
  cold = ask(seed=7, top_k=1)
  assert len({choice["text"] for choice in cold}) == 1


def test_a_stop_string_is_cut_off(client):
  whole = client.complete(prompt="Hello", max_tokens=40, temperature=0)["choices"][0]["text"]
  stop = whole[5:8]
  ask = {"prompt": "Hello", "max_tokens": 40, "temperature": 0, "stop": ["never there", stop]}
  (choice,) = client.complete(**ask)["choices"]
  assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
  events = client.stream(COMPLETIONS, **ask)
  assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]


def test_streams_are_the_whole_answer_in_pieces(client):
  fields = {"prompt": list(PROMPTS), "n": 2, "seed": 3, "max_tokens": 14, "logprobs": 2}
  whole = client.complete(**fields)
  events = client.stream(COMPLETIONS, stream_options={"include_usage": True}, **fields)
  assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
  for choice in whole["choices"]:
    mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
    assert "".join(c["text"] for c in mine) == choice["text"]
    assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
    logprobs = [p for c in mine if c["logprobs"] for p in c["logprobs"]["token_logprobs"]]
    np.testing.assert_allclose(logprobs, choice["logprobs"]["token_logprobs"], atol=1e-4)
  assert len({e["id"] for e in events}) == 1


def test_chats_go_through_the_template(client, engine):
  prompt = encode_prompt(
    [{"role": "user", "content": "Hi <|im_end|>"}], tiny.TOKENIZER, load_template("chatml")
  ).tolist()
  ((tokens, logprobs),) = greedy(engine, [prompt])
  fields = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
  answer = client.chat("Hi <|im_end|>", **fields)
  (choice,) = answer["choices"]
  assert choice["message"]["content"] == text_of(tokens)
  assert choice["message"]["role"] == "assistant" and answer["object"] == "chat.completion"
  assert answer["usage"]["prompt_tokens"] == len(prompt)
  content = choice["logprobs"]["content"]
  np.testing.assert_allclose([t["logprob"] for t in content], logprobs, atol=1e-4)
  pieces = tiny.TOKENIZER.token_bytes()
  for entry, token in zip(content, tokens):
    assert token in STOPS or bytes(entry["bytes"]) == pieces[token]
    assert len(entry["top_logprobs"]) == 2
    assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
  parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "<|im_end|>"}]
  assert client.chat(parts, **fields)["choices"][0]["message"] == choice["message"]
  messages = [{"role": "user", "content": "Hi <|im_end|>"}]
  events = client.stream(CHAT, messages=messages, **fields)
  assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
  text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
  assert text == choice["message"]["content"]
  streamed = [
    t for e in events if e["choices"][0]["logprobs"] for t in e["choices"][0]["logprobs"]["content"]
  ]
  assert [t["token"] for t in streamed] == [t["token"] for t in content]


SCHEMA = {
  "type": "object",
  "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
  "required": ["ok", "n"],
  "additionalProperties": False,
}


def test_answers_have_the_form_that_is_asked_for(client):
  pattern = "(yes|no): [a-z]{2,5}é?"
  answer = client.complete(prompt="x", n=8, seed=1, max_tokens=30, regex=pattern)
  texts = [choice["text"] for choice in answer["choices"]]
  assert all(re.fullmatch(pattern, text) for text in texts) and len(set(texts)) > 4
  form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
  answer = client.chat("x", n=8, seed=1, max_tokens=40, response_format=form)
  for choice in answer["choices"]:
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_models_health_and_metrics(client):
  (card,) = client.get("/v1/models")["data"]
  assert (card["id"], card["object"], card["max_model_len"]) == (tiny.NAME, "model", tiny.LENGTH)
  assert client.get(f"/v1/models/{tiny.NAME}") == card
  assert client.get("/health") == {"status": "ok"}
  names = (
    "pt_jax_generated_tokens_total",
    "pt_jax_prompt_tokens_total",
    "pt_jax_time_to_first_token_seconds_count",
    "pt_jax_time_per_output_token_seconds_count",
    'pt_jax_requests_total{path="/v1/completions",status="200"}',
  )
  before = [client.figure(name) for name in names]
  client.complete(prompt="Hello", max_tokens=9, temperature=0, n=2)
  drawn, prompt, first, rest, answered = (
    client.figure(name) - value for name, value in zip(names, before)
  )
  assert (drawn, prompt, first, rest, answered) == (18, 5, 1, 2, 1)
  assert client.figure("pt_jax_running") == client.figure("pt_jax_waiting") == 0
  assert client.figure("pt_jax_engine_generated") > 0


def test_the_tokenizer_answers_too(client):
  info = client.get("/tokenizer_info")
  assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", None)
  assert "<|im_start|>" in info["chat_template"]
  found = client.post("/tokenize", prompt="é<|endoftext|>", add_special_tokens=False)
  assert (found["tokens"], found["count"]) == ([0xC3, 0xA9, 257], 3)
  assert client.post("/detokenize", tokens=found["tokens"])["prompt"] == "é<|endoftext|>"
  assert client.send("POST", "/tokenize", {"prompt": 3})[0] == 400
  assert client.send("POST", "/detokenize", {"tokens": ["x"]})[0] == 400


MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
  "path, fields, status, param, message",
  [
    (COMPLETIONS, {}, 400, None, "'prompt' is a required property"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "expected at least one token"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "expected a string, strings, token ids"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "expected a string, strings, token ids"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "expected a string, strings, token ids"),
    (COMPLETIONS, {"prompt": [272]}, 400, "prompt", "token ids from 0 to 271, found 272"),
    (COMPLETIONS, {"prompt": "x", "model": "gpt"}, 404, "model", "no 'gpt' here, only 'tiny'"),
    (COMPLETIONS, {"prompt": "x" * 96}, 400, "prompt", "context is 96 tokens, found 96"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 96}, 400, "prompt", "and 96 to generate"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "at least 1 without echo"),
    (COMPLETIONS, {"prompt": "x", "n": 17}, 400, "n", "at most 16 completions"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n", "less than the minimum of 1"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "less than the minimum"),
    (COMPLETIONS, {"prompt": "x", "temperature": "1"}, 400, "temperature", "is not of type"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p", "less than or equal to the minimum"),
    (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "stop", "should be non-empty"),
    (COMPLETIONS, {"prompt": "x", "best_of": 2}, 400, "best_of", "expected n (1)"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "'' was expected"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 1}, 400, "presence_penalty", "expected"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias", "to be empty"),
    (COMPLETIONS, {"prompt": "x", "colour": 1}, 400, None, "'colour' was unexpected"),
    (COMPLETIONS, {"prompt": "x", "regex": "(a"}, 400, "regex", "unclosed group"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "stream_options", "without stream"),
    (CHAT, {"messages": []}, 400, "messages", "should be non-empty"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "message 0"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages", "role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages",
     "expected parts of type text"),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL]}, 400, "tools", "expected to be empty"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "without logprobs"),
    (CHAT, {"messages": MESSAGES, "logprobs": 2}, 400, "logprobs", "is not of type 'boolean'"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "xml"}}, 400, "response_format",
     "json_schema with json_schema.schema"),
    (CHAT, {"messages": MESSAGES, "response_format": {
      "type": "json_schema", "json_schema": {"schema": [1]}}}, 400, "response_format",
     "json_schema with json_schema.schema"),
    (COMPLETIONS, {"prompt": "x", "regex": "(ab|c)" * 3000}, 400, "regex", "expected 1 to"),
    (CHAT, {"messages": MESSAGES, "response_format": {
      "type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, 400,
     "response_format", "Invalid type: nope"),
  ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(client, path, fields, status, param, message):
  found, _, body = client.send("POST", path, {"model": tiny.NAME} | fields)
  error = json.loads(body)["error"]
  assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error"), error
  assert message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
  "method, path, body, status, message",
  [
    ("POST", COMPLETIONS, b"{", 400, "not JSON"),
    ("POST", COMPLETIONS, b"[]", 400, "expected a JSON object, found list"),
    ("POST", COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "not JSON"),
    ("POST", COMPLETIONS, b'{"temperature": NaN}', 400, "NaN is no number"),
    ("POST", COMPLETIONS, b"\xff", 400, "not JSON"),
    ("POST", COMPLETIONS, b"[" * 10_000, 400, "not JSON"),
    ("POST", COMPLETIONS, b" " * 20_001, 413, "at most 20000 bytes"),
    ("GET", COMPLETIONS, None, 405, "Method Not Allowed"),
    ("GET", "/v2", None, 404, "Not Found"),
    ("GET", "/v1/models/gpt", None, 404, "no 'gpt' here"),
  ],
)
def test_what_is_no_request(client, method, path, body, status, message):
  found, _, data = client.send(method, path, body)
  assert found == status and message in json.loads(data)["error"]["message"]


def wait_until(holds, seconds=10.0):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end, "it did not come to that"
    time.sleep(0.01)


LONG = {"model": tiny.NAME, "prompt": "x", "max_tokens": 90, "regex": "[ab]{80,90}"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(client, stream):
  aborted = client.figure("pt_jax_aborted_total")
  connection = client.open("POST", COMPLETIONS, LONG | {"n": 16, "stream": stream})
  wait_until(lambda: client.worker.samples == 16)
  connection.sock.shutdown(socket.SHUT_RDWR)
  connection.close()
  wait_until(lambda: client.worker.samples == 0)
  assert client.figure("pt_jax_aborted_total") > aborted
  assert client.complete(prompt="Hello", max_tokens=3, temperature=0)["choices"]


def test_a_full_queue_is_429(client):
  connections = [client.open("POST", COMPLETIONS, LONG | {"n": 12}) for _ in range(2)]
  wait_until(lambda: client.worker.samples >= 12)
  wait_until(lambda: client.worker.samples == 24 or client.worker.samples < 12)
  status, headers, body = client.send("POST", COMPLETIONS, LONG)
  assert status == 429 and headers["retry-after"] == "1"
  assert json.loads(body)["error"]["code"] == "queue_full"
  assert all(c.getresponse().status == 200 for c in connections)


def test_a_request_may_not_take_for_ever(mesh):
  with tiny.serving(Stuck, tiny.params(), Limits(seconds=0.3)) as client:
    status, _, body = client.send("POST", COMPLETIONS, LONG)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (504, "timeout") and "0.3 s" in error["message"]
    status, _, body = client.send("POST", COMPLETIONS, LONG | {"stream": True})
    assert status == 200 and b'"code": "timeout"' in body and b"[DONE]" not in body
    with socket.create_connection(("127.0.0.1", client.port)) as half:
      half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
      assert half.recv(4096).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: len(Stuck.aborted) == 2)
    assert client.figure("pt_jax_aborted_total") == 2


class Stuck:
  """An engine that gets nowhere."""

  aborted: list = []  # noqa: RUF012
  figures = None

  def __init__(self):
    self.figures = threading.local()
    self.unfinished, Stuck.aborted = 0, []

  def submit(self, prompt, sampling, *, key, n=1):
    self.unfinished += 1
    return self.unfinished

  def step(self):
    time.sleep(0.005)
    return []

  def abort(self, request):
    self.unfinished -= 1
    Stuck.aborted.append(request)


class Broken(Stuck):
  """An engine that fails."""

  def step(self):
    raise RuntimeError("out of memory")


def test_an_engine_that_fails_fails_its_requests_and_the_server(mesh):
  with tiny.serving(Broken, tiny.params()) as client:
    status, _, body = client.send("POST", COMPLETIONS, LONG)
    assert status == 500 and json.loads(body)["error"]["type"] == "server_error"
    wait_until(lambda: client.server.failed and client.server.should_exit)


def test_draining_answers_what_was_let_in(client, mesh):
  with tiny.serving(make_engine, tiny.params()) as client:
    connection = client.open("POST", COMPLETIONS, LONG)
    wait_until(lambda: client.worker.samples == 1)
    client.server._worker._loop.call_soon_threadsafe(client.server._drain)
    wait_until(lambda: client.worker.draining)
    status, headers, body = client.send("POST", COMPLETIONS, LONG)
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(body)["error"]["code"] == "shutting_down"
    assert client.send("GET", "/health")[0] == 503
    response = connection.getresponse()
    assert response.status == 200
    assert re.fullmatch("[ab]{80,90}", json.loads(response.read())["choices"][0]["text"])
    wait_until(lambda: client.server.should_exit)
