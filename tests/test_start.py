"""How threads wait: chosen by commands alone, before torch is loaded, never against the user."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

import fastbandit
from fastbandit import _start


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of our making: ``machine(cpus=4, load=0.5, running=1, ...)``; torch not loaded."""
    for name in (*_start._VARIABLES, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # What the command sets goes away with the test.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(_start, "_waiting", None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(_start, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(_start, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)

    def make(cpus=2, mine=None, load=0.0, running=1, groups="", files=(), **environment):
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        own = set(range(mine or cpus))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: own, raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        (tmp_path / "proc" / "loadavg").write_text(f"{load} 0.00 0.00 {running}/99 1234\n")
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
        for name, text in files:
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        os.environ.update(environment)
        _start.begin()
        return _start.waiting()

    return make


IDLE = [
    {},
    {"load": 0.4, "running": 2},
    {"load": 2.0, "running": 1},  # what was busy has just ended
    {"load": 0.1, "running": 4},  # only for a moment
    {"cpus": 64, "load": 10.0, "running": 11},  # less than a quarter
    {"cpus": 64, "mine": 8, "load": 50.0, "running": 51},  # there is room for eight
    {"load": 1.0, "running": 2, "OMP_NUM_THREADS": "1"},
    {"groups": "0::/\n", "files": [("cpu.max", "max 100000\n")]},
    {"groups": "0::/a/b\n", "files": [("a/cpu.max", "200000 100000\n")]},
    {"groups": "3:cpu,cpuacct:/a\n", "files": [("cpu/a/cpu.cfs_quota_us", "-1\n"),
                                               ("cpu/a/cpu.cfs_period_us", "100000\n")]},
]  # fmt: skip
CROWDED = [
    ({"load": 1.0, "running": 2}, "other programs have a load of 1 on 2 CPUs; 2 threads here"),
    ({"load": 3.2, "running": 3}, "a load of 2 on 2 CPUs"),
    ({"cpus": 64, "load": 40.0, "running": 41}, "a load of 40 on 64 CPUs; 64 threads here"),
    ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}, "4 threads share 2 CPUs"),
    ({"groups": "0::/a/b\n", "files": [("a/cpu.max", "150000 100000\n")]},
     "a control group allows 1.5 CPUs to 2 threads"),
    ({"groups": "0::/elsewhere\n", "files": [("cpu.max", "50000 100000\n")]}, "allows 0.5 CPUs"),
    ({"groups": "4:memory:/a\n3:cpu,cpuacct:/a\n",
      "files": [("cpu/a/cpu.cfs_quota_us", "100000\n"), ("cpu/a/cpu.cfs_period_us", "100000\n")]},
     "allows 1 CPUs"),
]  # fmt: skip


@pytest.mark.parametrize("facts", IDLE)
def test_threads_wait_as_the_runtime_does_where_nobody_is_in_the_way(machine, facts):
    found = machine(**facts)
    assert found.policy == "default", found.reason
    assert found.variables == {}


@pytest.mark.parametrize(("facts", "reason"), CROWDED)
def test_threads_sleep_where_others_need_the_cpu(machine, facts, reason):
    found = machine(**facts)
    assert found.policy == "passive"
    assert reason in found.reason
    assert found.variables == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("name", _start._VARIABLES)
@pytest.mark.parametrize("load", [0.0, 8.0])
def test_what_the_user_sets_stays(machine, name, load):
    found = machine(load=load, running=9, **{name: "7"})
    assert found.policy == "as set"
    assert found.reason == f"{name}=7 in the environment"
    assert found.variables == {name: "7"}


def test_nothing_is_set_once_torch_is_loaded(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    found = machine(load=8.0, running=9)
    assert (found.policy, found.variables) == ("default", {})
    assert "torch was loaded before" in found.reason


def test_a_machine_that_says_nothing_counts_as_idle(machine, monkeypatch, tmp_path):
    def unknown():
        raise OSError

    machine()
    monkeypatch.setattr(os, "getloadavg", unknown)
    monkeypatch.setattr(_start, "_PROC", tmp_path / "none")
    assert _start._crowded() == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (5.0, 0.0, 0.0))
    assert "a load of 5" in _start._crowded()


def run(*arguments: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in _start._VARIABLES}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**kept, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_chooses_and_info_says_so():
    said = json.loads(run("-m", "fastbandit.info", "--json"))["waiting"]
    assert said["policy"] in ("passive", "default")
    assert said["reason"]
    assert said["variables"] in (_start._PASSIVE, {})
    text = run("-m", "fastbandit.info", OMP_WAIT_POLICY="active")
    assert "threads wait: as set (OMP_WAIT_POLICY=active in the environment)" in text


@pytest.mark.parametrize("name", ["search", "retrain", "evaluate", "report", "study", "export"])
def test_every_command_chooses_before_it_imports_anything(name):
    """Run as a command up to the choice, which ends the process here."""
    code = (
        "import runpy, sys\n"
        "from fastbandit import _start\n"
        "def begin():\n"
        "    assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)\n"
        "    sys.exit(0)\n"
        "_start.begin = begin\n"
        f"runpy.run_module('fastbandit.{name}', run_name='__main__')\n"
        "sys.exit('it did not choose')\n"
    )
    run("-c", code)


def test_a_program_that_imports_the_package_is_left_alone():
    code = (
        "import os\n"
        "before = dict(os.environ)\n"
        "import fastbandit.ops, fastbandit.search, fastbandit.report\n"
        "assert dict(os.environ) == before\n"
        "found = fastbandit.build_info()['waiting']\n"
        "assert (found['policy'], found['variables']) == ('default', {}), found\n"
    )
    run("-c", code)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("arguments", [[], ["--seed", "1"], ["--help"], ["--json"]])
def test_a_terminal_shows_life_before_torch_is_loaded(machine, monkeypatch, arguments):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "argv", ["search", *arguments])
        machine()
        quiet = not stream.isatty() or {"--help", "--json"} & set(arguments)
        said = f"fastbandit {fastbandit.__version__}: loading torch\n"
        assert stream.getvalue() == ("" if quiet else said)
