"""The logs are read back by TensorBoard's own readers and by json, and survive being cut off."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.util import tensor_util

from pt_jax import metrics
from pt_jax.metrics import AppendLog, EventWriter, Journal


def test_floats_round_trip_exactly(tmp_path):
  rng = np.random.default_rng(0)
  doubles = rng.integers(0, 2**63, 50, dtype=np.uint64).view(np.float64)
  values = [*doubles[np.isfinite(doubles)], 0.1, 5e-324, -0.0, 1 / 3, np.float32(1e-45)]
  journal = Journal(tmp_path)
  for step, value in enumerate(values):
    journal.scalars("sft", step, {"x": value})
  rows = metrics.read_jsonl(tmp_path / metrics.METRICS)
  assert [row["step"] for row in rows] == list(range(len(values)))
  found = np.array([row["x"] for row in rows])
  np.testing.assert_array_equal(found.view(np.uint64), np.array(values, np.float64).view(np.uint64))


def test_values_of_every_kind(tmp_path):
  journal = Journal(tmp_path)
  given = {"int": 3, "bool": np.bool_(True), "bf16": jnp.bfloat16(1.5), "jax": jnp.ones((1,)) / 3}
  journal.scalars("sft", 7, given)
  (row,) = metrics.read_jsonl(tmp_path / metrics.METRICS)
  expected = {"int": 3, "bool": 1, "bf16": 1.5, "jax": float(np.float32(1) / np.float32(3))}
  assert row == {"stage": "sft", "step": 7, **expected}


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("loss", np.ones(2), r"metric 'loss': expected one number, found shape \(2,\)"),
    ("loss", "high", "metric 'loss': expected one number, found 'high'"),
    ("loss", None, "metric 'loss': expected one number, found None"),
    ("step", 1, "metric 'step': the name is taken by a column of metrics.jsonl"),
  ],
)
def test_bad_scalar(tmp_path, name, value, message):
  with pytest.raises(ValueError, match=message):
    Journal(tmp_path).scalars("sft", 1, {"fine": 1.0, name: value})
  assert not list(tmp_path.iterdir())


def test_check_finite_names_metric_and_step():
  metrics.check_finite({"loss": 1.0, "grad": jnp.float32(0)}, 3)
  for bad in (float("nan"), jnp.inf):
    with pytest.raises(ValueError, match=f"step 4: metric 'loss': expected a finite number.*{bad}"):
      metrics.check_finite({"grad": 1.0, "loss": bad}, 4)


def test_tensorboard_reads_the_events(tmp_path):
  journal = Journal(tmp_path)
  for step in range(3):
    journal.scalars("sft", step, {"loss": step / 3, "perf/speed": 10.0})
  journal.samples("sft", 2, [{"prompt": "1+1=", "completion": "<b>2</b> ```", "reward": 0.5}])
  values = np.concatenate([np.arange(100.0), [np.nan, np.inf]])
  journal.histogram("sft", 2, "lengths", values)
  figure = Figure(figsize=(2, 1), dpi=50)
  figure.savefig(tmp_path / "a.png")
  png = (tmp_path / "a.png").read_bytes()
  journal.events.image(2, "sft/picture", png)
  journal.close()

  read = EventAccumulator(str(tmp_path)).Reload()
  assert read.file_version == 2.0
  found = [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in read.Tensors("sft/loss")]
  assert found == [(step, np.float32(step / 3)) for step in range(3)]
  (text,) = read.Tensors("sft/samples")
  shown = tensor_util.make_ndarray(text.tensor_proto).item().decode()
  assert "**reward** 0.5" in shown and "````text\n<b>2</b> ```\n````" in shown
  (histogram,) = read.Tensors("sft/lengths")
  buckets = tensor_util.make_ndarray(histogram.tensor_proto)  # [k, (left, right, count)]
  assert buckets.shape == (30, 3) and buckets[:, 2].sum() == 100
  assert (buckets[0, 0], buckets[-1, 1]) == (0, 99)
  (image,) = read.Tensors("sft/picture")
  assert list(tensor_util.make_ndarray(image.tensor_proto)) == [b"100", b"50", png]
  plugins = {
    tag: read.SummaryMetadata(tag).plugin_data.plugin_name for tag in read.Tags()["tensors"]
  }
  assert plugins == {
    "sft/loss": "scalars",
    "sft/perf/speed": "scalars",
    "sft/samples": "text",
    "sft/lengths": "histograms",
    "sft/picture": "images",
  }


def test_image_must_be_a_png(tmp_path):
  with pytest.raises(
    ValueError, match="image 'a': expected the bytes of a PNG file, found b'GIF89"
  ):
    Journal(tmp_path).events.image(0, "a", b"GIF89a..")


def session_groups(folder):
  """What the HPARAMS tab shows of a folder: the experiment and its rows, by TensorBoard itself."""
  multiplexer = plugin_event_multiplexer.EventMultiplexer()
  multiplexer.AddRunsFromDirectory(str(folder)).Reload()
  provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
  context = backend_context.Context(types.SimpleNamespace(data_provider=provider))
  request = api_pb2.ListSessionGroupsRequest(
    slice_size=10,
    include_metrics=True,
    allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING],
  )
  ctx, tags = RequestContext(), context.hparams_metadata(RequestContext(), "")
  experiment = context.experiment_from_metadata(
    ctx, "", True, tags, provider.list_hyperparameters(ctx, experiment_ids=[""], limit=0)
  )
  rows = list_session_groups.Handler(ctx, context, "", request).run().session_groups
  return experiment, {row.name: row for row in rows}


def write_run(folder, name, config, reward, succeeded=True):
  (folder / name).mkdir(parents=True)
  journal = Journal(folder / name)
  journal.events.session_start(config, name)
  for step in range(3):
    journal.scalars("grpo", step, {"reward": reward + step, "other": 0.0})
  journal.events.session_end(succeeded)
  journal.close()


def test_hparams_tab(tmp_path):
  configs = [{"lr": 0.1, "kl": None, "on": True, "names": ["a"]}, {"lr": 0.2, "on": True, "n": 1}]
  write_run(tmp_path, "a", configs[0], 0.5)
  write_run(tmp_path, "b", configs[1], 1.5, succeeded=False)
  experiment, rows = session_groups(tmp_path)
  assert {info.name.tag for info in experiment.metric_infos} == {"grpo/reward", "grpo/other"}
  assert {i.name: i.differs for i in experiment.hparam_infos}["lr"]
  assert rows["a"].hparams["lr"].number_value == 0.1
  assert rows["a"].hparams["kl"].string_value == "null"
  assert rows["a"].hparams["names"].string_value == '["a"]'
  assert rows["a"].sessions[0].status == api_pb2.STATUS_SUCCESS
  assert rows["b"].sessions[0].status == api_pb2.STATUS_FAILURE
  final = {v.name.tag: (v.value, v.training_step) for v in rows["b"].metric_values}
  assert final["grpo/reward"] == (3.5, 2)

  writer = EventWriter(AppendLog(tmp_path / metrics.EVENTS))
  writer.experiment(configs, ["grpo/reward"])
  experiment, rows = session_groups(tmp_path)
  assert [info.name.tag for info in experiment.metric_infos] == ["grpo/reward"]
  differs = {info.name: info.differs for info in experiment.hparam_infos}
  assert differs == {"lr": True, "kl": True, "names": True, "n": True, "on": False}
  assert {info.name: info.type for info in experiment.hparam_infos} == {
    "lr": api_pb2.DATA_TYPE_FLOAT64,
    "kl": api_pb2.DATA_TYPE_STRING,
    "names": api_pb2.DATA_TYPE_STRING,
    "n": api_pb2.DATA_TYPE_FLOAT64,
    "on": api_pb2.DATA_TYPE_BOOL,
  }
  assert [v.name.tag for v in rows["b"].metric_values] == ["grpo/reward"]


def write_steps(journal, steps):
  for step in steps:
    journal.scalars("sft", step, {"loss": 1 / (step + 1)})
    journal.samples("sft", step, [{"prompt": "p", "completion": "c" * step}])
    journal.histogram("sft", step, "h", np.arange(step + 1))


def events(folder):
  """Every event without its wall time."""
  loader = EventFileLoader(str(folder / metrics.EVENTS))
  found = []
  for event in loader.Load():
    event.wall_time = 0
    found.append(event.SerializeToString(deterministic=True))
  return found


def contents(folder):
  return [(folder / name).read_bytes() for name in (metrics.METRICS, metrics.SAMPLES)]


def test_resumed_logs_equal_uninterrupted_ones(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  whole.mkdir()
  cut.mkdir()
  write_steps(Journal(whole), range(10))

  first = Journal(cut)
  write_steps(first, range(5))
  state = json.loads(json.dumps(first.state()))
  write_steps(first, range(5, 8))  # lost with the process
  with open(cut / metrics.METRICS, "ab") as file:
    file.write(b'{"stage": "sf')  # killed in the middle of a line
  assert len(metrics.read_jsonl(cut / metrics.METRICS)) == 8
  write_steps(Journal(cut, state), range(5, 10))

  assert contents(cut) == contents(whole)
  assert events(cut) == events(whole)
  assert len(events(cut)) == 1 + 3 * 10  # the file version, then three a step


def test_a_new_run_drops_leftovers(tmp_path):
  write_steps(Journal(tmp_path), range(3))
  journal = Journal(tmp_path)
  assert len(metrics.read_jsonl(tmp_path / metrics.METRICS)) == 3  # not before it writes
  assert journal.state() == dict.fromkeys((metrics.EVENTS, metrics.METRICS, metrics.SAMPLES), 0)
  assert contents(tmp_path) == [b"", b""]


def test_a_log_shorter_than_recorded_is_an_error(tmp_path):
  journal = Journal(tmp_path)
  write_steps(journal, range(3))
  state = journal.state()
  before = contents(tmp_path)
  state[metrics.SAMPLES] += 1
  with pytest.raises(ValueError, match=r"samples.jsonl: the checkpoint expects \d+ bytes, found"):
    Journal(tmp_path, state)
  assert contents(tmp_path) == before


def test_no_folder_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  journal = Journal(None)
  write_steps(journal, range(2))
  journal.events.session_end(True)
  assert set(journal.state().values()) == {0}
  journal.close()
  assert not list(tmp_path.iterdir())
