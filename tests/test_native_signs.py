"""The CPU kernels of packed signs by themselves, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastbandit import _native, info

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wno-psabi",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}",
]  # fmt: skip
# As setup.py does.
MACROS = {
    "baseline": [],
    "avx2": ["-DFB_ISA_AVX2"],
    "avx512": ["-DFB_ISA_AVX512"],
    "avx512vpopcntdq": ["-DFB_ISA_AVX512VPOPCNTDQ"],
}


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", MACROS)
def test_nothing_is_read_or_written_beside_a_buffer(instruction_set, tmp_path):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if not _native.status()["cpu"]["loaded"]:
        pytest.skip("the native CPU library is not loaded")
    order = list(MACROS)
    if order.index(instruction_set) > order.index(info.build_info()["cpu_isa"]):
        pytest.skip(f"this CPU has no {instruction_set}")
    program = tmp_path / "signs"
    command = [COMPILER, *FLAGS, f"-DFB_ISA={instruction_set}", *MACROS[instruction_set]]
    sources = [SOURCES / "cpu" / "kernels" / "binary.cpp", HERE / "native_signs.cpp"]
    running = []
    for source in sources:
        # Macros of an instruction set turn headers into its code; the plain loops are not.
        used = command if source.parent != HERE else command[: len(FLAGS) + 2]
        made = tmp_path / f"{source.stem}.o"
        running.append((made, subprocess.Popen([*used, "-c", str(source), "-o", str(made)])))
    assert [process.wait() for _, process in running] == [0, 0]
    objects = [str(made) for made, _ in running]
    subprocess.run([COMPILER, *FLAGS, *objects, "-o", str(program)], check=True)
    for seed in (1, 2):
        done = subprocess.run([program, str(seed), "400"], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert done.stdout == "400 problems\n"
