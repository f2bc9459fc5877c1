"""A checkpoint gives back the bits that were saved, whatever happens to the process."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pt_jax import checkpoint, sharding
from pt_jax.checkpoint import Checkpointer

REPOSITORY = Path(__file__).parents[1]


class Moments(NamedTuple):
  mean: dict
  none: None


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  moments: Moments
  rng: jax.Array


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def make_state(mesh, seed=0):
  rng = np.random.default_rng(seed)
  odd = np.array([np.nan, -0.0, np.inf, 1e-45, -np.nan], np.float32)
  odd.view(np.uint32)[0] |= 0xABC  # a NaN with a payload
  params = {
    "embed": rng.normal(size=(8, 4)).astype(np.float32),
    "blocks": {"wq": rng.normal(size=(2, 4, 6)).astype(jnp.bfloat16), "odd": odd},
    "small": rng.integers(-128, 128, (3, 5)).astype(np.int8),
  }
  where = jax.NamedSharding(mesh, jax.P())
  state = State(
    np.int32(seed), params, Moments({"embed": rng.normal(size=(8, 4)).astype(np.float32)}, None), 0
  )
  put = lambda x: jax.device_put(x, where)
  return jax.tree.map(put, state).replace(rng=put(jax.random.split(jax.random.key(seed), 3)))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree):
  """Every leaf as bytes."""
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return jax.tree.map(lambda x: np.asarray(raw(x)).tobytes(), tree)


def kind(array):
  return array.dtype, array.sharding


def files(folder):
  return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_restores_every_bit(mesh, tmp_path):
  state = make_state(mesh)
  host = {"data": {"index": 12, "rest": [1.1, None]}, "kl": 0.1 + 0.2}
  with Checkpointer(tmp_path / "c") as checkpointer:
    assert checkpointer.latest_step() is None
    checkpointer.save(5, state, host, local={"rows": [1]})
  with Checkpointer(tmp_path / "c") as checkpointer:
    assert checkpointer.latest_step() == 5
    assert checkpointer.host() == host
    saved = checkpointer.restore(abstract(state))
  assert (saved.step, saved.host, saved.local) == (5, host, {"rows": [1]})
  assert jax.tree.structure(saved.state) == jax.tree.structure(state)
  assert bits(saved.state) == bits(state)
  assert bits(saved.state) != bits(make_state(mesh, 1))
  assert jax.tree.map(kind, saved.state) == jax.tree.map(kind, state)
  assert jax.random.key_impl(saved.state.rng) == jax.random.key_impl(state.rng)


def test_donating_the_state_while_it_is_written_changes_nothing(mesh, tmp_path):
  where = jax.NamedSharding(mesh, jax.P())
  state = {f"w{i}": jax.device_put(jnp.full((512, 1024), i, jnp.float32), where) for i in range(4)}

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    return jax.tree.map(lambda x: x + 1, state)

  with Checkpointer(tmp_path / "c", keep=3) as checkpointer:
    for i in range(3):
      checkpointer.save(i, state, {})
      for _ in range(5):
        state = step(state)
    for i in range(3):
      found = checkpointer.restore(abstract(state), step=i).state
      for j in range(4):
        np.testing.assert_array_equal(found[f"w{j}"], j + 5 * i)


def test_keeps_the_last_ones_and_refuses_to_go_back(mesh, tmp_path):
  state = {"w": make_state(mesh).step}
  with Checkpointer(tmp_path / "c", keep=2) as checkpointer:
    for step in (1, 5, 7):
      checkpointer.save(step, state, {"step": step})
    with pytest.raises(ValueError, match="c: expected a step after 7, found 7"):
      checkpointer.save(7, state, {})
    checkpointer.wait()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["5", "7"]
    assert checkpointer.host(5) == {"step": 5}
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint of step 1, found steps"):
      checkpointer.restore(state, step=1)
  with pytest.raises(ValueError, match="checkpoints to keep: expected at least 1, found 0"):
    Checkpointer(tmp_path / "c", keep=0)


def test_mismatch_names_the_parameter(mesh, tmp_path):
  state = {"params": {"a": make_state(mesh).params["embed"], "b": make_state(mesh).step}}
  with Checkpointer(tmp_path / "c") as checkpointer:
    checkpointer.save(3, state, {})
    checkpointer.wait()
    before = files(tmp_path)
    like = abstract(state)["params"]
    a = like["a"]
    cast = jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding)
    turned = jax.ShapeDtypeStruct((4, 8), a.dtype, sharding=a.sharding)
    cases = [
      ({"a": cast}, r"params.a: expected bfloat16\[8, 4\], found float32\[8, 4\]"),
      ({"a": turned}, r"params.a: expected float32\[4, 8\], found float32\[8, 4\]"),
      ({"z": a}, r"params.z: expected float32\[8, 4\], found no such parameter"),
    ]
    for change, message in cases:
      with pytest.raises(ValueError, match=rf"^checkpoint .*c/3: {message}$"):
        checkpointer.restore({"params": like | change})
      with pytest.raises(ValueError, match=rf"^checkpoint .*c/3: {message}$"):
        checkpointer.restore_params(like | change)
    with pytest.raises(ValueError, match=r"params.b: expected no such parameter, found int32\[\]$"):
      checkpointer.restore({"params": {"a": a}})
  assert files(tmp_path) == before


def test_leaves_must_be_sharded_arrays_with_names_of_their_own(mesh, tmp_path):
  good = make_state(mesh).step
  with Checkpointer(tmp_path / "c") as checkpointer:
    with pytest.raises(ValueError, match=r"state: a.b: expected a jax.Array, found float"):
      checkpointer.save(1, {"a": {"b": 1.0}}, {})
    with pytest.raises(ValueError, match=r"every leaf to have its own name, found two of a.b"):
      checkpointer.save(1, {"a": {"b": good}, "a.b": good}, {})
    checkpointer.save(1, {"a": good}, {})
    bare = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ValueError, match=r"state: a: .* found ShapeDtypeStruct without sharding"):
      checkpointer.restore({"a": bare})


def test_a_foreign_folder_is_left_alone(mesh, tmp_path):
  folder = tmp_path / "c"
  folder.mkdir()
  (folder / "notes.txt").write_text("mine")
  with pytest.raises(
    ValueError, match=r"c: expected only checkpoints of pt_jax, found 'notes.txt'"
  ):
    Checkpointer(folder)
  assert [p.name for p in folder.iterdir()] == ["notes.txt"]
  with ocp.CheckpointManager(tmp_path / "other") as manager:
    manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
  before = files(tmp_path)
  with pytest.raises(ValueError, match="other/1: expected 'pt_jax checkpoint 1', found another"):
    Checkpointer(tmp_path / "other")
  with pytest.raises(FileNotFoundError, match="none: expected a checkpoint, found none"):
    checkpoint.restore_params(tmp_path / "none", {"w": make_state(mesh).step})
  assert files(tmp_path) == before


def test_params_of_one_stage_start_the_next(mesh, tmp_path):
  state = make_state(mesh)
  for seed in (1, 0):
    checkpoint.save_params(tmp_path / "params", make_state(mesh, seed).params)
  assert len(list((tmp_path / "params").iterdir())) == 1
  found = checkpoint.restore_params(tmp_path / "params", abstract(state.params))
  assert bits(found) == bits(state.params)
  with Checkpointer(tmp_path / "c") as checkpointer:
    checkpointer.save(9, state, {})
  found = checkpoint.restore_params(tmp_path / "c", abstract(state.params))  # out of a whole state
  assert bits(found) == bits(state.params)


SAVER = """
import sys, jax, jax.numpy as jnp
from pt_jax.checkpoint import Checkpointer
where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = {f"w{i}": jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=where) for i in range(8)}
with Checkpointer(sys.argv[1], keep=1) as checkpointer:
  step = checkpointer.latest_step() or 0
  if step:
    saved = checkpointer.restore(like)
    assert saved.host == {"step": step}, saved.host
    for i, w in enumerate(saved.state.values()):
      assert (w == step * 100 + i).all(), (step, i)
  print("restored", step, flush=True)
  while True:
    step += 1
    state = {f"w{i}": jnp.full((64, 1024), step * 100 + i, jnp.float32) for i in range(8)}
    checkpointer.save(step, state, {"step": step})
    print("saving", step, flush=True)
