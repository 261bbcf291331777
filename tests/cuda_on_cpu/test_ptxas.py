"""What nvcc says about the kernels: no register spills, no stack beyond what is declared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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


def ptxas_says(kernel: Path, architecture: str, folder: Path) -> str:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("no nvcc")
    command = [nvcc, "-cubin", f"-arch={architecture}", *setup_flags(), f"-I{ROOT / 'csrc'}"]
    command += ["-Xptxas=-v", str(kernel), "-o", str(folder / f"{architecture}.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    return text


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_spills(kernel, tmp_path):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda name: ptxas_says(kernel, name, tmp_path), ARCHITECTURES)
        said = dict(zip(ARCHITECTURES, texts, strict=True))
    for architecture, text in said.items():
        found = re.findall(
            r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            text,
        )
        assert found, f"ptxas said nothing of a kernel for {architecture}:\n{text}"
        spilling = [entry for entry in found if entry[2] != "0" or entry[3] != "0"]
        assert not spilling, f"kernels with register spills on {architecture}: {spilling}"
