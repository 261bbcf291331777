"""fastbandit.genotype: round trips, hash, damaged files, the DARTS text, drawings."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbandit import space
from fastbandit.genotype import Edge, Genotype, GenotypeError, Macro, Search
from fastbandit.operations import OperationOptions

ABANDIT = ("ABANDIT_CIFAR_1", "ABANDIT_CIFAR_2", "ABANDIT_MNIST_NORMAL_1")
PUBLISHED = (*ABANDIT, "BNAS_A_KIM", "BNAS_XNOR_1")

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip


@st.composite
def cells(draw, operations):
    count = draw(st.integers(1, 6))
    nodes = []
    for node in range(1, count + 1):
        sources = draw(st.lists(st.integers(0, node - 1), min_size=1, unique=True))
        nodes.append([{"op": draw(st.sampled_from(operations)), "source": s} for s in sources])
    concat = draw(st.lists(st.integers(1, count), min_size=1, unique=True))
    return {"nodes": nodes, "concat": concat}


@st.composite
def genotypes(draw):
    name = draw(st.sampled_from(list(space.SPACES)))
    operations = space.SPACES[name]
    drawn = draw(st.lists(cells(operations), min_size=1, max_size=4))
    layers = draw(st.integers(1, 30))
    return Genotype(
        name=draw(st.none() | st.text()),
        space=name,
        operations=operations,
        options={
            "denoise": draw(st.sampled_from(["dot", "gaussian", "mean", "median"])),
            "denoise_1x1": draw(st.booleans()),
            "gabor": draw(st.sampled_from(["pixels", "released"])),
        },
        cells=[cell | {"name": "abcd"[index]} for index, cell in enumerate(drawn)],
        macro=draw(
            st.none()
            | st.just({"layers": layers, "channels": 8})
            | st.fixed_dictionaries({"bn_eps": st.floats(1e-12, 0.5)})
        ),
        search=draw(
            st.none()
            | st.fixed_dictionaries(
                {
                    "run_id": st.text(),
                    "seed": st.integers(),
                    "budget": st.dictionaries(st.text(), plain_values),
                    "policy": plain_values,
                }
            )
        ),
    )


def outcome(read, *args) -> tuple[Genotype | None, str]:
    """What ``read`` gives, or the message of its GenotypeError; any other error passes."""
    try:
        return read(*args), ""
    except GenotypeError as error:
        return None, str(error)


def a_dict() -> dict:
    return Genotype.published("ABANDIT_CIFAR_1").to_dict()


# -- Published ------------------------------------------------------------------------------------


def test_published_genotypes():
    assert Genotype.names() == PUBLISHED
    first = Genotype.published("ABANDIT_CIFAR_1")
    assert [[(e.op, e.source) for e in node] for node in first.cells[1].nodes] == [
        [("avg_pool_3x3", 0)],
        [("gab_filt_3x3", 0)],
        [("sep_conv_5x5", 2)],
        [("conv_3x3", 1)],
    ]
    assert first.macro == Macro(
        layers=10, channels=48, reductions=(3, 6), denoise_blocks=True, bn_eps=1e-3
    )
    for name in PUBLISHED:
        assert Genotype.published(name).name == name
    for name in ABANDIT:
        genotype = Genotype.published(name)
        assert [cell.name for cell in genotype.cells] == list("abcdef")
        assert all(cell.concat == (1, 2, 3, 4) for cell in genotype.cells)
        assert all(len(edges) == 1 for cell in genotype.cells for edges in cell.nodes)
        assert genotype.options.gabor == "released"
        assert genotype.macro.bn_eps == 1e-3
        assert genotype.operations == space.SPACES[genotype.space]
    with pytest.raises(GenotypeError, match=r"expected one of ABANDIT_CIFAR_1, .*, got 'DARTS_V2'"):
        Genotype.published("DARTS_V2")


# -- Files ----------------------------------------------------------------------------------------


@given(genotypes())
@settings(deadline=None, max_examples=60)
def test_save_and_load(tmp_path_factory, genotype):
    path = tmp_path_factory.mktemp("genotype") / "genotype.json"
    genotype.save(path)
    loaded = Genotype.load(path)
    assert loaded == genotype
    assert loaded.hash == genotype.hash
    assert Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))) == genotype


def shuffled(value, rng):
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


@given(genotypes(), st.randoms(use_true_random=False), st.sampled_from([None, 0, 4]))
@settings(deadline=None, max_examples=40)
def test_hash_does_not_depend_on_the_writing(genotype, rng, indent):
    data = shuffled(genotype.to_dict(), rng)
    for cell in data["cells"]:
        for edges in cell["nodes"]:
            rng.shuffle(edges)  # a sum has no order
    data["name"], data["macro"], data["search"] = "other", None, {"run_id": "other"}
    again = Genotype.from_dict(json.loads(json.dumps(data, indent=indent)))
    assert again.hash == genotype.hash


def test_hash_depends_on_what_is_computed():
    first = Genotype.published("ABANDIT_CIFAR_1")
    data = first.to_dict()
    del data["hash"]
    variants = [json.loads(json.dumps(data)) for _ in range(5)]
    variants[0]["cells"][0]["nodes"][1][0]["op"] = "max_pool_3x3"
    variants[1]["cells"][0]["nodes"][1][0]["source"] = 0
    variants[2]["cells"][0]["concat"] = [3, 4]
    variants[3]["options"]["gabor"] = "pixels"
    variants[4]["options"]["denoise_1x1"] = True
    hashes = {Genotype.from_dict(variant).hash for variant in variants}
    assert len(hashes | {first.hash}) == 6
    # An option of an operation that no cell holds computes nothing.
    light = Genotype.published("ABANDIT_MNIST_NORMAL_1").to_dict()
    before = light.pop("hash")
    light["options"]["gabor"] = "pixels"
    assert Genotype.from_dict(light).hash == before


def test_hash_is_the_one_of_the_first_release():
    """Hashes are written to files: a change of what is hashed must be a new version."""
    assert [Genotype.published(name).hash[:16] for name in ABANDIT] == [
        "d7f65e5902b18321",
        "90d318b29a81b6c0",
        "98c1d25424379d71",
    ]


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_bytes_are_a_genotype_error_or_nothing(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    raw = bytearray(json.dumps(a_dict(), indent=1).encode())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[at:]
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
    else:
        del raw[at : at + data.draw(st.integers(1, 40))]
    path.write_bytes(raw)
    genotype, message = outcome(Genotype.load, path)
    if genotype is None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
    else:  # whatever the damage hit, it was not the architecture
        assert genotype.hash == Genotype.published("ABANDIT_CIFAR_1").hash


@given(plain_values)
@settings(deadline=None)
def test_foreign_json_is_a_genotype_error(value):
    with pytest.raises(GenotypeError, match="not a genotype"):
        Genotype.from_dict(value)


@given(plain_values, st.sampled_from(["name", "space", "operations", "options", "cells", "macro"]))
@settings(deadline=None)
def test_foreign_fields_are_a_genotype_error_or_valid(value, field):
    data = a_dict() | {field: value}
    del data["hash"]
    genotype, message = outcome(Genotype.from_dict, data)
    assert genotype is not None or message.startswith("genotype: ")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], 2, r"schema_version: expected 1, got 2"),
        (["schema_version"], True, r"schema_version: expected 1, got True"),
        (["format"], "nni", r"not a genotype"),
        (["hash"], "0" * 64, r"hash: expected d7f65e59\w+ .* damaged or edited"),
        (["cells", 0, "nodes", 1, 0, "op"], "conv_9x9",
         r"cells\[0\].nodes\[1\]\[0\].op: unknown operation; .*, got 'conv_9x9'"),
        (["cells", 0, "nodes", 1, 0, "op"], "dil_conv_3x3", r"'dil_conv_3x3' is not in the list"),
        (["cells", 0, "nodes", 1, 0, "source"], 2, r"node 2: expected sources 0 to 1, got 2"),
        (["cells", 0, "nodes", 1, 0, "source"], -1, r"source: .* or equal to 0, got -1"),
        (["cells", 0, "nodes", 1, 0, "source"], "1", r"source: .* valid integer, got '1'"),
        (["cells", 0, "nodes", 1, 0, "extra"], 1, r"extra: Extra inputs are not permitted"),
        (["cells", 0, "nodes", 1], [], r"node 2: expected at least one incoming edge"),
        (["cells", 0, "nodes", 1],
         [{"op": "conv_3x3", "source": 0}, {"op": "conv_5x5", "source": 0}],
         r"node 2: expected one edge from each source"),
        (["cells", 0, "concat"], [1, 1], r"cells\[0\]: concat: expected different nodes"),
        (["cells", 0, "concat"], [5], r"concat: expected different nodes from 1 to 4, got \[5\]"),
        (["cells", 0, "name"], "b", r"cells\[0\].name: expected 'a', got 'b'"),
        (["cells"], [], r"cells: .* at least 1 item"),
        (["options", "gabor"], "dense", r"options.gabor: .* 'pixels' or 'released', got 'dense'"),
        (["macro", "layers"], 0, r"macro.layers"),
        (["macro", "reductions"], [3, 10], r"reductions: expected ascending cell indices below 10"),
        (["macro", "channels"], 1e9, r"macro.channels"),
        (["macro", "bn_eps"], 0.0, r"macro.bn_eps: .* greater than 0, got 0.0"),
        (["macro", "bn_eps"], "1e-3", r"macro.bn_eps"),
        (["macro", "layers"], None, r"reductions: expected ascending cell indices below 0"),
        (["operations"], ["conv_9x9"], r"operations: unknown: conv_9x9"),
    ],
)  # fmt: skip
def test_messages_name_file_place_and_value(tmp_path, path, value, message):
    data = a_dict()
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(data))
    with pytest.raises(GenotypeError, match=message) as error:
        Genotype.load(file)
    assert str(error.value).startswith(f"{file}: ")


def test_a_file_that_does_not_say_has_the_epsilon_of_torch():
    plain = a_dict()
    genotype = Genotype.from_dict(plain)
    del plain["macro"]["bn_eps"]
    before = Genotype.from_dict(plain)  # with its hash, which does not cover the macro
    assert (before.macro.bn_eps, genotype.macro.bn_eps) == (1e-5, 1e-3)
    assert before.hash == genotype.hash


def test_missing_file_and_missing_hash(tmp_path):
    with pytest.raises(GenotypeError, match=r"none\.json: cannot be read"):
        Genotype.load(tmp_path / "none.json")
    data = a_dict()
    expected = data.pop("hash")
    assert Genotype.from_dict(data).hash == expected


def test_deep_nesting_is_a_short_message():
    data = a_dict()
    deep: list = []
    for _ in range(400):
        deep = [deep]
    data["search"] = {"run_id": "r", "budget": {"x": deep}}
    with pytest.raises(
        GenotypeError, match=r"genotype: search\.budget\.x\.\S{10,70}\.\.\.: "
    ) as error:
        Genotype.from_dict(data)
    assert len(str(error.value)) < 300


def test_immutable():
    genotype = Genotype.published("ABANDIT_CIFAR_1")
    with pytest.raises(ValueError, match="frozen"):
        genotype.name = "other"


# -- From a search --------------------------------------------------------------------------------


def test_from_choices_keeps_all_edges():
    one = space.get("robust9", cell_types=2)
    choice = [row % 9 for row in range(20)]
    genotype = Genotype.from_choices(
        one, torch.tensor(choice), macro={"layers": 6, "channels": 16},
        search={"run_id": "r", "seed": 3, "budget": {"samples": 141}},
    )  # fmt: skip
    assert genotype.space == "robust9"
    assert genotype.macro == Macro(layers=6, channels=16, reductions=(2, 4))
    assert genotype.search == Search(run_id="r", seed=3, budget={"samples": 141})
    for number, cell in enumerate(genotype.cells):
        edges = [(e.source, node, e.op) for node, es in enumerate(cell.nodes, 1) for e in es]
        assert edges == [
            (source, node, one.operations[choice[10 * number + index]])
            for index, (source, node) in enumerate(one.edges)
        ]


def test_from_choices_keeps_the_best_edges():
    one = space.SearchSpace("mine", ("skip_connect", "conv_3x3"), nodes=3, cell_types=1)
    choice = [0, 1, 0, 1, 1, 0]
    # Means of the chosen arms: 0->1 .1; 0->2 .5, 1->2 .5 (tie); 0->3 nan, 1->3 .2, 2->3 .9.
    # The arm that was not chosen is always better and must not count.
    chosen = [0.1, 0.5, 0.5, float("nan"), 0.2, 0.9]
    mean = torch.full((6, 2), 0.99)
    mean[range(6), choice] = torch.tensor(chosen)

    def kept(count):
        genotype = Genotype.from_choices(one, choice, mean, count)
        return [[edge.source for edge in edges] for edges in genotype.cells[0].nodes]

    assert kept(1) == [[0], [0], [2]]
    assert kept(2) == [[0], [0, 1], [1, 2]]
    assert kept("all") == [[0], [0, 1], [0, 1, 2]]
    assert Genotype.from_choices(one, choice, mean.tolist(), 1).cells[0].nodes[2] == (
        Edge(op="skip_connect", source=2),
    )


def test_from_choices_errors():
    with pytest.raises(ValueError, match="mean: needed to rank edges when edges_per_node is 1"):
        Genotype.from_choices("robust9", [0] * 60, edges_per_node=1)
    with pytest.raises(ValueError, match="mean: expected 60 rows of 9 arms"):
        Genotype.from_choices("robust9", [0] * 60, torch.zeros(60, 8), 1)
    with pytest.raises(ValueError, match="edges_per_node: expected 'all', 1 or 2, got 3"):
        Genotype.from_choices("robust9", [0] * 60, torch.zeros(60, 9), 3)
    with pytest.raises(ValueError, match="from 0 to 8, got 9"):
        Genotype.from_choices("robust9", [9] * 60)
    with pytest.raises(GenotypeError, match=r"from_choices: macro\.layers"):
        Genotype.from_choices("robust9", [0] * 60, macro={"layers": 0, "channels": 1})


# -- The text of DARTS ----------------------------------------------------------------------------


@given(genotypes())
@settings(deadline=None, max_examples=60)
def test_darts_round_trip(genotype):
    text = genotype.to_darts()
    again = Genotype.from_darts(text, space=genotype.space)
    assert again.cells == genotype.cells
    assert again.hash == genotype.hash
    assert again.to_darts() == text
    assert Genotype.from_darts(f"FOUND = {text}").name == "FOUND"


def test_darts_text_by_hand():
    text = """Genotype(
        a=[('conv_3x3', 0), ('gab_filt_3x3', 1)], a_concat=range(1, 3),
        b=[[('skip_connect', 0)], [('sep_conv_3x3', 1), ('max_pool_3x3', 0)]], gabor='released')"""
    genotype = Genotype.from_darts(text)
    assert [cell.concat for cell in genotype.cells] == [(1, 2), (1, 2)]
    assert genotype.cells[1].nodes[1] == (
        Edge(op="sep_conv_3x3", source=1),
        Edge(op="max_pool_3x3", source=0),
    )
    assert genotype.to_darts() == (
        "Genotype(\n"
        "    a=[('conv_3x3', 0), ('gab_filt_3x3', 1)],\n"
        "    a_concat=[1, 2],\n"
        "    b=[[('skip_connect', 0)], [('sep_conv_3x3', 1), ('max_pool_3x3', 0)]],\n"
        "    b_concat=[1, 2],\n"
        "    gabor='released',\n"
        ")"
    )


DARTS_V2 = """DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0),
('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1),
('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2),
('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"""


def test_darts_is_read_with_its_own_names():
    genotype = Genotype.from_darts(DARTS_V2)
    assert (genotype.name, genotype.inputs, len(genotype.cells)) == ("DARTS_V2", 2, 2)
    normal, reduction = genotype.cells
    assert normal.edges[:3] == (
        (0, 2, "sep_conv_m_3x3"),
        (1, 2, "sep_conv_m_3x3"),
        (0, 3, "sep_conv_m_3x3"),
    )
    assert normal.edges[-1] == (2, 5, "dil_conv_3x3")
    assert reduction.concat == (2, 3, 4, 5)
    assert genotype.options.pool_bn is False
    text = genotype.to_darts()
    assert text.replace("\n    ", " ").startswith(
        "Genotype( normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1),"
    )
    again = Genotype.from_darts(text)
    assert again.hash == genotype.hash
    assert again.cells == genotype.cells
    # Another batch norm is another network, and the text says so.
    pools = genotype.model_copy(update={"options": OperationOptions()})
    assert pools.hash != genotype.hash
    assert "pool_bn=True" in pools.to_darts()
    assert Genotype.from_darts(pools.to_darts()).hash == pools.hash


def test_two_inputs_without_a_name_of_darts():
    """An operation whose name means another one in DARTS, and other than two cells."""
    choice = [0] * 14
    for operations, types in (
        (("sep_conv_3x3",), 1),
        (("sep_conv_3x3",), 2),
        (("gab_filt_3x3",), 3),
    ):
        darts = space.SearchSpace("mine", operations, cell_types=types, inputs=2)
        genotype = Genotype.from_choices(darts, choice * types)
        text = genotype.to_darts()
        assert "inputs=2" in text
        assert "normal" not in text
        assert Genotype.from_darts(text, space="mine") == genotype.model_copy(
            update={"operations": space.OPERATION_NAMES}
        )


@pytest.mark.parametrize("name", ["BNAS_XNOR_1", "BNAS_A_KIM"])
def test_two_inputs_in_files_and_text(name, tmp_path):
    genotype = Genotype.published(name)
    body = genotype.to_dict()
    assert body["inputs"] == 2
    assert not any("inputs" in cell for cell in body["cells"])
    assert Genotype.from_dict(body) == genotype
    assert Genotype.from_darts(genotype.to_darts()).hash == genotype.hash
    # With one input the same edges would be another network.
    del body["inputs"], body["hash"]
    with pytest.raises(GenotypeError, match=r"cells\[0\]: node 1: expected sources 0 to 0, got 1"):
        Genotype.from_dict(body)


def test_one_input_is_not_written():
    """Files, hashes and options of before there were two."""
    body = a_dict()
    assert "inputs" not in body
    assert body["options"] == {"denoise": "dot", "denoise_1x1": False, "gabor": "released"}
    assert Genotype.from_dict(body | {"inputs": 1}).to_dict() == body
    for wrong in (0, 3, True, "2"):
        with pytest.raises(GenotypeError, match="inputs"):
            Genotype.from_dict(body | {"inputs": wrong})
    with pytest.raises(
        ValueError, match=r"cells\[0\].inputs: expected 2 as in the genotype, got 1"
    ):
        Genotype(inputs=2, cells=[Genotype.published("ABANDIT_CIFAR_1").cells[0]])


def test_options_of_training_are_no_part_of_the_hash():
    binary = Genotype.published("BNAS_A_KIM")

    def changed(**options):
        return binary.model_copy(update={"options": binary.options.changed(options)}).hash

    assert changed(ste="tanh", weight_ste="identity") == binary.hash
    assert len({changed(alpha="none"), changed(pad="plus_one"), changed(residual=False),
                changed(preprocess="full"), binary.hash}) == 5  # fmt: skip
    # 1-bit layers alone have the options of 1-bit layers.
    other = Genotype.published("ABANDIT_CIFAR_1")
    same = other.model_copy(update={"options": other.options.changed({"alpha": "layer"})})
    assert same.hash == other.hash


def test_a_node_of_zeros_gets_the_best_operation_of_its_last_edge():
    searched = space.get("binary8")
    mean = [[0.5] * 8 for _ in range(28)]
    mean[1][4] = 0.75  # a:1->2
    choice = [0] * 28
    choice[3] = 7  # a:1->3
    genotype = Genotype.from_choices(searched, choice, mean, search={"run_id": "x"})
    first, second = genotype.cells[0].edges[:2], genotype.cells[0].edges[2:5]
    assert first == ((0, 2, "zero"), (1, 2, "max_pool_3x3"))
    assert second == ((0, 3, "zero"), (1, 3, "bin_sep_conv_5x5"), (2, 3, "zero"))
    replaced = genotype.search.model_dump()["zero_replaced"]
    assert replaced[:2] == ["a:1->2", "a:3->4"]
    assert len(replaced) == 7
    # Where edges are chosen, zero is none of them.
    two = Genotype.from_choices(searched, choice, mean, 2)
    assert [[e.op for e in edges] for edges in two.cells[0].nodes[:2]] == [
        ["max_pool_3x3"], ["bin_sep_conv_5x5"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Genotype(normal=[('skip_connect', 0), ('skip_connect', 1)])", "got no reduce"),
        ("Genotype(normal=[('skip_connect', 0)], reduce=[('skip_connect', 0)])", "got 1 pairs"),
        (
            "Genotype(normal=[[('skip_connect', 2)]], reduce=[[('skip_connect', 0)]])",
            "node 2: expected sources 0 to 1, got 2",
        ),
        (
            "Genotype(normal=[[('skip_connect', 0)]], reduce=[[('skip_connect', 0)]], a=3)",
            "unexpected a; expected normal, reduce",
        ),
        (
            "Genotype(normal=[('max_pool_3x3', 0), ('avg_pool_3x3', 0)], "
            "reduce=[[('skip_connect', 0)]])",
            "one edge from each source",
        ),
        ("Genotype(inputs=2, a=[('skip_connect', 0)], a_concat=[1])", "nodes from 2 to 2"),
        ("Genotype(inputs=7, a=[('skip_connect', 0)])", "inputs"),
    ],
)
def test_bad_text_of_two_inputs(text, message):
    with pytest.raises(GenotypeError, match=message):
        Genotype.from_darts(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected Genotype"),
        ("Genotype(a=[('conv_3x3', 0)]", "syntax error in line 1"),
        ("print('x')", r"got \"print\('x'\)\""),
        ("Genotype(a=__import__('os').getcwd())", "a: expected a literal"),
        ("Genotype(a=[open('x')])", "a: expected a literal"),
        ("Genotype(**{})", "expected Genotype"),
        ("Genotype()", "got none"),
        ("Genotype(b=[('conv_3x3', 0)])", "unexpected b"),
        ("Genotype(a=[('conv_3x3', 0)], c=[('conv_3x3', 0)])", "unexpected c"),
        ("Genotype(a=[('conv_3x3', 0, 1)])", "expected a list of .operation, source. pairs"),
        ("Genotype(a=3)", "pairs, one for each node, .* got 3"),
        ("Genotype(a=[('conv_3x3', 1)])", "node 1: expected sources 0 to 0, got 1"),
        ("Genotype(a=[('conv_3x3', 0)], a_concat=range(10**12))", "concat"),
        ("Genotype(a=" + "[" * 5000 + "]" * 5000 + ")", "DARTS text"),
        ("Genotype(a=" + "9" * 9000 + ")", "DARTS text"),
        ("Genotype(a='\0')", "DARTS text"),
        ("x" * 2_000_000, "got 2000000 characters"),
    ],
)
def test_bad_darts_text(text, message):
    with pytest.raises(GenotypeError, match=message):
        Genotype.from_darts(text)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_darts_text_is_a_genotype_error_or_valid(data):
    text = Genotype.published("ABANDIT_CIFAR_1").to_darts()
    at = data.draw(st.integers(0, len(text)))
    drop = data.draw(st.integers(0, 30))
    text = text[:at] + data.draw(st.text(max_size=4)) + text[at + drop :]
    genotype, message = outcome(Genotype.from_darts, text)
    assert genotype is not None or message.startswith("DARTS text: ")


# -- Drawings -------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def drawn_genotypes():
    rng = random.Random(0)
    choice = [rng.randrange(9) for _ in range(60)]
    yield "published", Genotype.published("ABANDIT_CIFAR_1")
    yield "all", Genotype.from_choices("robust9-light", choice)
    yield "long labels", Genotype.from_choices("robust9-light", [6] * 60)
    yield "two", Genotype.from_choices("robust9", choice, torch.rand(60, 9), 2)
    yield "two inputs", Genotype.from_choices("binary8", [rng.randrange(8) for _ in range(28)])
    wide = space.get("robust9", nodes=6, cell_types=3)
    yield "six nodes", Genotype.from_choices(wide, [rng.randrange(9) for _ in range(wide.rows)])
    one = space.SearchSpace("mine", ("conv_3x3",), nodes=1, cell_types=1)
    yield "one node", Genotype.from_choices(one, [0], name="<&>\"'")
    yield (
        "last node only",
        Genotype.from_darts("Genotype(a=[('conv_3x3', 0), ('skip_connect', 0)], a_concat=[2])"),
    )


DRAWN = dict(drawn_genotypes())


@pytest.mark.parametrize("genotype", DRAWN.values(), ids=DRAWN)
def test_svg(genotype):
    text = genotype.svg()
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert "href" not in text
    assert "script" not in text
    assert "url(" not in text
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.get("viewBox") == f"0 0 {width} {height}"
    rules = root.find(f"{SVG}style").text.split("}")[:-1]
    assert all(rule.startswith(f".{root.get('class')} ") for rule in rules)  # for inlining
    panels = root.findall(f"{SVG}g")
    assert len(panels) == len(genotype.cells)
    for panel, cell in zip(panels, genotype.cells, strict=True):
        frame = panel.find(f"{SVG}rect")
        left, top = map(float, panel.get("transform")[len("translate(") : -1].split())
        assert left + float(frame.get("width")) <= width
        assert top + float(frame.get("height")) <= height
        labels = panel.findall(f"{SVG}g")
        assert sorted(label.find(f"{SVG}title").text for label in labels) == sorted(
            edge.op for edges in cell.nodes for edge in edges
        )
        circles = [(float(c.get("cx")), float(c.get("cy"))) for c in panel.findall(f"{SVG}circle")]
        assert len(circles) == len(cell.nodes) + cell.inputs
        boxes = []
        for label in labels:
            box = label.find(f"{SVG}rect")
            x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
            assert x >= 0
            assert y >= 26  # below the title
            assert x + w <= float(frame.get("width"))
            assert y + h <= float(frame.get("height"))
            for a, b, c, d in boxes:
                assert x + w <= a or a + c <= x or y + h <= b or b + d <= y, "labels overlap"
            # The text itself (narrower than its box by the 5 units of padding) clears the nodes.
            for cx, cy in circles:
                assert x + 5 >= cx + 15 or x + w - 5 <= cx - 15 or y >= cy + 15 or y + h <= cy - 15
            boxes.append((x, y, w, h))


def test_import_loads_no_torch():
    code = "import sys, fastbandit.genotype; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
