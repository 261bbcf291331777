"""fastbandit.build_info() and ``python -m fastbandit.info``."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import _processes
import pytest
import torch

import fastbandit
from fastbandit import _native, info
from fastbandit.ops._register import OPERATORS


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _processes.run(*arguments, environment={**os.environ, **environment})


def test_build_info_names_every_op_and_its_backend():
    facts = fastbandit.build_info()
    assert facts["fastbandit"] == fastbandit.__version__
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) == set(OPERATORS)
    for device in _native.DEVICES:
        served = {backends[device] for backends in facts["ops"].values()}
        loaded = facts["libraries"][device]["loaded"]
        assert served <= ({"native", "reference"} if loaded else {"reference"})
    json.dumps(facts)  # plain values only


@pytest.mark.skipif(not _native.status()["cpu"]["loaded"], reason="no native CPU library")
def test_the_cpu_library_serves_the_elementwise_and_bandit_ops():
    facts = fastbandit.build_info()
    ops = ["pgd_step_", "pgd_step_normalize_", "random_start", "bandit_step_", "bandit_sample"]
    ops += ["bandit_bounds", "bandit_probabilities", "bandit_update_", "bandit_prune_"]
    ops += ["pack_sign", "unpack_sign", "binary_conv2d", "binary_conv2d_bits", "binary_sep_conv2d"]
    assert {name: facts["ops"][name]["cpu"] for name in ops} == dict.fromkeys(ops, "native")
    assert facts["cpu_isa"] in ("baseline", "avx2", "avx512", "avx512vpopcntdq")


def test_the_reason_for_a_library_that_is_not_loaded_is_printed():
    done = run("-m", "fastbandit.info", FASTBANDIT_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FASTBANDIT_BACKEND=reference") == 2
    assert "native" not in done.stdout.split("\n\n")[1]


def test_json_on_the_command_line():
    done = run("-m", "fastbandit.info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ops"]["pgd_step_"]["cpu"] in ("native", "reference")


@pytest.mark.skipif(not _native.status()["cpu"]["loaded"], reason="no native CPU library")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vpopcntdq"])
def test_a_lower_instruction_set_can_be_asked_for(isa):
    order = ["baseline", "avx2", "avx512", "avx512vpopcntdq"]
    best = info.build_info()["cpu_isa"]
    if "FASTBANDIT_CPU" in os.environ:
        pytest.skip("the environment already asks for one")
    done = run("-m", "fastbandit.info", "--json", FASTBANDIT_CPU=isa)
    assert json.loads(done.stdout)["cpu_isa"] == min(isa, best, key=order.index)


def test_importing_the_package_does_not_import_torch():
    code = "import fastbandit, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("package", ["fastbandit", "fastbandit.nn"])
def test_modules_are_reached_without_an_import_of_theirs(package):
    """Each in a process that has loaded no other, and all that are there."""
    found = importlib.import_module(package)
    known = [one.name for one in pkgutil.iter_modules(found.__path__)]
    inner = {"command", "command_training", "darts_text"}
    public = {name for name in known if not name.startswith("_")} - inner
    assert set(found._MODULES) == public
    assert public <= set(dir(found))
    code = (
        f"import fastbandit, sys; p = {package}\n"
        "for name in p._MODULES: assert getattr(p, name) is sys.modules[p.__name__ + '.' + name]\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_public_names_are_reached_without_an_import_of_their_module():
    code = "import fastbandit; fastbandit.nn.Network; fastbandit.attacks.pgd; fastbandit.load"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fastbandit.no_such_thing
