"""fastbandit.packed: the file of a network whose 1-bit weights take a bit each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_binary import everywhere, random_genotype, trained
from torch.nn import functional as F

import fastbandit
from fastbandit import models
from fastbandit.genotype import Genotype
from fastbandit.nn.binary import PackedLayer, latents, pack, use_full_precision
from fastbandit.nn.network import Network
from fastbandit.packed import SUFFIX, bits_of, load_packed, save_packed, signs_from
from fastbandit.runs.tensors import CheckpointError, kind_of, load_tensors, save_tensors


def network_of(genotype, channels=8, cells=3, in_channels=1):
    torch.manual_seed(0)
    network = Network(
        genotype, in_channels=in_channels, classes=4, channels=channels, cells=cells, mean=0.4
    )
    return trained(network, channels=in_channels)


@pytest.fixture
def file(tmp_path):
    return tmp_path / f"net{SUFFIX}"


NETWORKS = {
    "binary8": (random_genotype("binary8"), {}),
    "dense": (random_genotype("binary8-dense", alpha="layer"), {}),
    "padded with +1": (everywhere("bin_sep_conv_3x3", pad="plus_one", alpha="none"), {}),
    "batch norm first": (everywhere("bin_sep_conv_5x5", pre_bn=True), {"cells": 1}),
    "more than a word": (everywhere("bin_dil_conv_3x3"), {"channels": 68, "cells": 1}),
    "1-bit weights on real maps": (Genotype.published("BNAS_XNOR_1"), {"channels": 5, "cells": 3}),
    "Kim": (Genotype.published("BNAS_A_KIM"), {"channels": 5, "cells": 3}),
}


@pytest.mark.parametrize(("genotype", "sizes"), NETWORKS.values(), ids=list(NETWORKS))
def test_the_loaded_network_gives_the_same_bits(genotype, sizes, file):
    network = network_of(genotype, **sizes)
    network.about = {"data": {"shape": [1, 8, 8]}, "training": {"seed": 1}}
    save_packed(network, file)
    loaded = fastbandit.load(file)
    assert (loaded.genotype, loaded.arguments) == (network.genotype, network.arguments)
    assert loaded.about == network.about
    assert not loaded.training
    for n in (1, 7):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.rand(n, 1, 8, 8).contiguous(memory_format=layout)
            expected = network(x)
            assert expected.std() > 1e-3
            assert torch.equal(loaded(x), expected)
    # Saved again: the same bytes, from the loaded network and from what pack makes.
    written = file.read_bytes()
    for again in (loaded, pack(network)):
        save_packed(again, file)
        assert file.read_bytes() == written


def test_a_stranger_reads_the_signs_with_numpy_alone(file):
    """What docs/binary.md says of the format, without this package's reader."""
    network = network_of(random_genotype("binary8"))
    save_packed(network, file)
    with safe_open(file, framework="numpy") as found:
        shapes = json.loads(found.metadata()["fastbandit"])["bits"]
        tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
    assert len(shapes) == len(list(latents(network)))
    for name, shape in shapes.items():
        bits = np.unpackbits(tensors[name], bitorder="little")[: np.prod(shape)]
        signs = torch.from_numpy(bits.reshape(shape).astype(np.float32) * 2 - 1)
        layer, _, own = name.removesuffix("_bits").rpartition(".")
        conv = getattr(network.get_submodule(layer), own)
        assert torch.equal(signs, torch.where(conv.weight >= 0, 1.0, -1.0))


def test_bytes_by_hand(file):
    genotype = everywhere("bin_sep_conv_3x3")
    network = network_of(genotype, channels=16, cells=1, in_channels=3)
    sizes = save_packed(network, file)
    tensors, _ = load_tensors(file, "packed network")
    # One cell, a reduction: 32 channels, 14 edges; inputs of 48 channels at stride 1.
    edges = 14 * ((32 * 9 + 32 * 32) // 8 + 32 * (2 + 1) + 32 * (4 + 4))
    inputs = 2 * (48 * 32 // 8 + 32 * (4 + 4))
    real = 4 * (
        3 + 3 + 48 * 27 + 4 * 48 + 128 * 4 + 4
    )  # normalisation, stem and its BN, classifier
    assert sizes["tensor_bytes"] == edges + inputs + real
    assert sizes["tensor_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert sizes["bytes"] == file.stat().st_size
    assert sizes["float_bytes"] == 4 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("shape", [[1], [8], [3, 3, 3, 3], [0, 2], []])
def test_bits_of_and_back(shape):
    x = torch.randn(shape)
    x.flatten()[:1] = 0.0  # its sign is +1
    bits = bits_of(x)
    assert bits.dtype == torch.uint8
    assert torch.equal(signs_from(bits, shape), torch.where(x >= 0, 1.0, -1.0))
    with pytest.raises(ValueError, match=r"expected \d+ bytes for the signs of shape"):
        signs_from(torch.cat([bits, bits, bits[:1] if len(bits) else bits.new_zeros(1)]), shape)


def test_what_a_file_cannot_hold_is_refused(file):
    network = network_of(random_genotype("binary8"))
    with pytest.raises(
        ValueError, match=r"save: expected a network with its weights, got a packed"
    ):
        pack(network).save(file)
    with pytest.raises(ValueError, match=r"expected a network of float32, got torch.float64"):
        save_packed(network_of(random_genotype("binary8")).double(), file)
    real = network_of(Genotype.published("ABANDIT_MNIST_NORMAL_1"), cells=1)
    with pytest.raises(ValueError, match=r"expected a network with 1-bit weights, got one without"):
        save_packed(real, file)
    parent = network_of(random_genotype("binary8"))
    use_full_precision(parent, True)
    with pytest.raises(RuntimeError, match=r"pack: expected the child"):
        save_packed(parent, file)
    hooked = network_of(everywhere("bin_sep_conv_3x3"))
    hooked.cells[0].operations[0].depthwise.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"cells.0.operations.0.depthwise: expected a layer of"):
        save_packed(hooked, file)
    assert not file.exists()


def test_a_packed_file_is_no_model_file(file, tmp_path):
    network = network_of(random_genotype("binary8"))
    save_packed(network, file)
    assert kind_of(file) == "packed network"
    with pytest.raises(CheckpointError, match=r"a packed network, which has no gradient and no w"):
        models.load_model(file)
    with pytest.raises(RuntimeError, match=r"expected an input without gradient"):
        fastbandit.load(file)(torch.rand(1, 1, 8, 8, requires_grad=True))
    network.save(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a packed network of version 1 or 2, got"):
        load_packed(tmp_path / "net.safetensors")
    for content in (b"", b"\xff" * 9, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"):
        (tmp_path / "other").write_bytes(content)
        assert kind_of(tmp_path / "other") is None
    assert kind_of(tmp_path / "none") is None


def rewritten(file, change):
    tensors, metadata = load_tensors(file, "packed network")
    for key in ("kind", "version", "crc32"):
        metadata.pop(key)
    change(tensors, metadata)
    save_tensors(file, tensors, "packed network", metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("bits"), "'bits'"),
        (lambda t, m: m["architecture"].update(cells=1 << 40), r"expected \d+ cells, got"),
        (lambda t, m: m["architecture"].update(channels=1 << 14), "expected torch"),
        (lambda t, m: t.pop("classifier.bias"), "classifier.bias: expected shape"),
        (lambda t, m: t.update(more=torch.zeros(1)), "."),
        (lambda t, m: m["bits"].update({next(iter(m["bits"])): [1 << 40, 1 << 40]}), "bytes for"),
        (lambda t, m: m["bits"].update({next(iter(m["bits"])): "x"}), "."),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_error(change, message, file):
    save_packed(network_of(random_genotype("binary8")), file)
    rewritten(file, change)
    with pytest.raises(CheckpointError, match=rf"not a packed network that .* build: .*{message}"):
        load_packed(file)


def test_a_flipped_bit_is_found(file):
    save_packed(network_of(random_genotype("binary8")), file)
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="the checksum of its tensors and metadata"):
        load_packed(file)


def test_1_bit_weights_on_real_maps_stay_what_they_are(file):
    """The mean of equal magnitudes may round to another number; the loaded scale is not a mean."""
    network = network_of(Genotype.published("BNAS_XNOR_1"), channels=7, cells=2)
    save_packed(network, file)
    loaded = load_packed(file)
    assert not any(isinstance(layer, PackedLayer) for layer in loaded.modules())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), network(x))
    assert F.cross_entropy(loaded(x), torch.tensor([0, 1])).isfinite()
