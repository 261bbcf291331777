"""fastbandit.space: the tables, rows and choices, the widest choice."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbandit import space
from fastbandit.nn.supernet import Supernet


def test_spaces_are_those_of_table_4_1():
    assert list(space.SPACES) == [
        "general7", "robust8", "robust9", "robust10", "robust11",
        "general7-light", "robust8-light", "robust9-light", "robust10-light", "robust11-light",
        "binary8", "binary7", "binary8-dense",
    ]  # fmt: skip
    assert space.SPACES["robust11"] == (
        "max_pool_3x3", "avg_pool_3x3", "skip_connect", "conv_3x3", "conv_5x5", "sep_conv_3x3",
        "sep_conv_5x5", "gab_filt_3x3", "dtp_blok_3x3", "conv_1x1", "conv_7x7",
    )  # fmt: skip
    assert space.SPACES["robust11-light"] == (
        "max_pool_3x3", "avg_pool_3x3", "skip_connect", "dil_conv_3x3", "dil_conv_5x5",
        "sep_conv_m_3x3", "sep_conv_m_5x5", "gab_filt_3x3", "dtp_blok_3x3", "dil_conv_1x1",
        "dil_conv_7x7",
    )  # fmt: skip


TABLE = [name for name in space.SPACES if name not in space.BINARY_SPACES]


@pytest.mark.parametrize("name", TABLE)
def test_spaces_are_nested_and_named_by_their_size(name):
    operations = space.SPACES[name]
    largest = "robust11-light" if name.endswith("-light") else "robust11"
    assert operations == tuple(name for name in space.SPACES[largest] if name in operations)
    assert name.removesuffix("-light").lstrip("abcdefghijklmnopqrstuvwxyz") == str(len(operations))
    assert set(operations) <= set(space.OPERATION_NAMES)


def test_edges_rows_and_names():
    robust9 = space.get("robust9")
    assert robust9.edges == (
        (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4), (3, 4),
    )  # fmt: skip
    assert (robust9.rows, robust9.arms) == (60, 9)
    assert robust9.edge_name(0) == "a:0->1"
    assert robust9.edge_name(16) == "b:0->4"
    assert robust9.edge_name(59) == "f:3->4"
    assert robust9.row(5, 9) == 59
    assert len(set(robust9.edge_names)) == 60


def test_cells_of_two_inputs_are_those_of_darts():
    darts = space.SearchSpace("darts", ("skip_connect", "sep_conv_3x3"), cell_types=2, inputs=2)
    assert darts.edges == (
        (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4), (3, 4),
        (0, 5), (1, 5), (2, 5), (3, 5), (4, 5),
    )  # fmt: skip
    assert darts.rows == 28
    assert darts.edge_name(14) == "b:0->2"
    with pytest.raises(ValueError, match="inputs: expected 1 or 2, got 3"):
        space.SearchSpace("mine", ("skip_connect",), inputs=3)


def test_spaces_of_1_bit_networks():
    """CP-NAS: 8 operations on 14 edges of two types of cell."""
    binary8 = space.get("binary8")
    assert (binary8.arms, binary8.rows, binary8.inputs, binary8.cell_types) == (8, 28, 2, 2)
    assert (binary8.cells, binary8.binary) == (6, True)
    assert binary8.operations == (
        "zero", "skip_connect", "bin_dil_conv_3x3", "bin_dil_conv_5x5", "max_pool_3x3",
        "avg_pool_3x3", "bin_sep_conv_3x3", "bin_sep_conv_5x5",
    )  # fmt: skip
    assert space.SPACES["binary7"] == binary8.operations[1:]
    assert "zero" not in space.SPACES["binary7"]
    dense = space.get("binary8-dense", nodes=2)
    assert (dense.arms, dense.rows) == (8, 2 * 5)
    robust = space.get("robust9")
    assert (robust.cells, robust.binary, robust.inputs) == (6, False, 1)
    with pytest.raises(ValueError, match="one that is not zero"):
        space.SearchSpace("mine", ("zero",))


def test_sequence_of_cells():
    """With two inputs the second type is the reduction cell."""
    normal_and_reduction = space.cell_sequence(6, 2, inputs=2, reductions=(2, 4))
    assert normal_and_reduction == (0, 0, 1, 0, 1, 0)
    assert space.cell_sequence(6, 3, inputs=2, reductions=(2, 4)) == (0, 0, 1, 1, 2, 2)
    assert space.cell_sequence(10) == (0, 0, 1, 1, 2, 3, 3, 4, 5, 5)
    supernet = Supernet("binary8", in_channels=1, classes=2, channels=2, nodes=1)
    assert supernet.cell_type == normal_and_reduction
    assert len(supernet.cells) == 6


@given(nodes=st.integers(1, 6), cell_types=st.integers(1, 26))
def test_rows_of_any_shape(nodes, cell_types):
    one = space.SearchSpace("mine", ("skip_connect",), nodes, cell_types)
    assert one.rows == cell_types * nodes * (nodes + 1) // 2 == len(one.edge_names)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"expected one of general7, .*, got 'robust12'"):
        space.get("robust12")
    with pytest.raises(ValueError, match="got conv_9x9"):
        space.SearchSpace("mine", ("conv_9x9",))
    with pytest.raises(ValueError, match="got none"):
        space.SearchSpace("mine", ())
    with pytest.raises(ValueError, match="expected each once"):
        space.SearchSpace("mine", ("conv_3x3", "conv_3x3"))
    with pytest.raises(ValueError, match="nodes: expected >= 1, got 0"):
        space.get("robust9", nodes=0)
    with pytest.raises(ValueError, match="cell_types: expected 1 to 26, got 27"):
        space.get("robust9", cell_types=27)
    with pytest.raises(ValueError, match="row: expected 0 to 59, got 60"):
        space.get("robust9").edge_name(60)


def test_check_choice():
    one = space.get("robust8")
    assert one.check_choice(torch.full((60,), 7)) == [7] * 60
    with pytest.raises(ValueError, match=r"expected 60 arms .* got 59"):
        one.check_choice([0] * 59)
    with pytest.raises(ValueError, match=r"choice\[3\] \(a:0->3\): .* from 0 to 7, got 8"):
        one.check_choice([0, 0, 0, 8] + [0] * 56)
    with pytest.raises(ValueError, match=r"got -1"):
        one.check_choice([-1] * 60)
    with pytest.raises(ValueError, match=r"got 0\.0"):
        one.check_choice(torch.zeros(60))


@pytest.mark.parametrize(
    ("name", "memory", "compute"),
    [
        ("general7", "sep_conv_5x5", "sep_conv_5x5"),
        ("robust9", "sep_conv_5x5", "sep_conv_5x5"),
        ("robust11", "sep_conv_5x5", "conv_7x7"),
        ("robust9-light", "sep_conv_m_5x5", "sep_conv_m_5x5"),
        ("robust11-light", "sep_conv_m_5x5", "sep_conv_m_5x5"),
    ],
)
def test_widest(name, memory, compute):
    operations = space.SPACES[name]
    assert {operations[arm] for arm in space.widest(name)} == {memory}
    assert {operations[arm] for arm in space.widest(space.get(name), by="compute")} == {compute}
    assert len(space.widest(name)) == 60
    with pytest.raises(ValueError, match="'memory' or 'compute', got 'time'"):
        space.widest(name, by="time")


@pytest.mark.parametrize(
    ("cells", "expected"), [(1, (0,)), (2, (0, 1)), (3, (1, 2)), (6, (2, 4)), (10, (3, 6))]
)
def test_reduction_cells(cells, expected):
    assert space.reduction_cells(cells) == expected


def test_imports_nothing_heavy():
    code = (
        "import sys, fastbandit.space; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
