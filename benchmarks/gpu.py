"""What is to be tested and measured on a GPU, in two parts of at most five minutes each.

    python benchmarks/gpu.py --prepare               # on any machine with nvcc and a package index
    python benchmarks/gpu.py --part 1 --out DIR      # on the GPU: do the kernels and graphs work
    python benchmarks/gpu.py --part 2 --out DIR      # on the GPU: how fast are they
    python benchmarks/gpu.py --check                 # both parts, small, on a CPU

``--prepare`` fills ``.gpu``: the kernel libraries for TORCH_CUDA_ARCH_LIST (9.0 unless it is set)
and the wheels that a machine with torch alone lacks. Bring that folder along with the working
tree; a part takes both from there, and does without where the machine has its own.

A part is a row of stages. Each is a process of its own with a time limit, after which its whole
process group is killed; what it has found by then is kept, and the next stage runs. All outputs go
into one archive, ``part1.tar.gz``, which is written anew after every stage, and the table, printed
last, is ``part1.txt`` as well. The stages are in ``gpu_stages.py``; this file needs no package.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
PREPARED = ROOT / ".gpu"
WHEELS, KERNELS, FACTS = PREPARED / "wheels", PREPARED / "kernels", PREPARED / "prepared.json"
PART_SECONDS = 300
LINES = 60  # of a table at most
GRACE = 3.0  # seconds between asking a process group to end and killing it
CARRIED_MIB = 64  # what a GPU's machine may be sent in one go, the working tree included

# The Python of the machine with the GPU, and what its wheels may be built for.
PYTHON = "3.12"
PLATFORMS = ["2_28_x86_64", "2_27_x86_64", "2_17_x86_64", "2014_x86_64", "1_x86_64"]
# What the package and its tests import, less torch, numpy and what builds kernels.
PACKAGES = ["tyro", "pydantic", "PyYAML", "rich", "safetensors", "pytest", "pytest-xdist"]
PACKAGES += ["pytest-benchmark", "hypothesis"]


# --- Stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What a stage is run with. raw: the folder of its outputs."""

    raw: Path
    check: bool


@dataclass(frozen=True)
class Stage:
    """One process of a part.

    command: what to run, or in one line why not. seconds: its time limit, cut to what the part has
    left. lines: most lines of the table. may_be_cut: its time may run out without a failure.
    """

    name: str
    seconds: float
    command: Callable[[Context], list[str] | str]
    lines: int = 3
    may_be_cut: bool = False


@dataclass(frozen=True)
class Outcome:
    """status: ok, failed, cut (its time ran out) or skipped."""

    name: str
    status: str
    seconds: float
    reason: str = ""


def measured(name: str) -> Callable[[Context], list[str] | str]:
    """A stage of gpu_stages.py."""

    def command(context: Context) -> list[str] | str:
        small = ["--check"] if context.check else []
        program = str(BENCHMARKS / "gpu_stages.py")
        return [sys.executable, program, name, "--raw", str(context.raw), *small]

    return command


def suite_command(*arguments: str, workers: int = 0) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--color=no", "--maxfail=60"]
    if workers and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    return [*command, *arguments]


def marked_cuda(
    *arguments: str, small: str, workers: int = 0
) -> Callable[[Context], list[str] | str]:
    """Tests marked cuda; ``small``: the arguments of pytest in their place on a CPU."""

    def command(context: Context) -> list[str] | str:
        if context.check:
            return suite_command(*shlex.split(small))
        return suite_command("-m", "cuda", *arguments, workers=workers)

    return command


# The files whose tests run kernels of ours on a GPU.
KERNEL_TESTS = [
    f"tests/test_ops_{name}.py"
    for name in (
        "augment_images", "augment_start_normalize", "bandit", "batch_norm", "depthwise_conv2d",
        "gabor", "gabor_parameters", "norm_sum", "pgd_step", "random_start",
    )
]  # fmt: skip
# Odd sizes, views and layouts. A sanitizer makes them a hundred times as slow, so of each test
# function the first and the last case (see pytest_collection_modifyitems).
SANITIZED = "values or views or layout or strides or leading or by_hand or any_shape or batch_sizes"
SANITIZED += " or step_is_update or numbers_in_tensors"


def sanitizer(tool: str) -> Callable[[Context], list[str] | str]:
    def command(context: Context) -> list[str] | str:
        chosen = ["-m", "cuda", "-p", "gpu", "-k", SANITIZED]
        if context.check and tool != "memcheck":
            return "as memcheck"
        if context.check:
            return suite_command("--collect-only", "-q", *chosen, KERNEL_TESTS[-1])
        if shutil.which("compute-sanitizer") is None:
            return "compute-sanitizer is not on this machine"
        flags = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        flags += ["--kernel-regex", "kns=fastbandit"]  # our kernels alone
        if tool == "memcheck":
            # torch asks the driver for what it may not have; that is no error of a kernel.
            flags += ["--report-api-errors", "no"]
        return ["compute-sanitizer", *flags, *suite_command(*chosen, *KERNEL_TESTS)]

    return command


def ncu(context: Context) -> list[str] | str:
    """Nsight Compute on the three of our kernels that the profile found slowest."""
    if context.check:
        return "there are no kernels to look at on a CPU"
    if shutil.which("ncu") is None:
        return "ncu is not on this machine"
    kernels = (row.get("kernel", "") for row in read_rows(context.raw / "profile.jsonl"))
    names = list(dict.fromkeys(bare_name(name) for name in kernels if "fastbandit::" in name))
    if not names:
        return "the profile names no kernel of ours"
    # --kill: it would otherwise run on to the end of the step, a thousand kernels away.
    flags = ["--clock-control", "none", "--kill", "yes", "--launch-count", "12", "--csv"]
    flags += ["--kernel-name", f"regex:^({'|'.join(names[:3])})$"]
    flags += ["--section", "SpeedOfLight", "--section", "Occupancy"]
    flags += ["--section", "MemoryWorkloadAnalysis", "--log-file", str(context.raw / "ncu.csv")]
    return ["ncu", *flags, sys.executable, str(BENCHMARKS / "gpu_stages.py"), "eager_step",
            "--raw", str(context.raw)]  # fmt: skip


def bare_name(kernel: str) -> str:
    """A kernel's name without namespaces, types and arguments."""
    short = re.sub(r"\(anonymous namespace\)::|^void |<.*|\(.*", "", kernel)
    return short.split("::")[-1] or kernel[:40]


def install(context: Context) -> list[str] | str:
    if context.check:
        return "a check changes nothing here"
    return [sys.executable, str(BENCHMARKS / "gpu.py"), "--install", str(context.raw / "site")]


PARTS = {
    1: [
        Stage("install", 15, install, 4),
        Stage("info", 15, measured("info"), 7),
        Stage(
            "recorded",
            60,
            marked_cuda(
                "tests/test_ops_recorded.py", "tests/test_engine.py", "tests/test_search.py",
                small="tests/test_engine.py -k 'nan or together or precision_is'",
            ),
            8,
        ),
        Stage(
            "ops",
            90,
            marked_cuda(
                "tests/test_bandit.py", "tests/test_layers.py", "tests/test_operations.py",
                *(str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("tests/test_ops_*.py"))),
                workers=8, small="tests/test_ops_philox.py -k 'not cuda'",
            ),
            12,
        ),
        Stage("memcheck", 50, sanitizer("memcheck"), 6),
        Stage("racecheck", 40, sanitizer("racecheck"), 6),
        Stage("ceilings", 10, measured("ceilings"), 8),
        Stage("step", 20, measured("step"), 4),
    ],
    2: [
        Stage("install", 15, install, 2),
        Stage("steps", 80, measured("steps"), 12),
        Stage("profile", 20, measured("profile"), 8),
        Stage("capture", 15, measured("capture"), 4),
        Stage("depthwise", 60, measured("depthwise"), 19, may_be_cut=True),
        Stage("ops", 40, measured("ops"), 12),
        Stage("ncu", 25, ncu, 5),
        Stage("compiled", PART_SECONDS, measured("compiled"), 6, may_be_cut=True),
    ],
}  # fmt: skip


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the first and the last case of each test function: this file as a plugin of pytest."""
    cases: dict[str, list[Any]] = {}
    for item in items:
        # Other hooks take away by -m and -k only afterwards.
        if item.get_closest_marker("cuda") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for found in cases.values() for item in (found[0], found[-1])}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


# --- Running them ---------------------------------------------------------------------------------

ended_by: list[int] = []
"""Signals that ask this program to end: the stage that runs is ended, and no other begun."""


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End every process of the group; the first of them has not been waited for yet, so that the
    group's number is still its own."""
    for number, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        until = time.monotonic() + wait
        while time.monotonic() < until and not _has_ended(process):
            time.sleep(0.02)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_command(
    command: Sequence[str], log: Path, environment: dict[str, str], seconds: float
) -> tuple[int | None, float]:
    """Exit status (None: its time ran out) and seconds; output and errors go to ``log``.

    The command leads a process group of its own, of which nothing is left afterwards.
    """
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        in_time = False
        try:
            while not (in_time := _has_ended(process)):
                if ended_by or time.monotonic() - begun >= seconds:
                    break
                time.sleep(0.02)
        finally:
            _end_group(process, 0.0 if in_time else GRACE)
            status = process.wait()
    return status if in_time else None, time.monotonic() - begun


def run_stage(
    stage: Stage, context: Context, environment: dict[str, str], seconds: float
) -> Outcome:
    """Run it within ``seconds``."""
    if seconds <= 0:
        return Outcome(stage.name, "skipped", 0.0, "the part has no time left")
    try:
        command = stage.command(context)
        if isinstance(command, str):
            return Outcome(stage.name, "skipped", 0.0, command)
        log = context.raw / f"{stage.name}.log"
        status, took = run_command(command, log, environment, seconds)
    except OSError as error:
        return Outcome(stage.name, "failed", 0.0, str(error))
    if status is None:
        return Outcome(stage.name, "cut", took, f"stopped after {took:.1f} s")
    if status == 0 and not context.check:
        text = log.read_text(encoding="utf-8", errors="replace")
        if "test session starts" in text and not re.search(r"^=.*\b[1-9]\d* passed", text, re.M):
            return Outcome(stage.name, "failed", took, "no test ran")
    if status == 0:
        return Outcome(stage.name, "ok", took)
    return Outcome(stage.name, "failed", took, f"exit status {status}: {last_line(log)}")


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The results of a stage; a line that a killed process left half written is passed over."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def suite_lines(text: str) -> list[str]:
    """Counts, then the tests that failed, of a log of ``pytest -v``, whole or broken off."""
    outcomes = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b +\[|\] +(PASSED|FAILED|"
                          r"ERROR|SKIPPED|XFAIL|XPASS) ", text)  # fmt: skip
    counts: dict[str, int] = {}
    for first, second in outcomes:
        counts[first or second] = counts.get(first or second, 0) + 1
    summary = re.findall(r"^=+ (.*\bin [\d.]+s.*?) =+$", text, re.MULTILINE)
    broken = ", ".join(f"{count} {name.lower()}" for name, count in counts.items())
    head = [summary[-1] if summary else f"broken off: {broken or 'nothing'}"]
    # "ERROR SUMMARY: 0 errors" and the like of the sanitizers.
    head += [line.strip("= ") for line in re.findall(r"^=+ \w+ SUMMARY: .*$", text, re.MULTILINE)]
    named = re.findall(r"^(?:FAILED|ERROR) tests/.*$", text, re.MULTILINE)
    if not named:  # no summary: the lines of the tests themselves, with workers and without
        named = re.findall(r"^\[gw\d+\] \[.*?\] (FAILED \S+)", text, re.MULTILINE)
        named += re.sub(
            r"(\S+) FAILED", r"FAILED \1", "\n".join(re.findall(r"^\S+ FAILED", text, re.MULTILINE))
        ).splitlines()
    return head + list(dict.fromkeys(named))


