"""The build: what setup.py decides, and what the libraries it made depend on."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import fastbandit

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = sorted((ROOT / "fastbandit").glob("_kernels_*.so"))


@pytest.fixture
def setup_py() -> ModuleType:
    """setup.py as a module; it builds nothing when it is imported."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a source checkout")
    spec = importlib.util.spec_from_file_location("fastbandit_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_names_the_instruction_sets_that_are_built(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.platform, "machine", lambda: "x86_64")
    row = re.search(r"^\| `FASTBANDIT_CPU` .*$", (ROOT / "docs/install.md").read_text(), re.M)
    assert row is not None
    assert re.findall(r"`([^`]+)`", row[0])[1:] == setup_py.instruction_sets("binary.cpp")


def fake_torch(folder: Path, version: str = "2.13.0", cuda: str | None = None) -> Path:
    root = folder / "torch"
    header = root / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (root / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
        "hip: Optional[str] = None\n"
    )
    return root


def fake_toolkit(folder: Path, version: str = "13.0") -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda tools, release {version}, V{version}.1";;\n'
        "--list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_90\\n';; esac\n"
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return folder


# --- The libraries that are there -----------------------------------------------------------------


@pytest.mark.skipif(not LIBRARIES, reason="no native library was built")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_the_libraries_use_only_the_stable_interface_of_torch(library):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split("U ", 1)[1] for line in text.splitlines() if " U " in line]
    assert any(name.startswith("aoti_torch_") for name in symbols)
    mangled = [name for name in symbols if re.search(r"\b(at|c10|torch)::", name)]
    assert mangled == []


@pytest.mark.skipif(not LIBRARIES, reason="no native library was built")
def test_the_cuda_runtime_is_linked_statically():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    for library in LIBRARIES:
        text = subprocess.run(
            ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
        ).stdout
        needed = re.findall(r"NEEDED.*\[(.*?)\]", text)
        assert not [name for name in needed if "cudart" in name]
        assert "libtorch_cpu.so" in needed
        assert ("libtorch_cuda.so" in needed) == ("cuda" in library.name)


# --- Decisions ------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{fastbandit.__version__}"' in text


def test_versions_are_compared_as_versions(setup_py):
    assert setup_py.version_tuple("2.9.1") < setup_py.version_tuple("2.10.0+cu130") == (2, 10, 0)


def test_torch_is_read_without_importing_it(setup_py, monkeypatch, tmp_path):
    fake_torch(tmp_path, "2.11.0+cu130", "13.0")
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    torch = setup_py.find_torch()
    assert (torch.version, torch.cuda, torch.root) == ("2.11.0+cu130", "13.0", tmp_path / "torch")


@pytest.mark.parametrize("version", [None, "2.9.1"])
def test_no_torch_or_an_old_one_is_one_line(setup_py, monkeypatch, tmp_path, version):
    if version:
        fake_torch(tmp_path, version)
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(setup_py.site, "getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10") as caught:
        setup_py.find_torch()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "toolkit", "built", "reason"),
    [
        (None, None, "13.0", False, "this torch has no CUDA"),
        (None, "13.0", "13.0", True, ""),
        (None, "12.8", "13.0", False, "torch was built for CUDA 12.8"),
        (None, "13.0", None, False, "no CUDA toolkit"),
        ("0", "13.0", "13.0", False, "FASTBANDIT_CUDA=0"),
        ("1", None, "13.0", True, ""),
    ],
)
def test_when_cuda_is_built(
    setup_py, monkeypatch, tmp_path, wish, torch_cuda, toolkit, built, reason
):
    monkeypatch.delenv("FASTBANDIT_CUDA", raising=False)
    if wish is not None:
        monkeypatch.setenv("FASTBANDIT_CUDA", wish)
    found = setup_py.Toolkit(tmp_path, toolkit) if toolkit else None
    monkeypatch.setattr(setup_py, "find_toolkit", lambda: found)
    torch = setup_py.Torch(tmp_path, "2.13.0", torch_cuda, None)
    got, text = setup_py.decide_cuda(torch)
    assert (got is not None) == built
    assert text.startswith(reason)


def test_cuda_that_is_demanded_and_impossible_is_an_error(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTBANDIT_CUDA", "1")
    monkeypatch.setattr(setup_py, "find_toolkit", lambda: None)
    with pytest.raises(SystemExit, match="FASTBANDIT_CUDA=1, but no CUDA toolkit"):
        setup_py.decide_cuda(setup_py.Torch(tmp_path, "2.13.0", None, None))
    monkeypatch.setenv("FASTBANDIT_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTBANDIT_CUDA is 'yes'; expected 0, 1 or nothing"):
        setup_py.decide_cuda(setup_py.Torch(tmp_path, "2.13.0", None, None))


def test_the_toolkit_behind_a_wrapper_script_is_found(setup_py, monkeypatch, tmp_path):
    toolkit = fake_toolkit(tmp_path / "cuda-13.0")
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/bin:/usr/bin")
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda p: "/usr/local" not in str(p) and real(p))
    found = setup_py.find_toolkit()
    assert (found.root, found.version) == (toolkit, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "chosen", "12.9")))
    assert setup_py.find_toolkit().version == "12.9"


