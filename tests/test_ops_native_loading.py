"""Loading of the native libraries, and the precedence of their kernels over the references."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastbandit import _native, ops
from fastbandit.ops import _register

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.one_backend


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def load_from(tmp_path, monkeypatch):
    """``load_from(backend)`` runs a first load from an empty directory, ``tmp_path``."""

    def load(backend: str = "auto") -> dict:
        monkeypatch.setattr(_native, "_status", None)
        monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
        monkeypatch.setenv("FASTBANDIT_BACKEND", backend)
        return _native.status()

    before = set(_native.served)
    yield load
    # A stand-in library serves no op; the ops of the tests after this one must not think so.
    _native.served.clear()
    _native.served.update(before)


def test_importing_ops_loads_torch_and_nothing_else():
    code = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        "import fastbandit.ops\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new - set(sys.stdlib_module_names))))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) <= {"fastbandit", "torch"}


def test_missing_library_is_quiet_and_says_why(load_from, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = load_from()
    assert status["backend"] == "auto"
    for device in ("cpu", "cuda"):
        assert status[device]["loaded"] is False
        assert status[device]["path"] is None
        assert f"no _kernels_{device}*.so in {tmp_path}" in status[device]["reason"]


def test_damaged_library_warns_once_with_the_original_error(load_from, tmp_path):
    path = tmp_path / "_kernels_cpu.so"
    path.write_text("not a library")
    with pytest.warns(
        RuntimeWarning, match=r"_kernels_cpu.so is present but does not load"
    ) as all_:
        status = load_from()
    assert len(all_) == 1
    assert status["cpu"]["loaded"] is False
    assert status["cpu"]["path"] == str(path)
    # What the dynamic loader said, not only that torch could not load it.
    assert f"OSError: {path}: " in status["cpu"]["reason"]
    assert status["cpu"]["reason"] in str(all_[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _native.load()
        assert _native.status() == status


def test_library_that_loads(load_from, tmp_path):
    # Any shared library will do; torch's own extension module is there on every platform.
    shutil.copy(torch._C.__file__, tmp_path / "_kernels_cpu.abi3.so")
    status = load_from()
    assert status["cpu"] == {
        "loaded": True,
        "path": str(tmp_path / "_kernels_cpu.abi3.so"),
        "reason": None,
    }


def test_newest_of_two_libraries_is_taken(load_from, tmp_path):
    old, new = tmp_path / "_kernels_cpu.abi3.so", tmp_path / "_kernels_cpu.so"
    old.write_text("not a library")
    shutil.copyfile(torch._C.__file__, new)
    os.utime(old, (1, 1))
    assert load_from()["cpu"]["path"] == str(new)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_cuda_library_is_not_loaded_beside_a_cpu_torch(load_from, tmp_path):
    (tmp_path / "_kernels_cuda.so").write_text("never read")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = load_from()
    assert status["cuda"]["loaded"] is False
    assert "built without CUDA" in status["cuda"]["reason"]


def test_reference_backend_loads_nothing(load_from, tmp_path):
    (tmp_path / "_kernels_cpu.so").write_text("never read")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = load_from("reference")
    assert status["backend"] == "reference"
    assert status["cpu"]["loaded"] is False
    assert status["cpu"]["reason"] == "FASTBANDIT_BACKEND=reference"


def test_unknown_backend_is_an_error_at_import():
    result = run_python("import fastbandit.ops", FASTBANDIT_BACKEND="cudnn")
    assert result.returncode != 0
    assert (
        "ValueError: FASTBANDIT_BACKEND: expected one of auto, reference, got 'cudnn'"
        in result.stderr
    )


def test_status_is_a_copy():
    _native.status()["cpu"]["loaded"] = "changed"
    assert _native.status()["cpu"]["loaded"] in (True, False)


def test_every_op_has_a_reference_a_fake_kernel_and_a_say_in_autograd():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert len(_register.OPERATORS) == 36
    for name, op in _register.OPERATORS.items():
        assert op is getattr(torch.ops.fastbandit, name).default
        for key in ("CompositeExplicitAutograd", "Meta", "Autograd"):
            assert has_kernel(op.name(), key), (name, key)
        mutated = [
            argument.name
            for argument in op._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        assert bool(mutated) == name.endswith("_")


def test_a_kernel_of_a_device_takes_precedence_and_autograd_stays():
    x = torch.zeros(1, 2, 4, 4)
    weight = torch.zeros(2, 1, 3, 3, requires_grad=True)
    library = torch.library.Library("fastbandit", "IMPL")
    try:
        with warnings.catch_warnings():
            # A native kernel for the same key, where one is loaded, is overridden for this test.
            warnings.simplefilter("ignore")
            library.impl("depthwise_conv2d", lambda x, *_: x.new_full((1, 2, 2, 2), 7.0), "CPU")
        y = ops.depthwise_conv2d(x, weight)
        assert bool((y == 7).all())
        y.sum().backward()
        assert weight.grad is not None
    finally:
        library._destroy()
    assert bool((ops.depthwise_conv2d(x, weight) == 0).all())


def test_writing_ops_tell_autograd_that_a_saved_tensor_changed():
    delta = torch.zeros(3)
    scale = torch.ones(3, requires_grad=True)
    loss = (scale * delta).sum()
    version = delta._version
    library = torch.library.Library("fastbandit", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Like a native kernel, this one writes behind autograd's back.
            library.impl("pgd_step_", lambda *_: None, "CPU")
        ops.pgd_step_(delta, delta.clone(), delta.clone(), step_size=1.0, epsilon=1.0)
    finally:
        library._destroy()
    assert delta._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
