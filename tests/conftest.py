"""What every test process has: the CPU, cheap compilation, one cache of it for the session, a mesh.

Environment variables are set before JAX starts, and reach pytest-xdist's workers and the processes
that tests start. tests/mesh wants 8 devices, so it never shares a process with the rest: a run of
everything leaves it to tests/test_mesh.py.
"""

import os
import pathlib
import tempfile

import pytest

MESH = pathlib.Path(__file__).parent / "mesh"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's optimisation is off: tests spend their time on compiling, and what they test is decided
# before LLVM. Seen: 139 s of CPU time instead of 215 s in three files. A test that counts units of
# the last place asks for it itself (tests/kernels/test_rollout_is_training.py).
os.environ["XLA_FLAGS"] = (
  f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
)


def pytest_configure(config: pytest.Config) -> None:
  """One cache of compiled programs for all processes of a session; the first process makes it."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  cache = tempfile.TemporaryDirectory(prefix="pt_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  config.add_cleanup(cache.cleanup)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
  """tests/mesh is collected only where it is all that was asked for."""
  asked = [pathlib.Path(arg.split("::")[0]).resolve() for arg in config.args]
  alone = all(path.is_relative_to(MESH) for path in asked)
  return True if collection_path == MESH and not alone else None


@pytest.fixture
def one_device():
  """A mesh of one device in context: models and steps run as on a laptop."""
  import jax

  from pt_jax import sharding

  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh
