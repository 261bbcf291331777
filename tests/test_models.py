"""The model file: what goes in comes out, and what is not one is refused."""

import dataclasses
import os
import re
import shlex
import warnings

import pytest
import torch
from torch import nn

import fastbandit
from fastbandit.config import ConfigError
from fastbandit.evaluate import EvaluateConfig
from fastbandit.evaluate import __main__ as evaluate
from fastbandit.genotype import Genotype
from fastbandit.models import (
    BEST,
    LAST,
    Architecture,
    find_model,
    load_model,
    multiply_adds,
    save_model,
)
from fastbandit.nn.network import Network
from fastbandit.runs.tensors import CheckpointError, RunError, save_tensors
from fastbandit.search import SearchConfig
from fastbandit.threat import ThreatModel

GENOTYPE = Genotype.published("ABANDIT_CIFAR_2")
ARCHITECTURE = Architecture(2, 5, 3, 2, denoise_blocks=True, gabor="released", bn_eps=2e-3)


def write(path, genotype=GENOTYPE, architecture=ARCHITECTURE, **changes):
    torch.manual_seed(0)
    network = ARCHITECTURE.build(GENOTYPE, mean=(0.1, 0.2), std=(0.3, 0.4), auxiliary=True)
    for _ in range(2):
        network(torch.rand(4, 2, 8, 8))  # statistics of its own
    tensors = {**network.state_dict(), **changes}
    save_model(
        path, tensors, genotype=genotype, architecture=architecture,
        data={"name": "none", "shape": [2, 8, 8]}, training={"epoch": 3},
    )  # fmt: skip
    return network.eval()


def test_round_trip(tmp_path):
    network = write(tmp_path / "m")
    found = load_model(tmp_path / "m")
    assert found.genotype == GENOTYPE
    assert found.architecture == ARCHITECTURE
    assert (found.data["shape"], found.training) == ([2, 8, 8], {"epoch": 3})
    assert not found.network.training
    assert found.network.auxiliary is None
    x = torch.rand(3, 2, 8, 8)
    assert torch.equal(found.network(x), network(x))
    # The same network gives the same bytes.
    write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


def test_an_old_file_keeps_its_epsilon(tmp_path):
    """One that was written before architecture and macro said it."""
    genotype, architecture = GENOTYPE.to_dict(), dataclasses.asdict(ARCHITECTURE)
    genotype["macro"] = None
    del architecture["bn_eps"]
    network = ARCHITECTURE.build(GENOTYPE)
    metadata = {"genotype": genotype, "architecture": architecture, "data": {}, "training": {}}
    save_tensors(tmp_path / "m", network.state_dict(), "network", metadata)
    found = load_model(tmp_path / "m")
    assert {m.eps for m in found.network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_which_file_a_folder_means(tmp_path):
    with pytest.raises(RunError, match=r"expected a folder with model-best\.safetensors or model-"):
        find_model(tmp_path)
    with pytest.raises(RunError, match="expected a model file or the folder of a retraining run"):
        find_model(tmp_path / "none")
    write(tmp_path / LAST)
    assert find_model(tmp_path) == tmp_path / LAST
    write(tmp_path / BEST)
    assert find_model(tmp_path) == tmp_path / BEST
    assert find_model(tmp_path / LAST) == tmp_path / LAST


@pytest.mark.parametrize("position", [20, -10])
def test_a_flipped_bit_is_noticed(position, tmp_path):
    write(tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    data[position] ^= 4
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'm'}: .*"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_part_of_a_file(size, tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:size])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_model(tmp_path / "m")


def test_files_of_others(tmp_path):
    save_tensors(tmp_path / "m", {"a": torch.zeros(1)}, "checkpoint", {})
    with pytest.raises(
        CheckpointError, match="expected a network of version 1 or 2, got 'checkpoint'"
    ):
        load_model(tmp_path / "m")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "m")
    with pytest.raises(CheckpointError, match="not one that fastbandit wrote"):
        load_model(tmp_path / "m")
    (tmp_path / "m").write_bytes(b"\x80\x02c__builtin__\neval\n")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_model(tmp_path / "m")


def test_weights_that_do_not_fit(tmp_path):
    write(tmp_path / "m", genotype=Genotype.published("ABANDIT_CIFAR_1"))
    with pytest.raises(CheckpointError, match="not a model that this version can build"):
        load_model(tmp_path / "m")
    write(tmp_path / "m", more=torch.zeros(1))
    with pytest.raises(CheckpointError, match="not a model that this version can build"):
        load_model(tmp_path / "m")
    save_tensors(tmp_path / "m", {"a": torch.zeros(1)}, "network", {"data": {}, "training": {}})
    with pytest.raises(CheckpointError, match="not a model that this version can build: 'genotype"):
        load_model(tmp_path / "m")


def test_multiply_adds_by_hand():
    genotype = Genotype.from_darts("Genotype(a=[('sep_conv_m_3x3', 0), ('gab_filt_3x3', 0)])")
    network = Architecture(1, 3, 4, 1).build(genotype).train()
    # 6x6: stem 1 -> 12 (3x3); the one cell is a reduction: 12 -> 8 (1x1), then at stride 2 twice
    # depthwise 3x3 and 1x1 on 3x3 maps; Gabor, at full size: one sum of the channels -> 8 (3x3).
    expected = 36 * (12 * 9 + 12 * 8) + 9 * 2 * (8 * 9 + 8 * 8) + 36 * 8 * 9 + 16 * 3
    assert network.reductions == (0,)
    assert multiply_adds(network, [1, 6, 6]) == expected
    assert network.training


def test_a_loaded_network_predicts_and_saves_itself(tmp_path):
    write(tmp_path / BEST)
    network = fastbandit.load(tmp_path / BEST)
    images = torch.rand(3, 2, 8, 8)
    network.train()
    network.cells[0].eval()
    modes = [module.training for module in network.modules()]
    found = network.predict(images)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(found, network.eval()(images).argmax(1))
    path = network.save(tmp_path / "copy" / "mine.safetensors")
    again = load_model(path)
    assert torch.equal(again.network(images), network(images))
    first = load_model(tmp_path / BEST)
    assert (again.genotype, again.architecture) == (first.genotype, first.architecture)
    assert (again.data, again.training) == (first.data, first.training)
    card = path.with_suffix(".md").read_text()
    assert "fastbandit.load('mine.safetensors')" in card
    assert first.genotype.hash[:12] in card
    # Saved again it is replaced; notes of somebody's, or its own with notes in it, are not.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.save(path)
    for notes in ("My notes.\n", card.replace("# mine", "# Mine"), ""):
        path.with_suffix(".md").write_text(notes)
        with pytest.warns(UserWarning, match=r"mine\.md: kept: it is not, or not as, save wrote"):
            network.save(path)
        assert path.with_suffix(".md").read_text() == notes
    with pytest.raises(ValueError, match=r"expected a file name that ends in .safetensors"):
        network.save(tmp_path / "mine.pt")
    # One that was never trained, too.
    fresh = Network(Genotype.published("ABANDIT_MNIST_NORMAL_1"), in_channels=1, classes=3, cells=2,
                    channels=2, mean=0.3, gabor="released")  # fmt: skip
    assert "not recorded" in fresh.save(tmp_path / "f.safetensors").with_suffix(".md").read_text()
    loaded = fastbandit.load(tmp_path / "f.safetensors")
    grey = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(grey), fresh.eval()(grey))


@pytest.mark.parametrize(
    ("data", "training", "command"),
    [
        ({}, {}, "--data DATA --epsilon EPSILON`, with DATA for its images, a folder or file and"),
        ({"name": "digits"}, {"threat": ThreatModel(epsilon="0.2").to_dict()},
         "--data digits --epsilon 0.2`."),
        ({"name": "mnist"}, {"threat": ThreatModel(norm="l2", epsilon="1.5").to_dict()},
         "--data mnist --epsilon 1.5 --norm l2`."),
        ({"name": "birds"}, {"threat": None}, "--data DATA --epsilon EPSILON`, with DATA for"),
    ],
)  # fmt: skip
def test_the_command_of_a_card_is_one(data, training, command, tmp_path):
    network = ARCHITECTURE.build(GENOTYPE)
    network.about = {"data": data, "training": training}
    card = network.save(tmp_path / "my net.safetensors").with_suffix(".md").read_text()
    assert command in card
    (line,) = re.findall("`fastbandit evaluate (.*)`", card)
    request = evaluate.parse(shlex.split(line.replace("EPSILON", "0.1")))
    assert request.options.model == "my net.safetensors"
    assert request.config.attacks == EvaluateConfig.preset("standard").attacks


def test_the_newest_run_with_a_model(tmp_path):
    with pytest.raises(RunError, match="latest: expected a folder with a model in"):
        find_model(tmp_path / "latest")
    for age, place in enumerate(("old", "search/networks/found", "empty")):
        (tmp_path / place).mkdir(parents=True)
        if place != "empty":
            write(tmp_path / place / BEST)
            os.utime(tmp_path / place / BEST, (age, age))
    assert find_model(tmp_path / "latest") == tmp_path / "search/networks/found" / BEST
    assert find_model(tmp_path / "search") == tmp_path / "search/networks/found" / BEST
    os.utime(tmp_path / "old" / BEST, (9, 9))
    assert find_model(tmp_path / "latest") == tmp_path / "old" / BEST
    (tmp_path / "latest").mkdir()
    with pytest.raises(RunError, match="expected a folder with model-best"):
        find_model(tmp_path / "latest")


def test_presets_in_python_and_a_genotype_in_a_notebook():
    config = SearchConfig.preset("mnist", name="mine", seed=1, attack={"epsilon": "0.2"})
    assert (config.data, config.name, config.seed) == ("mnist", "mine", 1)
    assert config.attack.epsilon == "0.2"
    assert EvaluateConfig.preset("cifar10").epsilon == "8/255"
    with pytest.raises(ConfigError, match=r"got 'mnst'; did you mean mnist\?"):
        SearchConfig.preset("mnst")
    with pytest.raises(ConfigError, match="unknown setting sed; did you mean seed"):
        SearchConfig.preset("mnist", sed=1)
    assert Genotype.published("ABANDIT_MNIST_NORMAL_1")._repr_svg_().startswith("<svg")
