"""Tests of the native CPU kernels again, with the instruction sets that this CPU would not choose.

Which set is used is decided once for a process, when the package loads its library: one for each
set, forked before that, runs the tests of all files.
"""

import os
from pathlib import Path

import pytest
from _processes import Process

from fastbandit import _native, info

# File, and what is chosen of it: the tests of values.
CHOSEN = {
    "test_native_depthwise": "(unrolled or large or nan) and (contiguous or channels_last or nan)",
    "test_native_gabor": "(gradients or large) and (contiguous or channels_last)",
    "test_ops_binary": "exact or hand or past or replaces or wide",
    # Not what torch does with an op, which is the same for every set.
    "test_ops_bandit": "(values or hand or scalar or step or choices or count or nan)"
    " and not opcheck and not compile",
    "test_ops_conv_block": "values or bits or number",
    "test_ops_max_pool2d": "bits or finite",
}


@pytest.mark.slow
# Those below the best one, which the tests run with anyway.
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(instruction_set):
    if os.environ.get("FASTBANDIT_CPU"):
        pytest.skip("the environment asks for one")
    if not _native.status()["cpu"]["loaded"]:
        pytest.skip("the native CPU library is not loaded")
    order = ["baseline", "avx2", "avx512", "avx512vpopcntdq"]
    best = info.build_info()["cpu_isa"]
    if order.index(instruction_set) >= order.index(best):
        pytest.skip(f"this CPU has {best}, which all tests run with")
    chosen = " or ".join(f"({file} and ({keywords}))" for file, keywords in CHOSEN.items())
    process = Process(
        "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        *(f"{file}.py" for file in CHOSEN), "-k", chosen,
        environment={**os.environ, "FASTBANDIT_CPU": instruction_set},
        folder=Path(__file__).parent,
    )  # fmt: skip
    done = process.wait(timeout=1800)  # hundreds of tests
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert [file for file in CHOSEN if f"{file}.py::" not in done.stdout] == []
