"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

# Torch's compiler would start processes that load torch too, for the few kernels that tests have.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# It would also compile a program for each instruction set, and load it in a process with torch, to
# see whether the compiler and the processor agree.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores: a thread for each, before torch is loaded and counts them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if torch.cuda.is_available():
    # Convolutions in float32, and the same bits each time: what the tests of our ops compare with.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

# Relative and absolute tolerance by dtype: about 16 units in the last place of the dtype, the
# room that a different order of summation over a few hundred terms takes.
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 1e-3),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the rest, which idle processes take over at the end, is quick.

    Whole files, since what the tests of a file share is made once in a process.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


OUR_VARIABLES = ("FASTBANDIT_", "OMP_", "CUBLAS_", "CUDA_")


def _settings() -> dict[str, object]:
    """What torch and the process have one of, and a test could leave behind."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "TF32": torch.backends.cudnn.allow_tf32,
        "folder": os.getcwd(),
        # Torch's compiler notes the folders of its caches there: only what changes results.
        "environment": {k: v for k, v in os.environ.items() if k.startswith(OUR_VARIABLES)},
    }


@pytest.fixture(autouse=True)
def any_order() -> Iterator[None]:
    """Tests give the same in any order: each has the same random numbers, and changes no setting
    of the process for good."""
    torch.manual_seed(0)
    random.seed(0)
    before = _settings()
    yield
    after = _settings()
    changed = [f"{k}: {before[k]} before, {after[k]} now" for k in before if after[k] != before[k]]
    assert not changed, f"the test leaves something behind: {'; '.join(changed)}"


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device the machine has; the same test body runs on all of them."""
    return torch.device(request.param)


@pytest.fixture
def tolerance():
    """``tolerance(dtype)`` gives the keyword arguments for ``torch.testing.assert_close``."""

    def lookup(dtype: torch.dtype) -> dict[str, float]:
        rtol, atol = TOLERANCES[dtype]
        return {"rtol": rtol, "atol": atol}

    return lookup
