"""Runs the CUDA launchers of ``csrc/cuda/*_kernel.cu`` on the CPU, compiled against cuda_shim.h.

A :class:`Call` names a launcher and its arguments. :func:`run` calls it in this process;
:func:`run_sanitized` runs many calls in one subprocess under AddressSanitizer and UBSan, where
each tensor's storage is an allocation of exactly its size. Tensors are changed in place by both.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

FLAGS = ["-std=c++17", "-g1", "-fPIC", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
MODES = {
    "plain": ["-O1"],
    # Recovery off: the first finding ends the process, and the test sees its text. Not optimised:
    # the checks in unrolled loops take the optimiser several times as long as they then run.
    "sanitized": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

# csrc/dtype.h
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.int64: 5,
}

# Kernels of an op in further files, which are compiled beside each other.
MORE_SOURCES = {"depthwise_conv2d": "csrc/cuda/depthwise/*.cu"}

Argument = Tensor | int | float | list[int] | None


@dataclass
class Call:
    """One call of ``function`` in the library of ``op``; ``name`` is for messages."""

    op: str
    function: str
    arguments: list[Argument]
    name: str = ""
    kept: list[Any] = field(default_factory=list)


@cache
def library(op: str, mode: str) -> Path:
    """Compiles ``csrc/cuda/<op>_kernel.cu`` (and ``<op>_entry.cpp`` if there is one), cached by
    the text of everything it could include."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    sources = [ROOT / "csrc" / "cuda" / f"{op}_kernel.cu"]
    sources += sorted(ROOT.glob(MORE_SOURCES[op])) if op in MORE_SOURCES else []
    entry = HERE / f"{op}_entry.cpp"
    sources += [entry] if entry.is_file() else []
    flags = [*FLAGS, *MODES[mode], f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    digest = hashlib.sha256(" ".join([COMPILER, *flags]).encode())
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h")]
    for path in sorted(headers) + sources:
        digest.update(path.read_bytes())
    target = BUILD / f"{op}-{mode}-{digest.hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{op}-{mode}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that want it, one compiles
        if not target.is_file():
            for old in BUILD.glob(f"{op}-{mode}-*.so"):
                old.unlink()
            _compile(sources, flags, target)
    return target


def _compile(sources: list[Path], flags: list[str], target: Path) -> None:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        objects = [str(Path(folder) / f"{path.stem}.o") for path in sources]
        running = [
            subprocess.Popen([COMPILER, *flags, "-x", "c++", "-c", str(path), "-o", made])
            for path, made in zip(sources, objects, strict=True)
        ]
        assert [process.wait() for process in running] == [0] * len(running)
        linked = Path(folder) / target.name
        subprocess.run([COMPILER, *flags, "-shared", *objects, "-o", str(linked)], check=True)
        linked.replace(target)


@cache
def _loaded(op: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(library(op, "plain")))


def run(call: Call) -> None:
    """Calls the launcher in this process, on the tensors' own memory."""

    def convert(argument: Argument) -> Any:
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        if isinstance(argument, list):
            return (ctypes.c_int64 * max(1, len(argument)))(*argument)
        # An int parameter reads the lower half of the same register or stack slot.
        return ctypes.c_int64(argument)

    function = getattr(_loaded(call.op), call.function)
    function.restype = ctypes.c_char_p
    error = function(*map(convert, call.arguments))
    assert error is None, f"{call.name}: {error.decode()}"


def launches(call: Call) -> int:
    """Runs the call in this process; how many kernels it launched."""
    made = _loaded(call.op).launches_made
    made.restype = ctypes.c_int64
    before: int = made()
    run(call)
    return made() - before


def run_sanitized(calls: list[Call], **environment: str) -> None:
    """Runs the calls in one subprocess under the sanitizers; fails with what they print."""
    message = []
    for call in calls:
        message.append(
            {
                "library": str(library(call.op, "sanitized")),
                "function": call.function,
                "name": call.name,
                "arguments": [_encode(argument) for argument in call.arguments],
            }
        )
    assert COMPILER is not None
    runtime = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_file():
            pytest.skip(f"the compiler has no {name}")
        runtime.append(found)
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(HERE / "sanitized_runner.py")],
        input=json.dumps(message),
        capture_output=True,
        text=True,
        timeout=300,
        env={
            "LD_PRELOAD": " ".join(runtime),
            # The interpreter itself leaks; only the kernels are of interest.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
            **environment,
        },
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-6000:]}"
    for call, results in zip(calls, json.loads(done.stdout), strict=True):
        for argument, result in zip(call.arguments, results, strict=True):
            if isinstance(argument, Tensor):
                data = bytearray(base64.b64decode(result))
                if data:
                    _bytes_of(argument).copy_(torch.frombuffer(data, dtype=torch.uint8))


def _encode(argument: Argument) -> dict[str, Any]:
    if argument is None:
        return {"kind": "null"}
    if isinstance(argument, Tensor):
        data = _bytes_of(argument).numpy().tobytes()
        return {
            "kind": "memory",
            "data": base64.b64encode(data).decode(),
            "offset": argument.storage_offset() * argument.element_size(),
        }
    if isinstance(argument, float):
        return {"kind": "double", "value": argument.hex()}
    if isinstance(argument, list):
        return {"kind": "int64s", "value": argument}
    return {"kind": "int64", "value": argument}


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage as uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def run_all(calls: list[Call], mode: str) -> None:
    """Runs the calls plainly or under the sanitizers."""
    if mode == "sanitized":
        run_sanitized(calls)
    else:
        for call in calls:
            run(call)


def exact(tensor: Tensor) -> Tensor:
    """The tensor with a storage of exactly its own extent, strides kept: ASan guards both ends."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copy.copy_(tensor)
