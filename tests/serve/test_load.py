"""What a folder holds is found: stages of runs, runs, checkpoints; and said where it is not."""

import functools
import json

import jax
import numpy as np
import pytest

from pt_jax import checkpoint, sharding
from pt_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from pt_jax.experiment import Evaluate, Experiment
from pt_jax.loops import record
from pt_jax.models import decoder, hf
from pt_jax.recipes import correct_and_shaped, problems
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.serve.load import find
from tests.serve import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run as `Run` leaves it: its config, and parameters of two of three stages."""
  folder = tmp_path_factory.mktemp("runs") / "seed=0"
  sampling = SamplingParams(max_tokens=4, stop_tokens=(257,))
  ask = functools.partial(problems, families={}, template="chatml")
  evaluate = lambda name: Evaluate(
    name, problems=ask, rewards=correct_and_shaped, sampling=sampling
  )
  experiment = Experiment(
    name="tiny",
    stages=(evaluate("one"), evaluate("two")),
    tokenizer=ByteTokenizer,
    model=tiny.MODEL,
  )
  folder.mkdir(parents=True)
  config = record.plain(experiment)
  # A reward model behind them is no policy.
  config["stages"].append({"name": "judge", "members": 2})
  (folder / "config.json").write_text(json.dumps({"config": config, "environments": []}))
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    for seed, name in enumerate(("one", "two", "judge")):
      placed = jax.tree.map(jax.numpy.asarray, tiny.params(seed))
      checkpoint.save_params(folder / "params" / name, placed)
  return folder


def weights_of(source):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    return np.asarray(source.params(mesh)["embed"])


def expected(seed):
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    return tiny.params(seed)["embed"]


def test_a_stage_of_a_run(run):
  source = find(run / "params" / "one")
  assert source.config == tiny.MODEL and isinstance(source.tokenizer, ByteTokenizer)
  assert source.template is not None and source.template.name == "chatml"
  assert (weights_of(source) == expected(0)).all()
  served = source.served("mine", 64, scores=True)
  assert set(served.stop_tokens) == {257, 259} and served.vocab_size == 272


def test_a_run_is_its_last_policy(run):
  assert (weights_of(find(run)) == expected(1)).all()


def test_a_checkpoint_with_a_tokenizer_of_its_own(run, tmp_path):
  folder = tmp_path / "hf"
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    hf.save(folder, jax.tree.map(jax.numpy.asarray, tiny.params(3)), tiny.MODEL)
  source = find(folder, tokenizer="bytes", template="plain")
  assert decoder.table(source.config).keys() == decoder.table(tiny.MODEL).keys()
  assert (weights_of(source) == expected(3)).all()
  without = find(folder, tokenizer="bytes")
  assert without.template is None and without.served("x", 8, scores=False).stop_tokens == (257,)


def test_a_tokenizer_that_is_a_call_with_arguments(run, tmp_path):
  folder = tmp_path / "run"
  (folder / "params" / "one").mkdir(parents=True)
  written = json.loads((run / "config.json").read_text())

  def found(tokenizer):
    written["config"]["tokenizer"] = tokenizer
    (folder / "config.json").write_text(json.dumps(written))
    return find(folder / "params" / "one").tokenizer

  call = record.plain(functools.partial(load_tokenizer, path="bytes"))
  assert isinstance(found(call), ByteTokenizer)
  with pytest.raises(ValueError, match=r"expected a function of pt_jax\. or .*, found .os"):
    found({"function": "os.system", "args": ["true"]})


@pytest.mark.parametrize(
  "path, message",
  [
    ("params/three", "params/three: no such stage of this run"),
    ("params", "params/config.json: no such file"),
  ],
)
def test_what_is_not_there(run, path, message):
  with pytest.raises(ValueError, match=message):
    find(run / path)


def test_what_is_no_model(tmp_path):
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(ValueError, match="expected RUN/params/STAGE, a run or a HF checkpoint"):
    find(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="not JSON"):
    find(tmp_path)