def ncu_lines(file: Path) -> list[str]:
    """Time, shares of the peaks and occupancy, for each kernel's first launch."""
    wanted = {"Duration": "", "Compute (SM) Throughput": "", "Memory Throughput": "",
              "Achieved Occupancy": ""}  # fmt: skip
    import csv

    text = file.read_text(encoding="utf-8", errors="replace").split("\n")
    table = [line for line in text if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(table):
        name, metric = row.get("Kernel Name", ""), row.get("Metric Name", "")
        if metric in wanted:
            short = bare_name(name)
            cell = f"{row.get('Metric Value', '')} {row.get('Metric Unit', '')}"
            found.setdefault(short, {}).setdefault(metric, cell)
    return [
        f"{name}: " + ", ".join(f"{metric} {value}" for metric, value in metrics.items())
        for name, metrics in found.items()
    ]


def stage_lines(stage: Stage, context: Context) -> list[str]:
    """What the table says of a stage, at most ``stage.lines``."""
    lines = [row["line"] for row in read_rows(context.raw / f"{stage.name}.jsonl") if "line" in row]
    log, counters = context.raw / f"{stage.name}.log", context.raw / "ncu.csv"
    if not lines and log.is_file() and stage.name != "ncu":
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = suite_lines(text) if "test session starts" in text else []
    if stage.name == "ncu" and counters.is_file():
        lines = ncu_lines(counters)
    if len(lines) > stage.lines:
        rest = len(lines) - stage.lines + 1
        lines = [*lines[: stage.lines - 1], f"and {rest} more in the archive"]
    return lines


def table(head: str, stages: Sequence[Stage], outcomes: Sequence[Outcome], context: Context) -> str:
    """At most LINES lines of at most 118 characters."""
    lines = [head]
    for stage, outcome in zip(stages, outcomes, strict=False):
        why = f": {outcome.reason}" if outcome.reason else ""
        lines.append(f"{outcome.name:10} {outcome.status:8} {outcome.seconds:6.1f} s{why}")
        lines += [f"  {line}" for line in stage_lines(stage, context)]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"and {len(lines) - LINES + 1} more in the archive"]
    return "\n".join(line[:118] for line in lines) + "\n"


