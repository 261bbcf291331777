"""What the compiler made of the CUDA kernels: registers, spills and instructions. Needs no GPU.

    python benchmarks/sass_counts.py                              # depthwise and Gabor kernels, 9.0
    python benchmarks/sass_counts.py --arch 8.0 8.6 9.0 10.0 12.0 --file csrc/cuda/gabor_kernel.cu

Takes nvcc from PATH or CUDA_HOME. Instructions need nvdisasm, which some toolkits come without
(``pip install nvidia-cuda-nvdisasm``; --nvdisasm names it); registers and spills do not. A count is
static: each instruction of the machine code once, so a loop counts once whatever its rounds, and a
branch that is not taken counts too. The exit status is 1 where a kernel spills registers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    f"csrc/cuda/{name}.cu"
    for name in ("depthwise/strided", "depthwise/staged", "depthwise/staged_weight", "gabor_kernel")
]
# As setup.py compiles them.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "--expt-relaxed-constexpr"]
# Sums of a thread of the depthwise kernels: 4 x 4 pixels of so many channels, by filter size.
CHANNELS = {"strided": {3: 1, 5: 1, 7: 1}, "staged": {3: 4, 5: 2, 7: 2}}
TYPES = {"f": "float32", "d": "float64"}


@dataclass
class Kernel:
    """One instance of a kernel on one architecture."""

    name: str
    registers: int
    spilled: int  # bytes stored and loaded
    instructions: Counter[str]

    @property
    def outputs(self) -> int | None:
        """Outputs of a thread, of the depthwise kernels."""
        found = re.match(r"(strided|staged)(_weight)?_kernel<(\d)", self.name)
        return 16 * CHANNELS[found[1]][int(found[3])] if found else None


def readable(symbol: str) -> str:
    """``staged_kernel<3, float32, float32, 0>`` of a mangled name."""
    found = re.search(r"(?<=\d)([a-z_]*[a-z]_kernel)(?:I(.*?)EEv|E)", symbol)
    if not found:
        return symbol
    text = re.sub(r"NS\w*?_8bfloat16E|N\w*?8bfloat16E", "<bfloat16>", found[2] or "")
    text = re.sub(r"NS\w*?_7float16E|N\w*?7float16E", "<float16>", text)
    parts = re.findall(r"L[ib](\d+)E?|<(\w+)>|(S\d*_)|([fd])", text)
    arguments: list[str] = []
    for number, half, again, plain in parts:
        arguments.append(number or half or (arguments[-1] if again else TYPES[plain]))
    return f"{found[1]}<{', '.join(arguments)}>" if arguments else found[1]


def compiled(nvcc: str, nvdisasm: str | None, file: Path, architecture: str) -> list[Kernel]:
    """All kernels of a file.

    Raises:
        SystemExit: the file does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        arch = f"-arch=sm_{architecture.replace('.', '')}"
        command = [nvcc, *FLAGS, arch, "-cubin", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", str(file)]
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        code = ""
        if nvdisasm is not None:
            shown = subprocess.run(
                [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
            )
            code = shown.stdout
    return kernels_of(done.stdout + done.stderr, code)


def kernels_of(report: str, code: str) -> list[Kernel]:
    """Of what ``ptxas -v`` and ``nvdisasm -c`` print."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in code.splitlines():
        if section := re.match(r"\s*\.text\.(\w+):", line):
            current = counts.setdefault(section[1], Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line):
            current[found[1]] += 1
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        symbol = part.partition("'")[0]
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        used = re.search(r"Used (\d+) registers", part)
        code_of = counts.get(symbol, Counter())
        del code_of["NOP"]  # what fills the end
        kernels.append(Kernel(readable(symbol), int(used[1]) if used else 0, spilled, code_of))
    return sorted(kernels, key=lambda kernel: kernel.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["9.0"], help="compute capabilities")
    parser.add_argument("--file", nargs="+", default=FILES, help="kernel files")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"), help="the disassembler")
    options = parser.parse_args()
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("expected nvcc on PATH or in CUDA_HOME, found none")
    print("| kernel | sm | registers | spilled bytes | instructions | FFMA | per output |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    spilled = 0
    for architecture in options.arch:
        for file in options.file:
            for kernel in compiled(nvcc, options.nvdisasm, ROOT / file, architecture):
                total = sum(kernel.instructions.values())
                each = f"{total / kernel.outputs:.0f}" if total and kernel.outputs else ""
                print(
                    f"| {kernel.name} | {architecture} | {kernel.registers} | {kernel.spilled} | "
                    f"{total or ''} | {kernel.instructions['FFMA'] if total else ''} | {each} |",
                    flush=True,
                )
                spilled += kernel.spilled
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
