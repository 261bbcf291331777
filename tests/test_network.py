"""fastbandit.nn.network: published parameter counts, chains, auxiliary head, drop-path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastbandit.attacks import pgd
from fastbandit.genotype import Genotype
from fastbandit.nn import network
from fastbandit.nn.frozen import freeze
from fastbandit.nn.network import AuxiliaryHead, Network, cell_sequence
from fastbandit.nn.supernet import Supernet
from fastbandit.space import get


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def published(name="ABANDIT_MNIST_NORMAL_1", **options):
    torch.manual_seed(0)
    defaults = {"in_channels": 1, "classes": 10, "channels": 4, "cells": 6}
    return Network(Genotype.published(name), **(defaults | options))


@pytest.mark.parametrize(
    ("name", "in_channels", "channels", "cells", "blocks", "expected"),
    [
        ("ABANDIT_CIFAR_1", 3, 48, 10, True, 5_187_898),
        ("ABANDIT_CIFAR_1", 3, 48, 6, True, 2_891_674),
        ("ABANDIT_MNIST_NORMAL_1", 1, 16, 6, False, 102_410),
    ],
)
def test_published_parameter_counts(name, in_channels, channels, cells, blocks, expected):
    """As counted from the released networks: the composition of every operation is right."""
    with torch.device("meta"):
        net = Network(
            Genotype.published(name),
            in_channels=in_channels,
            classes=10,
            channels=channels,
            cells=cells,
            denoise_blocks=blocks,
        )
    assert count(net) == expected


def test_published_count_by_hand():
    """MNIST_NORMAL_1, C = 16, V = 6, term by term."""

    def d(k, c):  # dil_conv
        return k * k * c + c * c + 2 * c

    def m(k, c):  # sep_conv_m
        return 2 * d(k, c)

    def pool(c):
        return 2 * c

    stem = 1 * 48 * 9 + 2 * 48
    preprocess = [48 * 16 + 32, 64 * 16 + 32, 64 * 32 + 64, 128 * 32 + 64, 128 * 64 + 128,
                  256 * 64 + 128]  # fmt: skip
    cells = [
        d(3, 16) + d(3, 16) + d(5, 16) + pool(16),
        0 + m(3, 16) + m(5, 16) + pool(16),
        m(3, 32) + m(5, 32) + 0 + m(3, 32),
        m(5, 32) + d(5, 32) + pool(32) + pool(32),
        pool(64) + d(3, 64) + d(3, 64) + m(5, 64),
        d(3, 64) + m(3, 64) + d(5, 64) + d(5, 64),
    ]
    classifier = 256 * 10 + 10
    assert stem + sum(preprocess) + sum(cells) + classifier == 102_410


def test_macro_of_the_file_is_the_default():
    with torch.device("meta"):
        net = Network(Genotype.published("ABANDIT_CIFAR_1"), in_channels=3, classes=10)
    assert count(net) == 5_187_898
    assert net.reductions == (3, 6)
    assert sorted(net.denoise_blocks) == ["2", "5", "7"]
    assert {m.kind for m in net.modules() if hasattr(m, "kind")} == {"released", "dot"}
    with pytest.raises(ValueError, match="channels: expected a number: the genotype says none"):
        Network(Genotype.published("ABANDIT_CIFAR_2"), in_channels=3, classes=10)


@pytest.mark.parametrize("name", Genotype.names())
def test_batch_norms_have_the_epsilon_of_the_macro(name):
    genotype = Genotype.published(name)
    sizes = {"in_channels": 1, "classes": 3, "channels": 2, "cells": 2}

    def built(genotype, **more):
        net = Network(genotype, **sizes, auxiliary=True, denoise_blocks=True, **more)
        return {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)}

    assert built(genotype) == {1e-5 if name == "BNAS_A_KIM" else 1e-3}
    assert built(genotype, bn_eps=0.5) == {0.5}
    assert built(genotype.model_copy(update={"macro": None})) == {1e-5}
    with pytest.raises(ValueError, match=r"bn_eps: expected in \(0, 1\), got 0"):
        built(genotype, bn_eps=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_route_has_the_epsilon(layout, frozen):
    """With a variance that is all epsilon, logits of another epsilon would be far away."""
    genotype = Genotype.published("ABANDIT_MNIST_NORMAL_1")
    torch.manual_seed(0)
    net = Network(genotype, in_channels=1, classes=3, channels=2, cells=2).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.zero_()
    x = torch.rand(2, 1, 6, 6)
    expected = net(x.double()).float()  # float64 has no fused route
    net = net.float().to(memory_format=layout)
    net = freeze(net) if frozen else net
    y = net(x.contiguous(memory_format=layout))
    torch.testing.assert_close(
        y, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max())
    )


def test_cell_sequence():
    assert "".join("abcdef"[kind] for kind in cell_sequence(10)) == "aabbcddeff"
    assert cell_sequence(6) == (0, 1, 2, 3, 4, 5)
    assert cell_sequence(20) == tuple(6 * i // 20 for i in range(20))
    assert cell_sequence(3) == (0, 2, 4)
    assert cell_sequence(10, types=2) == (0,) * 5 + (1,) * 5


@pytest.mark.parametrize("name", Genotype.names())
@pytest.mark.parametrize(("shape", "cells"), [((3, 32, 32), 6), ((1, 7, 5), 10), ((2, 1, 1), 1)])
def test_any_input_and_length(name, shape, cells):
    net = published(name, in_channels=shape[0], cells=cells, denoise_blocks=True)
    x = torch.rand(3, *shape)
    y = net(x)
    assert y.shape == (3, 10)
    y.sum().backward()
    assert net.eval()(x).shape == (3, 10)


def test_every_parameter_learns():
    net = published("ABANDIT_CIFAR_1", in_channels=3, denoise_blocks=True, auxiliary=True)
    for block in net.modules():  # out of the identity, where a block's inside gets no gradient
        if hasattr(block, "transform"):
            torch.nn.init.ones_(block.bn.weight)
    logits, second = net(torch.rand(4, 3, 16, 16), with_auxiliary=True)
    (logits.logsumexp(1).sum() + second.logsumexp(1).sum()).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_denoising_blocks_start_as_the_identity():
    plain, blocks = published(cells=8).eval(), published(cells=8, denoise_blocks=True).eval()
    blocks.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(2, 1, 12, 12)
    torch.testing.assert_close(plain(x), blocks(x), rtol=0, atol=0)
    assert sorted(blocks.denoise_blocks) == ["2", "4", "6"]


def test_auxiliary_head():
    net = published(auxiliary=True)
    x = torch.rand(2, 1, 28, 28)
    logits, second = net(x, with_auxiliary=True)
    assert logits.shape == second.shape == (2, 10)
    assert net(x).shape == (2, 10)  # attacks see logits, whatever the mode
    # 64 = 4 nodes of width 16, the width after both reductions at 4 channels.
    head = 64 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10
    assert count(net) - count(published()) == head == count(AuxiliaryHead(64, 10))
    assert published(auxiliary=True)(torch.rand(2, 1, 1, 1), with_auxiliary=True)[1].shape == (
        2,
        10,
    )
    with pytest.raises(ValueError, match="no auxiliary head"):
        published()(x, with_auxiliary=True)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 2, 2)
    y = network._drop_path(x, 0.3)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert (y.amax((1, 2, 3)) == y.amin((1, 2, 3))).all()
    # Five standard errors of a mean of 20,000 such values: 5 sqrt(0.3 / 0.7 / 20000) = 0.023.
    assert y.mean().item() == pytest.approx(1.0, abs=0.023)


def test_drop_path_only_in_training_and_not_on_the_identity():
    net = published(drop_path_prob=0.5)
    x = torch.rand(4, 1, 8, 8)
    torch.manual_seed(1)
    first = net(x)
    assert not torch.equal(first, net(x))
    net.eval()
    torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)
    net.train().drop_path_prob = 0.0
    torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)
    skips = Genotype.from_choices("robust9", [2] * 60)
    cell = Network(skips, in_channels=1, classes=2, channels=4).cells[0]
    y = torch.rand(2, 12, 4, 4)
    torch.testing.assert_close(cell(y, 0.99), cell(y, 0.0), rtol=0, atol=0)


def test_the_genotype_of_a_path_computes_what_the_path_computes():
    """Supernet and network agree, node by node: copy the weights of a path and compare."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    choice = torch.randint(0, 9, (60,), generator=generator)
    supernet = Supernet("robust9", in_channels=1, classes=10, channels=4)
    supernet.set_path(choice)
    for _ in range(2):
        supernet(torch.rand(8, 1, 8, 8))
    net = Network(Genotype.from_choices("robust9", choice), in_channels=1, classes=10, channels=4)
    source = supernet.state_dict()
    state = {}
    for key, value in net.state_dict().items():
        parts = key.split(".")
        if parts[0] == "cells" and parts[2] == "operations":
            cell, edge = int(parts[1]), int(parts[3])
            arm = int(choice[cell * 10 + edge])
            key_there = ".".join(["cells", parts[1], "edges", parts[3], str(arm), *parts[4:]])
        else:
            key_there = key
        state[key] = source.get(key_there, value)  # scale 1 and shift 0 where there are none
    net.load_state_dict(state)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(net.eval()(x), supernet.eval()(x), rtol=1e-4, atol=1e-5)


