"""Tests again with an instruction set that this CPU would not choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbandit import _native

# Those below the best one, which the tests run with anyway.
OTHERS = pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])


def run_again(file: str, instruction_set: str, keyword: str) -> None:
    """The tests of a file that match; which set is used is decided once for a process."""
    if os.environ.get("FASTBANDIT_CPU"):
        pytest.skip("already one of them")
    if not _native.status()["cpu"]["loaded"]:
        pytest.skip("the native CPU library is not loaded")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", keyword],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "FASTBANDIT_CPU": instruction_set},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
