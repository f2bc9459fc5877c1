"""Clients that others wrote, in an environment of their own, against a server here.

python3 -m venv clients && clients/bin/pip install "openai==3.57.0" "lm-eval[api]==0.4.13"
PT_JAX_CLIENTS_PYTHON=clients/bin/python python -m pytest -m slow tests/serve/test_clients.py
"""

import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest

from pt_jax import sharding
from pt_jax.data.chat import encode_prompt
from pt_jax.data.chat_templates import load_template
from tests.serve import tiny
from tests.serve.test_server import greedy, ids, make_engine, text_of, trainer

HERE = pathlib.Path(__file__).parent / "clients"
PYTHON = os.environ.get("PT_JAX_CLIENTS_PYTHON")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not PYTHON, reason="PT_JAX_CLIENTS_PYTHON names no interpreter"),
]


@pytest.fixture(scope="module")
def client():
  with (
    jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])),
    tiny.serving(make_engine, tiny.params()) as client,
  ):
    yield client


def run(*command, **options):
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_openais_own_client(client):
  url = f"http://127.0.0.1:{client.port}/v1"
  out = json.loads(run(PYTHON, HERE / "ask_openai.py", url, tiny.NAME).splitlines()[-1])
  chat = encode_prompt(
    [{"role": "user", "content": "Hi"}], tiny.TOKENIZER, load_template("chatml")
  ).tolist()
  (text, logprobs), (chatted, chat_logprobs) = greedy(make_engine(), [ids("Hello"), chat])
  text, chatted = text_of(text), text_of(chatted)
  assert out["models"] == [out["retrieved"]] == [tiny.NAME]
  assert {*out["completions"], *out["several"], *out["async"], out["stream"]} == {text}
  np.testing.assert_allclose(out["logprobs"], logprobs, atol=1e-4)
  assert (out["chat"], out["chat_stream"]) == (chatted, chatted)
  np.testing.assert_allclose(out["chat_logprobs"], chat_logprobs, atol=1e-4)
  assert out["usage"]["total_tokens"] == 5 + 2 * 12
  assert out["chat_usage"]["prompt_tokens"] == len(chat)
  assert out["parsed"].keys() == {"ok", "n"} and set(out["regex"]) <= set("abc")
  assert out["errors"] == [
    ["BadRequestError", 400, "context_length_exceeded", "prompt"],
    ["NotFoundError", 404, "model_not_found", "model"],
  ]


def test_lm_eval(client, tmp_path):
  """Its log-likelihoods are the trainer's, its generations the engine's."""
  shutil.copytree(HERE / "tasks", tmp_path / "tasks")
  rows_file = tmp_path / "tasks" / "rows.jsonl"
  for path in (tmp_path / "tasks").glob("*.yaml"):
    path.write_text(path.read_text().replace("rows.jsonl", str(rows_file)))
  model = {
    "model": tiny.NAME,
    "base_url": f"http://127.0.0.1:{client.port}/v1/completions",
    "tokenizer_backend": "remote",
    "num_concurrent": "3",
    "max_length": str(tiny.LENGTH),
  }
  arguments = ",".join(f"{k}={v}" for k, v in model.items())
  offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
  run(
    *(PYTHON, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
    *("--tasks", "local_choice,local_generate", "--include_path", str(tmp_path / "tasks")),
    *("--output_path", str(tmp_path / "out"), "--log_samples"),
    env=os.environ | offline,
    cwd=tmp_path,
  )
  rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
  samples = lambda task: [
    json.loads(line)
    for line in next((tmp_path / "out").rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
  ]
  for sample in samples("local_choice"):
    row = rows[sample["doc_id"]]
    for choice, ((logprob, is_greedy),) in zip(row["choices"], sample["resps"]):
      own, top1 = trainer(row["q"] + choice)
      start = len(row["q"]) - 1
      assert abs(float(logprob) - own[start:].sum()) < 1e-3
      told = ids(row["q"] + choice)[1:][start:] == top1[start:].tolist()
      assert is_greedy in (told, str(told))
  answers = greedy(make_engine(), [ids(row["q"]) for row in rows], 8)
  for sample in samples("local_generate"):
    assert sample["resps"] == [[text_of(answers[sample["doc_id"]][0])]]