def test_architectures(setup_py, monkeypatch, tmp_path):
    toolkit = setup_py.Toolkit(fake_toolkit(tmp_path), "13.0")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup_py, "visible_architectures", list)
    # The fake nvcc knows no 10.0 and 12.0: the list ends where its knowledge does.
    assert setup_py.architectures(toolkit) == ["8.0", "8.6", "9.0+PTX"]
    monkeypatch.setattr(setup_py, "visible_architectures", lambda: ["9.0"])
    assert setup_py.architectures(toolkit) == ["9.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert setup_py.architectures(toolkit) == ["8.0", "9.0a", "12.0+PTX"]
    assert setup_py.gencode(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has 'Hopper'"):
        setup_py.architectures(toolkit)


# --- Installing -----------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source checkout")
def test_without_a_compiler_the_install_is_pure_python(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path),
         "--bdist-dir", str(tmp_path / "bdist")],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("fastbandit:")]
    assert lines == [
        "fastbandit: pure-Python install, no C++ compiler (no-such-compiler) was found"
    ]
    assert [path.name for path in tmp_path.glob("*.whl")] == [
        f"fastbandit-{fastbandit.__version__}-py3-none-any.whl"
    ]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        place = f"fastbandit-{fastbandit.__version__}.dist-info"
        assert (
            "fastbandit = fastbandit.__main__:main"
            in wheel.read(f"{place}/entry_points.txt").decode()
        )
        needed = [
            line.removeprefix("Requires-Dist: ")
            for line in wheel.read(f"{place}/METADATA").decode().splitlines()
            if line.startswith("Requires-Dist") and "extra ==" not in line
        ]
        wheel.extractall(tmp_path / "installed")
        assert packaged(wheel) == sources()
    # What only builds is not needed to run.
    assert not [need for need in needed if need.startswith(("setuptools", "wheel", "pyb", "ninja"))]
    # It runs where the sources are not.
    done = subprocess.run(
        [sys.executable, "-m", "fastbandit", "search", "--print-config"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "space: robust9-light" in done.stdout


def sources() -> set[str]:
    """What a wheel has to hold: every module, preset, template and data file of the package."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fastbandit").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert {"fastbandit/py.typed", "fastbandit/_data/digits.npz"} < found
    assert any(name.startswith("fastbandit/_data/genotypes/") for name in found)
    assert any(name.startswith("fastbandit/report/templates/") for name in found)
    return found


def packaged(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_a_wheel_with_kernels_holds_them_and_names_its_platform(tmp_path):
    """The compiler writes empty files: what a wheel takes along does not depend on them."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo "one that writes nothing, 1.0" && exit\n'
        'while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) rule=$2;; esac; shift; done\n'
        ': > "$out"; [ -z "$rule" ] || echo "$out:" > "$rule"\n'
    )
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"),
         "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "bdist")],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler), "FASTBANDIT_CUDA": "0",
             "FASTBANDIT_BUILD": str(tmp_path / "objects")},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"{python}-{python}-{platform}"
    assert file.name == f"fastbandit-{fastbandit.__version__}-{tag}.whl"
    with zipfile.ZipFile(file) as wheel:
        native = {name for name in packaged(wheel) if name.endswith(".so")}
        assert packaged(wheel) - native == sources()
        # No kernels of another build that lie beside the sources.
        assert "fastbandit/_kernels_cpu.so" in native
        assert not [name for name in native if "cuda" in name]
        assert all(wheel.getinfo(name).file_size == 0 for name in native)
        about = wheel.read(f"fastbandit-{fastbandit.__version__}.dist-info/WHEEL").decode()
    assert f"Tag: {tag}" in about
    assert "Root-Is-Purelib: false" in about


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_object_files_that_stay_are_not_compiled_again(tmp_path):
    """Two builds into places of their own, as with pip, after one of the kernels alone.

    The compiler notes what it is asked.
    """
    asked, compiler = tmp_path / "asked", tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo "one that writes nothing, 1.0" && exit\n'
        f'case " $* " in *" -c "*) echo compile;; *) echo link;; esac >> {asked}\n'
        'while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) rule=$2;; esac; shift; done\n'
        ': > "$out"; [ -z "$rule" ] || echo "$out:" > "$rule"\n'
    )
    compiler.chmod(0o755)
    found = []
    for number in range(3):
        asked.write_text("")
        build = ["build_ext", "--build-lib", str(tmp_path / f"lib{number}"),
                 "--build-temp", str(tmp_path / f"temp{number}")]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", *(build if number else ["kernels"])],
            cwd=ROOT,
            env={**os.environ, "CXX": str(compiler), "FASTBANDIT_CUDA": "0",
                 "FASTBANDIT_BUILD": str(tmp_path / "objects")},
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        made = tmp_path / f"lib{number}" / "fastbandit" / "_kernels_cpu.so"
        assert made.is_file() == (number > 0)
        found.append(asked.read_text().split())
    kernels, rest, again = found
    sources = {place: len(list((ROOT / "csrc" / "cpu").glob(f"{place}*.cpp"))) for place in
               ("", "kernels/")}  # fmt: skip
    assert set(kernels) == {"compile"}
    # For each of three instruction sets, and one more that only signs have, or for one alone.
    assert len(kernels) in (sources["kernels/"], 3 * sources["kernels/"] + 1)
    # Those that include torch, and the facts of the build where they can be compiled.
    assert rest.count("compile") - sources[""] in (0, 1)
    assert set(again) == {"link"}


def test_a_kernel_ends_the_instruction_set_that_it_began():
    """clang refuses a source that leaves its attributes on; gcc, which builds here, does not."""
    kernels = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))
    assert len(kernels) > 3
    for kernel in kernels:
        lines = kernel.read_text(encoding="utf-8").split("\n")
        assert lines[-2:] == ['#include "cpu/simd/end.h"', ""], kernel
    begun, ended = (
        (ROOT / "csrc" / "cpu" / "simd" / name).read_text(encoding="utf-8")
        for name in ("simd.h", "end.h")
    )
    assert begun.count("#pragma clang attribute push") == 3  # of which one is taken
    assert ended.count("#pragma clang attribute pop") == 1
