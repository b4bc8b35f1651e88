"""The binaries, run as people run them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run_binary(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `python -m experiments.NAME` in the project folder, on CPU, to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
