"""What this installation consists of: ``python -m fastbandit.info [--json] [--binary]``.

Versions, compilers, architectures, which backend serves each op on each device and, where a
native library is not in use, why. This is what to paste into a bug report.
"""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import argparse
import ctypes
import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

from fastbandit import _start
from fastbandit._output import flushed, lasting_streams
from fastbandit._program import examples, program
from fastbandit._version import __version__

__all__ = ["build_info", "main", "processor"]


def build_info() -> dict[str, Any]:
    """Facts about the installed package; loads torch and the native libraries.

    Returns:
        A dict of plain values:

        - ``fastbandit``, ``python``, ``platform``, ``torch``, ``torch_cuda`` (None for a build
          without CUDA): versions;
        - ``devices``: names and compute capabilities of the visible GPUs;
        - ``threads``: threads of torch's pool; ``waiting``: how they wait for each other
          (``policy``, ``reason`` and the environment's ``variables``); ``cpu_isa``: the
          instruction set that the CPU kernels use (``avx512vpopcntdq``, ``avx512``, ``avx2``,
          ``baseline``), None where they are not loaded;
        - ``build``: how the native libraries were built (``torch``, ``torch_target``,
          ``compiler``, ``cxx_flags``, ``machine``, ``cuda``, ``cuda_reason``, ``nvcc_flags``,
          ``architectures``), or None with ``build_reason`` for a pure-Python installation;
        - ``libraries``: :func:`fastbandit._native.status`;
        - ``ops``: for each op, ``native`` or ``reference`` by device.
    """
    import torch

    import fastbandit.ops  # noqa: F401 (declares the ops and loads the libraries)
    from fastbandit import _native
    from fastbandit.ops._register import OPERATORS

    build: dict[str, Any] | None
    try:
        native_info = importlib.import_module("fastbandit._native_info")
        build, reason = dict(native_info.build_info()), None
    except ImportError as error:
        build, reason = None, str(error)
    libraries = _native.status()
    return {
        "fastbandit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "waiting": _waiting(),
        "cpu_isa": _cpu_isa(libraries["cpu"]),
        "build": build,
        "build_reason": reason,
        "libraries": libraries,
        "ops": {
            name: {
                device: "native" if _has_kernel(name, device) else "reference"
                for device in _native.DEVICES
            }
            for name in sorted(OPERATORS)
        },
    }


def processor() -> str:
    """The model of the processor, as far as the system tells."""
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _waiting() -> dict[str, Any]:
    waiting = _start.waiting()
    return {"policy": waiting.policy, "reason": waiting.reason, "variables": waiting.variables}


def _devices() -> list[str]:
    import torch

    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return names


def _cpu_isa(library: dict[str, Any]) -> str | None:
    if not library["loaded"]:
        return None
    function = ctypes.CDLL(library["path"]).fastbandit_cpu_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _has_kernel(name: str, device: str) -> bool:
    import torch

    # A reference is registered for an alias of all devices, a native kernel for the device's own
    # key.
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbandit::{name}", device.upper())
    )


def _text(info: dict[str, Any]) -> str:
    lines = [
        f"fastbandit {info['fastbandit']}, python {info['python']}, {info['platform']}",
        f"torch {info['torch']}, CUDA {info['torch_cuda'] or 'none'}, {info['threads']} threads, "
        f"CPU kernels for {info['cpu_isa'] or 'nothing: not loaded'}",
    ]
    waiting = info["waiting"]
    lines.append(f"threads wait: {waiting['policy']} ({waiting['reason']})")
    lines += [f"GPU {index}: {name}" for index, name in enumerate(info["devices"])]
    build = info["build"]
    if build is None:
        lines.append(f"built: no native libraries ({info['build_reason']})")
    else:
        cuda = (
            f"nvcc {build['cuda']} for {' '.join(build['architectures'])}"
            if build["cuda"]
            else f"no CUDA: {build['cuda_reason']}"
        )
        lines.append(f"built: {build['compiler']}; {cuda}; beside torch {build['torch']}")
    for device in ("cpu", "cuda"):
        library = info["libraries"][device]
        state = f"loaded, {library['path']}" if library["loaded"] else library["reason"]
        lines.append(f"{device} library: {state}")
    width = max(map(len, info["ops"]))
    lines.append("")
    lines.append(f"{'op':{width}}  {'cpu':9}  cuda")
    for name, backends in info["ops"].items():
        lines.append(f"{name:{width}}  {backends['cpu']:9}  {backends['cuda']}")
    return "\n".join(lines)


def _run(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("info"),
        description="Say what this installation consists of.",
        epilog=examples("info").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--binary",
        action="store_true",
        help="measure how fast 1-bit convolutions are on this CPU, beside float32: some seconds",
    )
    options = parser.parse_args(arguments)
    info = build_info()
    if not options.binary:
        print(json.dumps(info, indent=2) if options.json else _text(info))
        return 0
    from fastbandit import _speed

    rows = _speed.measure()
    if options.json:
        print(json.dumps({**info, "binary": rows}, indent=2))
    else:
        print(f"{_text(info)}\n\n{_speed.table(rows)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    # Not _cli.guard: what is to be pasted into a bug report needs no other package than torch.
    with lasting_streams():
        try:
            return flushed(lambda: _run(arguments))
        except OSError as error:
            print(f"info: error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    raise SystemExit(main())
