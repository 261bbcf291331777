"""benchmarks/gpu.py: how it runs its stages and what it prepares. ``--check`` runs the stages."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    """A file of benchmarks/, under a name that no other file has."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.3)


def shell(script: str, name: str = "one", seconds: float = 20, **options):
    return gpu.Stage(name, seconds, lambda context: ["sh", "-c", script], **options)


def ends(pid: int) -> bool:
    """Whether the process ends by itself in a moment: a signal takes one."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# --- Stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_a_stage_whose_time_is_up_is_ended_with_all_its_processes(tmp_path, trap):
    script = f"{trap}(sleep 60 & echo $! > {tmp_path}/inner; wait) & echo here; wait"
    begun = time.monotonic()
    status, _ = gpu.run_command(["sh", "-c", script], tmp_path / "log", dict(os.environ), 0.7)
    assert status is None
    assert time.monotonic() - begun < 30
    assert (tmp_path / "log").read_text() == "here\n"
    assert ends(int((tmp_path / "inner").read_text()))


def test_a_stage_leaves_no_process_behind(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/inner; exit 3"
    status, _ = gpu.run_command(["sh", "-c", script], tmp_path / "log", dict(os.environ), 20)
    assert status == 3
    assert ends(int((tmp_path / "inner").read_text()))


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, capsys):
    stages = [
        shell("echo first", "first"),
        shell("echo it broke; exit 4", "second"),
        shell("echo half; sleep 60", "third", 0.5),
        gpu.Stage("fourth", 20, lambda context: "there is none"),
        gpu.Stage("fifth", 20, lambda context: ["/no/such/program"]),
        shell("echo last", "last"),
    ]
    assert not gpu.run_part(7, stages, tmp_path / "out", check=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("part 7, ")
    assert [line.split()[:2] for line in lines[1:]] == [
        ["first", "ok"], ["second", "failed"], ["third", "cut"], ["fourth", "skipped"],
        ["fifth", "failed"], ["last", "ok"],
    ]  # fmt: skip
    assert lines[2].endswith("exit status 4: it broke")
    assert lines[3].endswith("stopped after 0.5 s")
    assert lines[4].endswith("there is none")
    assert "/no/such/program" in lines[5]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"part7.tar.gz", "part7.txt"}
    with tarfile.open(tmp_path / "out" / "part7.tar.gz") as archive:
        assert archive.extractfile("part7/third.log").read() == b"half\n"
        assert archive.extractfile("part7/part7.txt").read().decode().splitlines() == lines


@pytest.mark.parametrize(("counts", "well"), [("1 passed, 2 skipped", True), ("2 skipped", False)])
def test_tests_that_are_all_skipped_have_not_passed(tmp_path, capsys, counts, well):
    log = f"=== test session starts ===\\n=== {counts} in 0.1s ==="
    assert gpu.run_part(1, [shell(f"printf '{log}\\n'")], tmp_path, check=False) is well
    assert ("no test ran" in capsys.readouterr().out) is not well


def test_only_a_stage_that_may_be_cut_may(tmp_path, capsys):
    for allowed in (True, False):
        stages = [shell("sleep 60", seconds=0.3, may_be_cut=allowed)]
        assert gpu.run_part(1, stages, tmp_path, check=False) is allowed


def test_a_part_has_an_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PART_SECONDS", 2 * gpu.GRACE + 1.5)
    stages = [shell("sleep 60", "long", 60), shell("echo no", "next", 60)]
    assert not gpu.run_part(1, stages, tmp_path, check=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["long", "cut"]
    assert lines[2].endswith("the part has no time left")


def test_a_part_that_is_ended_keeps_what_it_has(tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import gpu\n"
        "stages = [gpu.Stage(n, 60, lambda c, s=s: ['sh', '-c', s]) for n, s in\n"
        "          (('one', 'echo done'), ('two', 'echo $$ > $OUT/pid; sleep 60'))]\n"
        "gpu.run_part(1, stages, Path(sys.argv[2]), False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(BENCHMARKS), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "OUT": str(tmp_path)},
    )  # fmt: skip
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.decode().splitlines()[1].split()[:2] == ["one", "ok"]
    assert ends(int((tmp_path / "pid").read_text()))
    with tarfile.open(tmp_path / "part1.tar.gz") as archive:
        assert archive.extractfile("part1/one.log").read() == b"done\n"


def test_the_limits_of_a_part_fit_into_it():
    for stages in gpu.PARTS.values():
        fixed = [stage for stage in stages if stage.name != "compiled"]
        assert sum(stage.seconds for stage in fixed) <= gpu.PART_SECONDS
        assert len({stage.name for stage in stages}) == len(stages)


# --- The table ------------------------------------------------------------------------------------


def context(folder: Path):
    return gpu.Context(folder, check=True)


def test_a_line_that_was_not_written_whole_is_passed_over(tmp_path):
    rows = [{"device": "CPU"}, {"line": "a line", "samples": [1.0]}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"line": "hal'
    (tmp_path / "one.jsonl").write_text(text)
    assert gpu.stage_lines(shell("true"), context(tmp_path)) == ["a line"]


def test_a_table_has_at_most_sixty_lines(tmp_path):
    stages = [shell("true", f"s{number}", lines=12) for number in range(9)]
    for stage in stages:
        rows = (json.dumps({"line": f"{number} " + "x" * 200}) + "\n" for number in range(30))
        (tmp_path / f"{stage.name}.jsonl").write_text("".join(rows))
    outcomes = [gpu.Outcome(stage.name, "ok", 1.0) for stage in stages]
    lines = gpu.table("head", stages, outcomes, context(tmp_path)).splitlines()
    assert len(lines) == 60
    assert max(map(len, lines)) == 118
    assert lines[13].strip() == "and 19 more in the archive"
    assert lines[-1] == "and 59 more in the archive"


WHOLE = """\
============================= test session starts ==============================
tests/test_a.py::test_one[cuda-1] PASSED [ 50%]
tests/test_a.py::test_two[cuda] FAILED [100%]
=========================== short test summary info ============================
FAILED tests/test_a.py::test_two[cuda] - assert 1 == 2
========= 1 failed, 1 passed, 3 deselected in 0.02s =========
========= ERROR SUMMARY: 2 errors
"""
BROKEN = """\
============================= test session starts ==============================
[gw0] [ 33%] PASSED tests/test_a.py::test_one[cuda-1]
[gw1] [ 66%] FAILED tests/test_a.py::test_two[cuda]
[gw1] [100%] PASSED tests/test_a.py::test_thr"""


def test_what_is_said_of_tests():
    assert gpu.suite_lines(WHOLE) == [
        "1 failed, 1 passed, 3 deselected in 0.02s", "ERROR SUMMARY: 2 errors",
        "FAILED tests/test_a.py::test_two[cuda] - assert 1 == 2",
    ]  # fmt: skip
    assert gpu.suite_lines(BROKEN) == [
        "broken off: 2 passed, 1 failed", "FAILED tests/test_a.py::test_two[cuda]",
    ]  # fmt: skip
    one_after_another = BROKEN.splitlines()[0] + "\ntests/test_a.py::test_one PASSED [ 50%]\n"
    assert gpu.suite_lines(one_after_another + "tests/test_a.py::test_two ") == [
        "broken off: 1 passed"
    ]


KERNEL = "void fastbandit::(anonymous namespace)::strided_kernel<float, (int)3>(Plan<float>)"


def test_the_slowest_kernels_of_ours_are_looked_at(tmp_path, monkeypatch):
    names = ["void at::native::copy<4>(int)", KERNEL, KERNEL.replace("3", "5"),
             "fastbandit::pgd_step_flat(int)", "fastbandit::a<1>()", "fastbandit::b()"]  # fmt: skip
    rows = (json.dumps({"line": "", "kernel": name}) + "\n" for name in names)
    (tmp_path / "profile.jsonl").write_text("".join(rows))
    real = gpu.Context(tmp_path, check=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.ncu(real) == "ncu is not on this machine"
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    assert "regex:^(strided_kernel|pgd_step_flat|a)$" in gpu.ncu(real)
    (tmp_path / "profile.jsonl").unlink()
    assert gpu.ncu(real) == "the profile names no kernel of ours"


def test_what_is_said_of_a_kernel(tmp_path):
    row = '"0","{}","{}","{}","{}"\n'.format
    kernel = KERNEL.replace('"', "")
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += row(kernel, "Duration", "us", "19.5") + row(kernel, "Registers", "", "60")
    text += row(kernel, "Memory Throughput", "%", "31") + row(kernel, "Duration", "us", "20")
    (tmp_path / "ncu.csv").write_text(text)
    stage = gpu.Stage("ncu", 1, gpu.ncu)
    assert gpu.stage_lines(stage, context(tmp_path)) == [
        "strided_kernel: Duration 19.5 us, Memory Throughput 31 %"
    ]


def test_a_sanitizer_gets_the_first_and_the_last_case_of_each_test():
    def item(nodeid, cuda=True):
        return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: cuda or None)

    items = [item(f"f.py::test_a[{case}]") for case in range(4)]
    items += [item("f.py::test_a[cpu]", cuda=False), item("f.py::test_b")]
    dropped = []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    gpu.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert [item.nodeid for item in items] == ["f.py::test_a[0]", "f.py::test_a[3]", "f.py::test_b"]
    assert len(dropped) == 3


# --- What is brought along ------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working tree of one source."""
    for name, folder in {
        "ROOT": "", "PREPARED": ".gpu", "WHEELS": ".gpu/wheels", "KERNELS": ".gpu/kernels",
        "FACTS": ".gpu/prepared.json",
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, tmp_path / folder)
    for folder in ("csrc", "fastbandit"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    return tmp_path


def test_what_is_prepared_is_put_in_place(elsewhere, monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(command)
        folder = Path(dict(itertools.pairwise(command)).get("--build-lib", ""))
        if "--build-lib" in command:
            assert options["env"]["FASTBANDIT_CUDA"] == "1"
            assert options["env"]["TORCH_CUDA_ARCH_LIST"] == "9.0"
            (folder / "fastbandit").mkdir(parents=True)
            for name in ("_kernels_cpu.so", "_kernels_cuda.so", "_native_info.so"):
                (folder / "fastbandit" / name).write_text(name)
        elif "download" in command:
            folder = Path(command[command.index("-d") + 1])
            folder.mkdir()
            for name in ("torch-0.1", "tyro-99.0", "no_such_package-1.0"):
                (folder / f"{name}-py3-none-any.whl").write_text("")
        return SimpleNamespace(returncode=0, stdout="abc\n")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert gpu.prepare() == 0
    assert gpu.install_here(elsewhere / "site") == 0
    installed = sorted(file.name for file in (elsewhere / "fastbandit").iterdir())
    assert installed == ["_kernels_cpu.so", "_kernels_cuda.so"]
    # Torch is there in a later version.
    assert "--no-index" in commands[-1]
    wheels = [Path(word).name for word in commands[-1] if word.endswith(".whl")]
    assert wheels == ["no_such_package-1.0-py3-none-any.whl", "tyro-99.0-py3-none-any.whl"]
    assert "kernels of commit abc; packages: no_such_package-1.0 tyro-99.0" in (
        capsys.readouterr().out
    )
    (elsewhere / "csrc" / "a.cu").write_text("another kernel")
    assert gpu.install_here(elsewhere / "site") == 1
    assert "prepared from other sources" in capsys.readouterr().err


def test_a_failure_to_prepare_keeps_what_there_was(elsewhere, monkeypatch, capsys):
    gpu.KERNELS.mkdir(parents=True)
    failing = lambda *a, **o: SimpleNamespace(returncode=5, stdout="")  # noqa: E731
    monkeypatch.setattr(gpu.subprocess, "run", failing)
    assert gpu.prepare() == 1
    assert "failed with status 5" in capsys.readouterr().err
    assert gpu.KERNELS.is_dir()


def test_without_a_preparation_the_machine_has_its_own(elsewhere, capsys):
    assert gpu.install_here(elsewhere / "site") == 0
    assert "nothing is prepared" in capsys.readouterr().out
    assert not list((elsewhere / "fastbandit").iterdir())


def test_the_program_needs_no_package():
    # -S: without the folder of installed packages.
    command = [sys.executable, "-I", "-S", str(BENCHMARKS / "gpu.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--prepare" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--part", "3"], ["--part", "1", "--check"]])
def test_what_is_wrong_is_said(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "usage:" in capsys.readouterr().err


# --- Float32 --------------------------------------------------------------------------------------


def test_benchmarks_compute_in_float32_where_they_say_so():
    """cuDNN would take TF32, which has 10 bits."""
    kinds = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = True
        load("conftest")
        assert [kind.allow_tf32 for kind in kinds] == [False, False]
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.allow_tf32 = value


# --- Counts ---------------------------------------------------------------------------------------

REPORT = """\
ptxas info    : Compiling entry function '{one}' for 'sm_90'
ptxas info    : Function properties for {one}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 133 registers, used 1 barriers
ptxas info    : Compiling entry function '{two}' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 46 registers
"""
CODE = """\
.text.{one}:
.L_x_1:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 FFMA R2, R3, R4, R5 ;
        /*0020*/             @UP1  UIADD3 UR4, UR4, 0x1, URZ ;
        /*0030*/                   FFMA R2, R3, R4, R5 ;
        /*0040*/                   NOP;
.text.{two}:
        /*0000*/                   EXIT ;
"""


def test_counts_of_machine_code():
    counts = load("sass_counts")
    file = "_ZN10fastbandit9depthwise41_GLOBAL__N__68126411_9_staged_cu_2d8eb594"
    names = {
        "one": f"{file}20staged_weight_kernelILi3ENS_8bfloat16ES3_Lb0EEEvNS0_10StagedArgsE",
        "two": "_ZN10fastbandit48_GLOBAL__N__5d68465e_15_gabor_kernel_cu_e310e7fd"
        "28gabor_backward_input_kernelIdEEvNS0_12BackwardArgsEi",
    }
    two, one = counts.kernels_of(REPORT.format(**names), CODE.format(**names))
    assert one.name == "staged_weight_kernel<3, bfloat16, bfloat16, 0>"
    assert (one.registers, one.spilled, one.outputs) == (133, 16, 64)
    assert one.instructions == {"LDC": 1, "FFMA": 2, "UIADD3": 1}
    assert two.name == "gabor_backward_input_kernel<float64>"
    assert (two.registers, two.spilled, two.outputs) == (46, 0, None)


def test_counts_of_operations():
    counted = load("count_step").Counted()
    x = torch.ones(2, 3, 4, 4)
    with counted:
        torch.empty(5)  # neither this nor a view does anything
        y = x.transpose(0, 1) + 1.0
        torch.nn.functional.batch_norm(y, None, None, training=True)
        y.mul_(2.0)
    assert counted.calls == {"add": 1, "native_batch_norm": 1, "mul": 1}
    assert counted.nodes == {"add": 1, "native_batch_norm": 4, "mul": 1}
    size = x.numel() * 4
    assert counted.bytes["add"] == 2 * size
    # In place of 3: reading, writing, and reading once more for the statistics.
    assert 3 * size <= counted.bytes["native_batch_norm"] <= 3 * size + 64
    assert counted.bytes["mul"] == size


def test_counts_of_a_step_are_those_of_a_gpu():
    """Neither an op that only CPUs have a kernel of nor a small map's way."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "count_step.py"), "--paths", "0", "--all"],
        env={**os.environ, "FASTBANDIT_BENCH_SMOKE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    head, *rows = done.stdout.splitlines()
    names = {row.split()[-1] for row in rows}
    assert "FGSM step of robust9-light, float32: " in head
    assert {"avg_pool2d", "max_pool2d_with_indices", "depthwise_conv2d", "_fused_sgd"} <= names
    assert not names & {"conv_block", "batch_norm", "max_pool2d", "arange", "_foreach_add"}