def write_archive(file: Path, raw: Path) -> None:
    """All outputs but the installed packages, replaced as a whole."""
    partial = file.with_name(file.name + ".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(raw.iterdir()):
            if path.name != "site":
                archive.add(path, f"{file.name.split('.')[0]}/{path.name}")
    os.replace(partial, file)


@contextmanager
def noting_signals() -> Iterator[None]:
    """SIGTERM and SIGINT are noted in ``ended_by`` in place of an exception, which could fall
    between the start of a process and the note of its number."""
    kinds = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(kind, lambda number, frame: ended_by.append(number)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def run_part(part: int, stages: Sequence[Stage], out: Path, check: bool) -> bool:
    """Whether every stage did what it should."""
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fastbandit-gpu-") as folder, noting_signals():
        context = Context(Path(folder), check)
        paths = [folder + "/site", str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment.setdefault("OMP_NUM_THREADS", "1" if check else "2")
        # A sanitizer sees an access beyond a tensor's end only if torch does not cache memory.
        sanitized = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if check:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "FASTBANDIT_BENCH_SMOKE": "1"}
        # The table and the archive take a moment, too.
        most = 3600 if check else PART_SECONDS
        end = begun + most - 2 * GRACE
        try:
            for stage in stages:
                if ended_by:
                    break
                left = min(3600 if check else stage.seconds, end - time.monotonic())
                chosen = sanitized if stage.name.endswith("check") and not check else environment
                outcomes.append(run_stage(stage, context, chosen, left))
                print(f"{stage.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.1f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
                write_archive(out / f"part{part}.tar.gz", context.raw)
        finally:
            head = f"part {part}, {time.monotonic() - begun:.0f} s"
            head += "; small, on a CPU: no number below is a measurement" if check else ""
            text = table(head, stages, outcomes, context)
            (context.raw / f"part{part}.txt").write_text(text, encoding="utf-8")
            write_archive(out / f"part{part}.tar.gz", context.raw)
            (out / f"part{part}.txt").write_text(text, encoding="utf-8")
            print(text, end="", flush=True)
    if ended_by:
        raise SystemExit(128 + ended_by[0])
    cut = {stage.name for stage in stages if stage.may_be_cut}
    return len(outcomes) == len(stages) and all(
        outcome.status in ("ok", "skipped") or (outcome.status == "cut" and outcome.name in cut)
        for outcome in outcomes
    )


# --- What is brought along ------------------------------------------------------------------------


def sources_hash() -> str:
    """Of what the kernels are made of."""
    found = hashlib.sha256()
    for file in sorted(ROOT.glob("csrc/**/*")):
        if file.is_file():
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def prepare() -> int:
    """Build the kernels and gather the wheels; what was prepared before is replaced."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")
    environment = {**os.environ, "FASTBANDIT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    facts = {"commit": commit.stdout.strip() or "unknown", "sources": sources_hash(),
             "architectures": architectures}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fastbandit-gpu-") as folder:
        built, gathered = Path(folder) / "built", Path(folder) / "wheels"
        # The objects of another build for the same machine are used again.
        build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(built)]
        download = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:"]
        download += ["--python-version", PYTHON, "--implementation", "cp", "-d", str(gathered)]
        for platform in PLATFORMS:
            separator = "_" if platform.startswith("2_") else ""
            download += ["--platform", f"manylinux{separator}{platform}"]
        # Needs included: they are resolved to versions that fit each other.
        for command in (build, [*download, *PACKAGES]):
            status = subprocess.run(command, cwd=ROOT, env=environment).returncode
            if status:
                print(f"gpu: failed with status {status}: {shlex.join(command)}", file=sys.stderr)
                return 1
        for old in (WHEELS, KERNELS):
            shutil.rmtree(old, ignore_errors=True)
        KERNELS.mkdir(parents=True)
        shutil.copytree(gathered, WHEELS)
        for name in ("_kernels_cpu.so", "_kernels_cuda.so"):
            shutil.copy(built / "fastbandit" / name, KERNELS / name)
    FACTS.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in PREPARED.rglob("*") if file.is_file()) / 2**20
    print(
        f"{PREPARED.name}: {len(list(WHEELS.iterdir()))} wheels for Python {PYTHON}, kernels for "
        f"{architectures}; {size:.1f} MiB of the {CARRIED_MIB} that may travel"
    )
    for part in PARTS:
        print(f"then, with {PREPARED.name} there: python3 benchmarks/gpu.py --part {part}")
    return 0


def version(text: str) -> list[int]:
    """Numbers of a version, to be compared."""
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])[:4]]


def missing_wheels(wheels: Path) -> list[Path]:
    """Those of which this Python has no version, or an older one."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, carried = wheel.name.split("-")[:2]
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = ""
        if version(there) < version(carried):
            found.append(wheel)
    return found


def install_here(site: Path) -> int:
    """Put what was brought along in its place: packages into ``site``, kernels into the package."""
    if not FACTS.is_file():
        print(f"nothing is prepared in {PREPARED.name}: what this machine has is used")
        return 0
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    if facts["sources"] != sources_hash():
        print(f"{PREPARED.name}: prepared from other sources (commit {facts['commit']}): run "
              "benchmarks/gpu.py --prepare again", file=sys.stderr)  # fmt: skip
        return 1
    for file in sorted(KERNELS.glob("*.so")):
        partial = ROOT / "fastbandit" / f".{file.name}.partial"
        shutil.copy(file, partial)
        os.replace(partial, ROOT / "fastbandit" / file.name)
    wheels = missing_wheels(WHEELS)
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--target", str(site), *map(str, wheels)]
        done = subprocess.run(command)
        if done.returncode:
            return done.returncode
    names = " ".join("-".join(wheel.name.split("-")[:2]) for wheel in wheels)
    print(f"kernels of commit {facts['commit']}; packages: {names or 'all there'}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", action="store_true", help="fill .gpu on this machine")
    what.add_argument("--part", type=int, choices=sorted(PARTS), help="run one part on the GPU")
    what.add_argument("--check", action="store_true", help="run both parts small on a CPU")
    what.add_argument("--install", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    default = os.environ.get("OUT") or str(ROOT / "runs" / "gpu")
    parser.add_argument("--out", type=Path, default=default, help="of archives, default $OUT")
    options = parser.parse_args(arguments)
    if options.prepare:
        return prepare()
    if options.install is not None:
        return install_here(options.install)
    parts = sorted(PARTS) if options.check else [options.part]
    done = [run_part(part, PARTS[part], options.out, options.check) for part in parts]
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
