"""8 CPU devices for everything in this folder, asked for before JAX starts.

LLVM's optimisation is off: these tests spend their time on compiling, and what they test is decided
before LLVM. Seen: 16 s a case with it, 5 s without.
"""

import os

import jax
import pytest

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
  """Fails rather than skips: a test that needs 8 devices and ran on 1 has shown nothing."""
  assert jax.device_count() == 8, f"tests/mesh: expected 8 devices, found {jax.device_count()}"
