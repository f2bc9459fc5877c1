"""Runs each file of tests/mesh in a process of its own, which has 8 CPU devices."""

import pathlib
import re
import subprocess
import sys

import pytest

FILES = sorted(path.name for path in (pathlib.Path(__file__).parent / "mesh").glob("test_*.py"))


def run(root, *arguments):
  """A pytest of its own on files of tests/mesh, which has to pass."""
  command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *arguments]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  print(done.stdout, done.stderr, sep="\n")  # pytest shows it when the test fails
  assert done.returncode == 0
  assert re.search(r"^=+ \d+ passed", done.stdout, re.M), "expected tests that passed"


@pytest.mark.parametrize("name", FILES)
def test_on_eight_devices(name, pytestconfig):
  run(pytestconfig.rootpath, f"tests/mesh/{name}")


@pytest.mark.slow
def test_all_combinations_on_eight_devices(pytestconfig):
  """96 cases of mesh, ZeRO, microbatches, packing and loss; the pairs of them are above."""
  run(pytestconfig.rootpath, "-m", "slow", "tests/mesh/test_training_mesh.py")
