"""`python -m launch.serve` as a process of its own: starts, answers, survives a crowd, drains."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import pytest

from launch import serve
from pt_jax import sharding
from pt_jax.models import hf
from tests.serve import load, tiny
from tests.serve.test_server import LONG, greedy, ids, make_engine, text_of, wait_until

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The tiny model as a checkpoint in HF format."""
  path = tmp_path_factory.mktemp("serve") / tiny.NAME
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    row = jax.tree.map(lambda x: jax.numpy.asarray(x), tiny.params())
    hf.save(path, row, tiny.MODEL)
  return path


@pytest.fixture(scope="module")
def answers():
  """The engine's own greedy answers to the prompts of the crowd."""
  prompts = load.prompts(64)
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    found = greedy(make_engine(), [ids(p) for p in prompts], load.MAX_TOKENS)
  return {prompt: text_of(tokens) for prompt, (tokens, _) in zip(prompts, found)}


@contextlib.contextmanager
def started(folder, *options):
  """The server as a process; a client with the process and its log beside it."""
  arguments = ["--tokenizer", "bytes", "--template", "chatml", "--port", "0", *options]
  command = [sys.executable, "-m", "launch.serve", str(folder), *arguments]
  log = folder.parent / "log"
  with log.open("w") as file:
    process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
  where = lambda: re.search(r"serving tiny on http://127\.0\.0\.1:(\d+)", log.read_text())
  try:
    wait_until(lambda: where() or process.poll() is not None, seconds=60)
    assert where(), log.read_text()
    client = tiny.Client(int(where()[1]))
    client.process, client.log = process, log
    yield client
  finally:
    process.kill()
    process.wait()


def options(*more):
  return ["--max-length", str(tiny.LENGTH), "--slots", str(tiny.SLOTS), *more]


def memory(process):
  """Bytes that a process has in memory."""
  pages = pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGESIZE")


def test_a_crowd_and_then_sigterm(folder, answers):
  with started(folder, *options()) as client:
    crowd = load.Crowd(client, answers, clients=24, seconds=6)
    crowd.run()
    assert not crowd.wrong, crowd.wrong[:5]
    assert min(crowd.counts[kind] for kind in ("whole", "stream", "left", "refused")) > 5
    wait_until(lambda: client.figure("pt_jax_running") + client.figure("pt_jax_waiting") == 0)
    assert client.figure("pt_jax_aborted_total") > 0
    connection = client.open("POST", "/v1/completions", LONG)
    wait_until(lambda: client.figure("pt_jax_running") + client.figure("pt_jax_waiting") == 1)
    client.process.send_signal(signal.SIGTERM)
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["choices"][0]["finish_reason"] in ("stop", "length")
    assert client.process.wait(20) == 0
    assert "Traceback" not in client.log.read_text()


@pytest.mark.slow
def test_two_hundred_clients_for_two_minutes(folder, answers):
  with started(folder, *options("--limits.queue", "256")) as client:
    load.Crowd(client, answers, clients=200, seconds=20).run()
    before = memory(client.process)
    crowd = load.Crowd(client, answers, clients=200, seconds=120)
    crowd.run()
    assert not crowd.wrong, (len(crowd.wrong), crowd.wrong[:5])
    wait_until(lambda: client.figure("pt_jax_running") + client.figure("pt_jax_waiting") == 0)
    grown = memory(client.process) - before
    print(dict(crowd.counts), f"memory {before / 2**20:.0f} MiB, grown by {grown / 2**20:.1f} MiB")
    print(client.send("GET", "/metrics")[2].decode())
    assert grown < 0.05 * before
    assert min(crowd.counts[kind] for kind in ("whole", "stream", "left", "refused")) > 100
    client.process.send_signal(signal.SIGTERM)
    assert client.process.wait(20) == 0
    assert "Traceback" not in client.log.read_text()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["nowhere"], "nowhere/config.json: no such file"),
    (["FOLDER"], "tokenizer FOLDER: the folder has no tokenizer.json"),
    (["FOLDER", "--tokenizer", "bytes", "--max-length", "4096"], "max_length: expected 2 to 128"),
    (["FOLDER", "--tokenizer", "bytes", "--template", "no"], "no chat template 'no'"),
  ],
)
def test_what_cannot_be_served_is_one_line(folder, arguments, message, capsys):
  name = str(folder)
  assert serve.main([a.replace("FOLDER", name) for a in arguments]) == 2
  err = capsys.readouterr().err
  assert message.replace("FOLDER", name) in err and err.count("\n") == 1
