"""Runs each file of tests/mesh in a process of its own, which has 8 CPU devices."""

import pathlib
import re
import subprocess
import sys

import pytest

FILES = sorted(path.name for path in (pathlib.Path(__file__).parent / "mesh").glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_on_eight_devices(name, pytestconfig):
  command = [sys.executable, "-m", "pytest", "-p", "no:xdist", f"tests/mesh/{name}"]
  done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
  print(done.stdout, done.stderr, sep="\n")  # pytest shows it when the test fails
  assert done.returncode == 0
  assert re.search(r"^=+ \d+ passed", done.stdout, re.M), "expected tests that passed"
