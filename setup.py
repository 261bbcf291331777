"""Builds the native kernels with ninja. All other metadata is in pyproject.toml.

Three libraries come out of ``csrc/``, each next to the Python files of the package:

``_kernels_cpu.so``    csrc/cpu/*.cpp and, once for each instruction set, csrc/cpu/kernels/*.cpp,
                       whenever there is a C++ compiler
``_kernels_cuda.so``   csrc/cuda/**/*.cu and *.cpp, when torch has CUDA and nvcc is found
``_native_info``       csrc/bindings.cpp, how the other two were built; alone uses Python

Environment: FASTBANDIT_CUDA (1: CUDA kernels or an error; 0: none), FASTBANDIT_BUILD (a folder
where objects stay for the next build), CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS.

torch is neither imported nor a build requirement: an isolated build would fetch a second copy of
several gigabytes. Only its headers, its libraries and the text of torch/version.py are used, from
the environment that runs the build.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 10)
# The oldest libtorch the libraries load into; the stable ABI keeps them loading into later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "9.0", "10.0", "12.0")
CPU, CUDA, INFO = "fastbandit._kernels_cpu", "fastbandit._kernels_cuda", "fastbandit._native_info"


class CannotBuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"fastbandit: {message}")


def version_tuple(text: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> ``(2, 13, 0)``, so that 2.9 sorts before 2.13."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def run_text(command: list[str]) -> str | None:
    """Standard output and error of a command; None when it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


# --- What the machine has -------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None
    hip: str | None


def find_torch() -> Torch:
    """The torch of the environment that runs the build, read as files and never imported."""
    candidates: list[str] = []
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.submodule_search_locations:
        candidates += [str(Path(place).parent) for place in spec.submodule_search_locations]
    # pip's isolated build hides site-packages from sys.path, but runs the same interpreter, so
    # sysconfig still names the place.
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    for key in ("purelib", "platlib"):
        candidates += [sysconfig.get_path(key), sysconfig.get_path(key, vars=base)]
    candidates.append(site.getusersitepackages())

    for candidate in dict.fromkeys(candidates):
        root = Path(candidate) / "torch"
        if not (root / "version.py").is_file():
            continue
        text = (root / "version.py").read_text(encoding="utf-8")

        def value(name: str, text: str = text) -> str | None:
            match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
            return match.group(1) if match else None

        version = value("__version__")
        if version is None:
            continue
        if version_tuple(version) < TORCH_MINIMUM:
            raise CannotBuildError(
                f"needs torch >= {'.'.join(map(str, TORCH_MINIMUM))} to build its kernels, "
                f"found {version} in {root}"
            )
        if not (root / "include/torch/csrc/stable/library.h").is_file():
            raise CannotBuildError(f"torch {version} in {root} has no C++ headers")
        return Torch(root, version, value("cuda"), value("hip"))
    raise CannotBuildError(
        "needs torch >= "
        + ".".join(map(str, TORCH_MINIMUM))
        + " installed in this environment before it is built (pip install torch); looked in "
        + ", ".join(dict.fromkeys(candidates))
    )


def find_compiler() -> tuple[list[str] | None, str]:
    """The C++ compiler's command and its version line, or None and the reason."""
    if sys.platform != "linux":
        return None, f"the native kernels are built on Linux only, this is {sys.platform}"
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]) is None:
            continue
        text = run_text([*command, "--version"])
        if text:
            return command, text.splitlines()[0].strip()
    return None, f"no C++ compiler ({chosen or 'c++, g++, clang++'}) was found"


@dataclass(frozen=True)
class Toolkit:
    root: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit: CUDA_HOME, the usual place, else where the nvcc on PATH says it lives.

    The nvcc on PATH may be a wrapper script, so its own folder says nothing.
    """
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # --dryrun prints its settings as '#$ TOP=/path' without compiling anything.
        text = run_text([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]) or ""
        top = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
        places.append(top.group(1).strip() if top else None)
    for place in places:
        if not place or not (Path(place) / "bin" / "nvcc").is_file():
            continue
        text = run_text([str(Path(place) / "bin" / "nvcc"), "--version"]) or ""
        version = re.search(r"release (\d+\.\d+)", text)
        if version:
            return Toolkit(Path(place).resolve(), version.group(1))
    return None


def visible_architectures() -> list[str]:
    """Compute capabilities of the GPUs in this machine, e.g. ['9.0']; empty without one."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    text = run_text([smi, "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    return sorted(set(re.findall(r"^\d+\.\d+$", text, re.MULTILINE)), key=version_tuple)


