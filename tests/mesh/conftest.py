"""8 CPU devices for everything in this folder, asked for before JAX starts."""

import os

import jax
import pytest

os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
  """Fails rather than skips: a test that needs 8 devices and ran on 1 has shown nothing."""
  assert jax.device_count() == 8, f"tests/mesh: expected 8 devices, found {jax.device_count()}"
