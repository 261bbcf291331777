"""What nvcc says about the kernels: no register spills, no stack beyond what is declared."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu"))
# Those that setup.py builds for where nothing says otherwise.
ARCHITECTURES = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@cache
def setup_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, read as text: importing it would need setuptools."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    match = re.search(r"^NVCC_FLAGS = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    return re.findall(r'"([^"]*)"', match.group(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_spills(kernel, architecture, tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("no nvcc")
    command = [nvcc, "-cubin", f"-arch={architecture}", *setup_flags(), f"-I{ROOT / 'csrc'}"]
    command += ["-Xptxas=-v", str(kernel), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        text,
    )
    assert found, f"ptxas said nothing of a kernel:\n{text}"
    spilling = [entry for entry in found if entry[2] != "0" or entry[3] != "0"]
    assert not spilling, f"kernels with register spills: {spilling}"