def architectures(toolkit: Toolkit) -> list[str]:
    """What to compile for, as TORCH_CUDA_ARCH_LIST writes it: ['8.0', '9.0a', '12.0+PTX']."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if asked:
        for item in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", item):
                raise CannotBuildError(
                    f"TORCH_CUDA_ARCH_LIST has {item!r}; expected entries like 8.0, 9.0a, 9.0+PTX"
                )
        return list(dict.fromkeys(asked))
    visible = visible_architectures()
    if visible:
        return visible
    text = run_text([str(toolkit.nvcc), "--list-gpu-arch"]) or ""
    known = [name for name in DEFAULT_ARCHITECTURES if f"compute_{name.replace('.', '')}\n" in text]
    if not known:
        raise CannotBuildError(f"nvcc {toolkit.version} knows none of {DEFAULT_ARCHITECTURES}")
    return [*known[:-1], known[-1] + "+PTX"]


def gencode(names: list[str]) -> list[str]:
    """nvcc flags for a list from :func:`architectures`."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def instruction_sets(kernel: str) -> list[str]:
    """What a file of csrc/cpu/kernels is compiled for; the library takes the best of its CPU."""
    if platform.machine() != "x86_64":
        return ["baseline"]
    # Only the kernels of signs count bits.
    counts = ["avx512vpopcntdq"] if kernel.startswith("binary") else []
    return [*counts, "avx512", "avx2", "baseline"]


def find_ninja() -> str:
    try:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.is_file():
            return str(path)
    except ImportError:
        pass
    path_on_path = shutil.which("ninja")
    if path_on_path is None:
        raise CannotBuildError("needs ninja to build its kernels (pip install ninja)")
    return path_on_path


def pybind11_include() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return pybind11.get_include()


# --- The decision: what is built, and why ---------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    torch: Torch
    compiler: list[str]
    compiler_version: str
    toolkit: Toolkit | None
    cuda_reason: str
    architectures: list[str]

    def line(self) -> str:
        cuda = (
            f"CUDA kernels with nvcc {self.toolkit.version} for {' '.join(self.architectures)}"
            if self.toolkit
            else f"no CUDA kernels ({self.cuda_reason})"
        )
        return f"CPU kernels with {self.compiler_version}; {cuda}; torch {self.torch.version}"


def decide_cuda(torch: Torch) -> tuple[Toolkit | None, str]:
    """The toolkit to build the CUDA kernels with, or None and the reason."""
    wish = os.environ.get("FASTBANDIT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CannotBuildError(f"FASTBANDIT_CUDA is {wish!r}; expected 0, 1 or nothing")
    if wish == "0":
        return None, "FASTBANDIT_CUDA=0"
    if wish == "" and torch.cuda is None:
        return None, "this torch has no CUDA; FASTBANDIT_CUDA=1 builds them all the same"
    toolkit = find_toolkit()
    reason = ""
    if toolkit is None:
        reason = "no CUDA toolkit: nvcc is in none of CUDA_HOME, /usr/local/cuda, PATH"
    elif (
        torch.cuda is not None and version_tuple(toolkit.version)[0] != version_tuple(torch.cuda)[0]
    ):
        reason = (
            f"torch was built for CUDA {torch.cuda}, nvcc in {toolkit.root} is {toolkit.version}"
        )
        toolkit = None
    if toolkit is None and wish == "1":
        raise CannotBuildError(f"FASTBANDIT_CUDA=1, but {reason}")
    return toolkit, reason


def make_plan(compiler: list[str], compiler_version: str, torch: Torch) -> Plan:
    toolkit, reason = decide_cuda(torch)
    return Plan(
        torch=torch,
        compiler=compiler,
        compiler_version=compiler_version,
        toolkit=toolkit,
        cuda_reason=reason,
        architectures=architectures(toolkit) if toolkit else [],
    )


# --- build.ninja ----------------------------------------------------------------------------------


# No fused multiply-add that the source does not write, on host and device alike: the random start
# and the projection are the same bits everywhere. Trapping math only keeps gcc from vectorising
# comparisons; no kernel reads the floating-point flags. The two warnings left out are about gcc
# 12's own AVX-512 header. ptxas says where a kernel spills registers, which costs it its speed.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "--expt-relaxed-constexpr"),
    *("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=--warn-on-spills"),
]


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