def test_kept_edges_are_the_ones_summed():
    means = torch.rand(60, 9, generator=torch.Generator().manual_seed(0))
    one = Genotype.from_choices("robust9", [3] * 60, mean=means, edges_per_node=1)
    two = Genotype.from_choices("robust9", [3] * 60, mean=means, edges_per_node=2)
    sizes = [
        len(Network(genotype, in_channels=1, classes=2, channels=2).cells[0].operations)
        for genotype in (one, two, Genotype.from_choices("robust9", [3] * 60))
    ]
    assert sizes == [4, 7, 10]


def test_errors():
    with pytest.raises(ValueError, match="Network: cells: expected >= 1, got 0"):
        published(cells=0)
    with pytest.raises(ValueError, match="channels: expected >= 1, got -4"):
        published(channels=-4)
    with pytest.raises(ValueError, match=r"drop_path_prob: expected in \[0, 1\), got 1"):
        published(drop_path_prob=1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_network_compiles_as_one_graph(device, training):
    """torch.compile stops nowhere within a network, and computes what the network computes."""
    space = get("robust9", nodes=3, cell_types=2)
    genotype = Genotype.from_choices(space, torch.arange(space.rows) % 9)  # every operation
    torch.manual_seed(0)
    net = Network(genotype, in_channels=1, classes=10, channels=4, cells=2, auxiliary=True)
    net.drop_path_prob = 0.0
    net = net.to(device, memory_format=torch.channels_last).train(training)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    x = torch.rand(8, 1, 8, 8, device=device, requires_grad=True)
    torch._dynamo.reset()
    results = []
    for call in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.load_state_dict(state)
        logits, second = call(x, with_auxiliary=True)
        loss = (logits.square() + second).sum()
        gradients = torch.autograd.grad(loss, [x, *net.parameters()])
        results.append([logits, second, *gradients, *net.buffers()])
        results[-1] = [tensor.detach().clone() for tensor in results[-1]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_attack_on_a_compiled_network(device):
    space = get("robust9", nodes=2, cell_types=1)
    genotype = Genotype.from_choices(space, torch.tensor([5, 7, 8]))  # what this package adds
    torch.manual_seed(0)
    net = Network(genotype, in_channels=1, classes=10, channels=4, cells=2).to(device).eval()
    x, y = torch.rand(4, 1, 8, 8, device=device), torch.arange(4, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    settings = {"epsilon": 0.1, "step_size": 0.04, "steps": 3}
    torch.testing.assert_close(
        pgd(compiled, x, y, **settings), pgd(net, x, y, **settings), rtol=0, atol=1e-6
    )


def test_images_that_are_none_of_this_network_are_refused():
    """The normalisation would broadcast grey images over three channels."""
    network = Network(
        Genotype.published("ABANDIT_MNIST_NORMAL_1"), in_channels=3, classes=4, channels=2, cells=1
    ).eval()
    for images, error, message in (
        (torch.rand(2, 1, 8, 8), ValueError, r"expected images \[N, 3, H, W\], got \[2, 1, 8, 8\]"),
        (torch.rand(3, 8, 8), ValueError, r"expected images \[N, 3, H, W\], got \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "got torch.uint8; divide bytes by"),
        (torch.full((2, 3, 8, 8), 255.0), ValueError, r"in \[0, 1\], got values in \[255, 255\]"),
        (torch.full((2, 3, 8, 8), -2.1), ValueError, "the normalisation is the network's first"),
    ):
        with pytest.raises(error, match=f"Network: .*{message}"):
            network(images)
    # An attack without bounds leaves [0, 1] by its radius.
    assert network(torch.full((2, 3, 8, 8), 1.3)).shape == (2, 4)
    assert network(torch.full((2, 3, 8, 8), torch.nan)).isnan().all()
    assert network(torch.rand(0, 3, 8, 8)).shape == (0, 4)