"""


def start(script, *arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", script, *map(str, arguments)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment},
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_sigkill_in_the_middle_of_saves(tmp_path):
  """Each child checks the bits of the checkpoint it finds, then saves until it is killed."""
  rng = np.random.default_rng(0)
  folder = tmp_path / "c"
  known = 0  # the last step that is certainly complete
  half_written = 0
  for _ in range(5):
    child = start(SAVER, folder)
    first = child.stdout.readline().split()
    assert first[:1] == ["restored"], child.communicate()[1]
    assert int(first[1]) >= known
    for _ in range(3):  # a save waits for the one before
      known = int(child.stdout.readline().split()[1]) - 1
    time.sleep(rng.uniform(0, 0.1))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    half_written += any(checkpoint.HALF_WRITTEN in p.name for p in folder.iterdir())
  assert half_written, "no kill hit a save: the test shows nothing"
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with Checkpointer(folder, keep=1) as checkpointer:
    step = checkpointer.latest_step()
    assert step >= known
    leaf = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=where)
    state = checkpointer.restore({f"w{i}": leaf for i in range(8)}).state
    assert all((w == step * 100 + i).all() for i, w in enumerate(state.values()))
    checkpointer.save(step + 1, state, {})
  assert [p.name for p in folder.iterdir()] == [str(step + 1)]  # what was half-written is gone


PROCESS = """
import sys, jax, numpy as np
from pt_jax import sharding
from pt_jax.checkpoint import Checkpointer
folder, port, count, index = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
  jax.distributed.initialize(f"localhost:{port}", count, index)
mesh = sharding.make_mesh(data=4)
full = np.arange(32, dtype=np.float32).reshape(8, 4)
place = jax.NamedSharding(mesh, jax.P("data"))
w = jax.make_array_from_callback(full.shape, place, lambda i: full[i])
with Checkpointer(folder) as checkpointer:
  if checkpointer.latest_step() is None:
    checkpointer.save(1, {"w": w}, {"process": index}, local={"process": index} if count > 1 else
    None)
  try:
    saved = checkpointer.restore({"w": w})
  except ValueError as error:
    print(error)
  else:
    for shard in saved.state["w"].addressable_shards:
      np.testing.assert_array_equal(shard.data, full[shard.index])
    print(saved.host, saved.local)
"""


def run_processes(folder, count):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}"}
  children = [start(PROCESS, folder, port, count, i, **flags) for i in range(count)]
  outputs = [child.communicate(timeout=60) for child in children]
  assert all(child.returncode == 0 for child in children), outputs
  return [out.splitlines()[-1] for out, _ in outputs]  # the collectives print lines of their own


def test_two_processes_save_one_checkpoint(tmp_path):
  two = ["{'process': 0} {'process': 0}", "{'process': 0} {'process': 1}"]
  assert run_processes(tmp_path / "c", 2) == two
  (line,) = run_processes(tmp_path / "c", 1)
  assert line.endswith("c/1: expected 2 processes, each with its own host state, found 1")