class NinjaFile:
    """The few lines of build.ninja that this project needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], **variables: str) -> Path:
        names = " ".join(ninja_escape(str(path)) for path in inputs)
        self.lines.append(f"build {ninja_escape(str(output))}: {rule} {names}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(self.folder / "build.ninja", "\n".join(self.lines) + "\n")


def write_if_changed(path: Path, text: str) -> None:
    """Leaves an unchanged file alone, so that ninja does not rebuild what depends on it."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_ninja(plan: Plan, folder: Path, targets: dict[str, Path]) -> list[Path]:
    """Writes build.ninja that makes every library in ``targets`` (extension name -> file).

    Returns the objects of the kernels, whose sources include nothing of torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels: list[Path] = []
    objects = folder / "objects"
    ninja = NinjaFile(folder)
    torch_lib = plan.torch.root / "lib"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    # -isystem: warnings are for our own lines.
    torch_flags = [
        f"-isystem{plan.torch.root / 'include'}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]
    compile_command = shell([*plan.compiler, "-MMD", "-MF"]) + " $out.d $flags -c $in -o $out"
    ninja.rule("cxx", compile_command, depfile=True)
    ninja.rule(
        "link",
        shell([*plan.compiler, "-shared", "-Wl,--no-as-needed"]) + " $in $flags -o $out",
        depfile=False,
    )

    def compile_cxx(source: Path, extra: list[str], variant: str = "") -> Path:
        output = objects / source.relative_to(ROOT / "csrc").with_suffix(f"{variant}.o")
        return ninja.build(output, "cxx", [source], flags=shell([*CXX_FLAGS, *includes, *extra]))

    if CPU in targets:
        # The kernels take the longest to compile, so they go first.
        built = [
            compile_cxx(path, [f"-DFB_ISA={name}", f"-DFB_ISA_{name.upper()}"], f".{name}")
            for path in sorted(ROOT.glob("csrc/cpu/kernels/*.cpp"))
            for name in instruction_sets(path.stem)
        ]
        kernels += built
        built += [compile_cxx(path, torch_flags) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
        flags = [f"-L{torch_lib}", "-ltorch_cpu", "-Wl,--no-undefined"]
        ninja.build(targets[CPU], "link", built, flags=shell(flags))

    if CUDA in targets:
        assert plan.toolkit is not None
        ninja.rule(
            "nvcc",
            shell([str(plan.toolkit.nvcc), "-ccbin", plan.compiler[0], "-MMD", "-MF"])
            + " $out.d $flags -c $in -o $out",
            depfile=True,
        )
        built = []
        for path in sorted(ROOT.glob("csrc/cuda/**/*.cu")):
            flags = [*NVCC_FLAGS, *gencode(plan.architectures), *includes]
            output = objects / path.relative_to(ROOT / "csrc").with_suffix(".cu.o")
            built.append(ninja.build(output, "nvcc", [path], flags=shell(flags)))
        kernels += built
        cuda_include = f"-isystem{plan.toolkit.root / 'include'}"
        for path in sorted(ROOT.glob("csrc/cuda/*.cpp")):
            built.append(compile_cxx(path, [*torch_flags, "-DUSE_CUDA", cuda_include]))
        # A CPU build of torch has no libtorch_cuda, where the symbol for the current stream lives.
        # An empty stand-in of that name records the dependency, so that a library built beside a
        # CPU torch also loads into a torch with CUDA.
        stub = folder / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(exist_ok=True)
        write_if_changed(folder / "stub" / "empty.cpp", "")
        empty = ninja.build(stub.with_name("empty.o"), "cxx", [stub.with_name("empty.cpp")])
        ninja.build(stub, "link", [empty], flags="-Wl,-soname,libtorch_cuda.so")
        flags = [f"-L{torch_lib}", "-ltorch_cpu"]
        # An installer's toolkit has lib64, one of conda or of pip's wheels lib.
        flags += [f"-L{plan.toolkit.root / name}" for name in ("lib64", "lib")]
        flags += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        ninja.build(targets[CUDA], "link", [*built, stub], flags=shell(flags))

    if INFO in targets:
        include = pybind11_include()
        assert include is not None
        write_if_changed(folder / "build_info.h", build_info_header(plan))
        python = [f"-isystem{include}", f"-isystem{sysconfig.get_path('include')}"]
        built = [compile_cxx(ROOT / "csrc" / "bindings.cpp", python)]
        ninja.build(targets[INFO], "link", built, flags="")

    ninja.write()
    return kernels


def build_info_header(plan: Plan) -> str:
    """The facts that bindings.cpp hands to Python, as JSON in a C++ string."""
    info = {
        "torch": plan.torch.version,
        "torch_target": "2.10",
        "compiler": plan.compiler_version,
        "cxx_flags": " ".join(CXX_FLAGS),
        "machine": platform.machine(),
        "cuda": plan.toolkit.version if plan.toolkit else None,
        "cuda_reason": plan.cuda_reason or None,
        "nvcc_flags": " ".join(NVCC_FLAGS) if plan.toolkit else None,
        "architectures": plan.architectures,
    }
    return f'#define FB_BUILD_INFO R"json({json.dumps(info)})json"\n'


# --- setuptools -----------------------------------------------------------------------------------


def run_ninja(folder: Path, outputs: list[Path], verbose: bool = False) -> None:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    command = [find_ninja(), "-C", str(folder), "-j", jobs, *(["-v"] if verbose else [])]
    if subprocess.run([*command, *map(str, outputs)]).returncode != 0:
        raise CannotBuildError("the kernels did not compile; the compiler's message is above")


class BuildKernels(build_ext):
    """``build_ext`` that hands the work to ninja."""

    def get_ext_filename(self, ext_name: str) -> str:
        # The kernels are loaded by torch and know nothing of Python: no suffix for its version.
        # (setuptools asks with and without the package in front.)
        if ext_name.rpartition(".")[2] in (CPU.rpartition(".")[2], CUDA.rpartition(".")[2]):
            return ext_name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(ext_name)

    def build_extensions(self) -> None:
        assert COMPILER is not None
        plan = make_plan(COMPILER, COMPILER_TEXT, find_torch())
        print(f"fastbandit: {plan.line()}", flush=True)
        if plan.toolkit is None:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
        if (
            pybind11_include() is None
            or not Path(sysconfig.get_path("include"), "Python.h").is_file()
        ):
            print(
                "fastbandit: no pybind11 or Python.h, so build_info() will lack the build's facts"
            )
            self.extensions = [ext for ext in self.extensions if ext.name != INFO]
        folder = Path(os.environ.get("FASTBANDIT_BUILD") or self.build_temp).resolve()
        targets = {}
        for ext in self.extensions:
            targets[ext.name] = Path(self.get_ext_fullpath(ext.name)).resolve()
            targets[ext.name].parent.mkdir(parents=True, exist_ok=True)
        write_ninja(plan, folder, targets)
        run_ninja(folder, list(targets.values()), self.verbose > 1)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # A library that an earlier build left behind and this one did not make would be loaded.
        made = {ext.name for ext in self.extensions}
        for name in {CPU, CUDA} - made:
            (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)


class CompileKernels(BuildKernels):
    """``python setup.py kernels``: the longest part of a build into FASTBANDIT_BUILD, before torch
    is there. A build with the same settings then goes on from it."""

    def run(self) -> None:
        if COMPILER is None or not os.environ.get("FASTBANDIT_BUILD"):
            raise CannotBuildError("kernels: needs a C++ compiler and FASTBANDIT_BUILD")
        folder = Path(os.environ["FASTBANDIT_BUILD"]).resolve()
        plan = make_plan(COMPILER, COMPILER_TEXT, Torch(folder / "torch", "", None, None))
        names = (CPU, CUDA) if plan.toolkit else (CPU,)
        run_ninja(folder, write_ninja(plan, folder, {name: folder / name for name in names}))


class BuildPython(build_py):
    """Says once why an install has no kernels."""

    def run(self) -> None:
        if COMPILER is None:
            print(f"fastbandit: pure-Python install, {COMPILER_TEXT}", flush=True)
        super().run()


class DistInfo(dist_info):
    """Asks for torch where pip asks for metadata, the first thing it does.

    Otherwise pip would fetch torch with all its gigabytes, and only then find that the kernels
    could not be built, since an isolated build cannot see what is not installed yet.
    """

    def run(self) -> None:
        if COMPILER is not None:
            find_torch()
        super().run()


COMPILER, COMPILER_TEXT = find_compiler()
# setuptools only needs the names: ninja knows the sources.
EXTENSIONS = [] if COMPILER is None else [Extension(name, sources=[]) for name in (CPU, CUDA, INFO)]

if __name__ == "__main__":
    setup(
        ext_modules=EXTENSIONS,
        cmdclass={
            "build_ext": BuildKernels,
            "build_py": BuildPython,
            "dist_info": DistInfo,
            "kernels": CompileKernels,
        },
    )
