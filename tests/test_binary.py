"""fastbandit.nn.binary: 1-bit layers, parent and child, packed networks; networks of two inputs."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbandit import _native, ops, space
from fastbandit.genotype import Genotype
from fastbandit.nn import signs as signs_module
from fastbandit.nn.binary import (
    BinaryConv2d,
    BinaryConvBN,
    BinaryDepthwiseConv2d,
    BinarySepConv,
    PackedConv2d,
    PackedConvBN,
    PackedSepConv,
    clamp_latents,
    latents,
    pack,
    use_full_precision,
    use_surrogate,
)
from fastbandit.nn.frozen import freeze
from fastbandit.nn.network import Network
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.nn.supernet import Supernet
from fastbandit.operations import OperationOptions

binary_conv2d = importlib.import_module("fastbandit.ops.binary_conv2d")
binary_ste = importlib.import_module("fastbandit.ops.binary_ste")

PDARTS = """Genotype(normal=[('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0),
('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 0),
('dil_conv_5x5', 4)], normal_concat=range(2, 6), reduce=[('avg_pool_3x3', 0), ('sep_conv_5x5', 1),
('sep_conv_3x3', 0), ('dil_conv_5x5', 2), ('max_pool_3x3', 0), ('dil_conv_3x3', 1),
('dil_conv_3x3', 1), ('dil_conv_5x5', 3)], reduce_concat=range(2, 6){more})"""


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def split(module):
    """Parameters that are 1-bit weights, other convolutions and linear layers, batch norms."""
    bits = sum(p.numel() for p in latents(module))
    norms = sum(parameters(m) for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    return bits, parameters(module) - bits - norms, norms


def everywhere(operation, **options):
    """The genotype of ``binary8`` with one operation on every edge."""
    edges = space.get("binary8").edges
    nodes = [
        [{"op": operation, "source": s} for s, n in edges if n == node] for node in (2, 3, 4, 5)
    ]
    cells = [{"name": name, "nodes": nodes, "concat": [2, 3, 4, 5]} for name in "ab"]
    options = {"preprocess": "binary", **options}
    return Genotype(space="binary8", inputs=2, cells=cells, options=options)


def random_genotype(name="binary8", **options):
    searched = space.get(name)
    generator = torch.Generator().manual_seed(3)
    choice = torch.randint(searched.arms, (searched.rows,), generator=generator)
    options = {"preprocess": "binary", **options}
    return Genotype.from_choices(searched, choice.tolist(), options=options)


def trained(network, size=8, channels=1):
    """Running statistics, scales and shifts that are not those of the beginning; then eval."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)  # negative ones too
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(2):
            network(torch.rand(5, channels, size, size))
    return network.eval()


# -- Counts ---------------------------------------------------------------------------------------


def test_parameters_of_published_networks():
    """The counter's reference is the P-DARTS cell, whose count its authors give."""
    darts = Genotype.from_darts(PDARTS.format(more=""))
    sizes = {"in_channels": 3, "classes": 10, "channels": 36, "cells": 20}
    with torch.device("meta"):
        assert parameters(Network(darts, **sizes)) == 3_433_798
        assert parameters(Network(darts, **sizes, auxiliary=True)) == 3_910_224
        signed = Genotype.from_darts(PDARTS.format(more=", weights='sign', preprocess='sign'"))
        assert split(Network(signed, **sizes)) == (3_332_448, 60_526, 40_824)
        xnor = Network(Genotype.published("BNAS_XNOR_1"), in_channels=3, classes=10)
        assert len(xnor.cells) == 20
        assert (parameters(xnor), split(xnor)) == (2_499_814, (2_407_536, 60_526, 31_752))
        xnor = Network(Genotype.published("BNAS_XNOR_1"), in_channels=3, classes=10, auxiliary=True)
        assert parameters(xnor) == 2_976_240
        kim = Network(Genotype.published("BNAS_A_KIM"), in_channels=3, classes=10)
        bits, *real = split(kim)
        assert (parameters(kim), bits, sum(real)) == (5_578_252, 4_708_368, 869_884)


@pytest.mark.parametrize(
    ("operation", "total", "of_which"),
    [
        ("bin_sep_conv_3x3", 250_682, (223_040, 14_106, 13_536)),
        ("skip_connect", 101_882, None),
        ("max_pool_3x3", 65_658, None),
        ("zero", 59_386, (44_288, 14_106, 992)),
    ],
)
def test_parameters_of_binary8(operation, total, of_which):
    genotype = everywhere(operation)
    with torch.device("meta"):
        network = Network(genotype, in_channels=3, classes=10, channels=16, cells=6)
        grey = Network(genotype, in_channels=1, classes=10, channels=16, cells=6)
    assert parameters(network) == total
    assert parameters(grey) == total - 864
    if of_which:
        assert split(network) == of_which


# -- Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("alpha", ["filter", "layer", "none"])
@pytest.mark.parametrize("pad", ["zero", "plus_one"])
def test_a_layer_is_the_convolution_of_the_signs(stride, alpha, pad):
    torch.manual_seed(0)
    options = OperationOptions(alpha=alpha, pad=pad)
    for conv in (
        BinaryConv2d(5, 6, 3, stride, 2, options=options),
        BinaryDepthwiseConv2d(5, 5, stride, options=options),
    ):
        x = torch.randn(2, 5, 7, 6)
        x[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
        w = conv.weight.detach()
        scale = {"filter": w.abs().mean((1, 2, 3)), "layer": w.abs().mean(), "none": torch.ones(1)}
        p = conv.padding
        around = F.pad(signs(x), (p,) * 4, value=0.0 if pad == "zero" else 1.0)
        dot = F.conv2d(around, signs(w), None, stride, 0, conv.dilation, conv.groups)
        assert torch.equal(conv(x), dot.round() * scale[alpha].view(-1, 1, 1))
        # The parent: real weights and ReLU.
        use_full_precision(conv, True)
        expected = F.conv2d(F.relu(x), w, None, stride, p, conv.dilation, conv.groups)
        torch.testing.assert_close(conv(x), expected)


def test_blocks_are_those_of_the_figure():
    """dw, BN, 1x1, BN; with pre_bn BN, dw, BN, 1x1, ReLU; in training mode."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5)

    def norm(y):
        return F.batch_norm(y, None, None, training=True)

    sep = BinarySepConv(3, 6, 1, False, dilation=2)
    middle = norm(sep.depthwise(x))
    torch.testing.assert_close(sep(x), norm(sep.pointwise(middle)))
    options = OperationOptions(pre_bn=True)
    sep = BinarySepConv(3, 6, 2, False, options)
    assert sep.depthwise.stride == 2
    middle = norm(sep.depthwise(norm(x)))
    torch.testing.assert_close(sep(x), F.relu(sep.pointwise(middle)))
    one = BinaryConvBN(6, 4, options=options)
    torch.testing.assert_close(one([x[:, :2], x[:, 2:]]), F.relu(one.conv(one.bn(x))))
    one = BinaryConvBN(6, 4, affine=False)
    torch.testing.assert_close(one(x), norm(one.conv(x)))


@pytest.mark.parametrize("ste", ["poly", "clip", "tanh", "identity"])
def test_gradients_are_those_of_the_surrogate(ste):
    """Of the map, times alpha sign(w); of the latents, clipped, alpha as a constant."""
    torch.manual_seed(0)
    conv = BinaryConv2d(3, 4, 1)
    use_surrogate(conv, ste)
    x = (1.5 * torch.randn(2, 3, 4, 4)).requires_grad_()
    with torch.no_grad():
        conv.weight[0, 0] = 1.5  # outside: no gradient
    grad = torch.randn(2, 4, 4, 4)
    conv(x).backward(grad)
    alpha = conv.weight.detach().abs().mean((1, 2, 3))
    scaled = grad * alpha.view(-1, 1, 1)
    back = F.conv_transpose2d(scaled, signs(conv.weight.detach()))
    z = x.detach()
    slope = {
        "poly": (2 - 2 * z.abs()).clamp(min=0),
        "clip": (z.abs() <= 1).float(),
        "tanh": 2 * (1 - torch.tanh(2 * z) ** 2),
        "identity": torch.ones_like(z),
    }[ste]
    torch.testing.assert_close(x.grad, back * slope, rtol=1e-4, atol=1e-5)
    wanted = torch.einsum("nohw,nihw->oi", scaled, signs(z))
    inside = (conv.weight.detach().abs() <= 1).squeeze()
    torch.testing.assert_close(conv.weight.grad.squeeze(), wanted * inside, rtol=1e-4, atol=1e-5)
    assert conv.weight.grad[0, 0] == 0
    with pytest.raises(ValueError, match="ste: expected one of poly"):
        use_surrogate(conv, "relu")


def test_1_bit_weights_on_real_maps():
    """BNAS: the released networks' weights are signs, with one scale for a layer."""
    torch.manual_seed(0)
    genotype = Genotype.published("BNAS_XNOR_1")
    network = trained(Network(genotype, in_channels=1, classes=3, channels=4, cells=3))
    x = torch.rand(3, 1, 8, 8)
    expected = network(x)
    signed = copy.deepcopy(network)
    with torch.no_grad():
        for weight in latents(signed):
            weight.copy_(signs(weight) * weight.abs().mean())  # the same signs and mean
    torch.testing.assert_close(signed(x), expected)
    plain = genotype.model_copy(
        update={"options": genotype.options.changed({"weights": "float", "preprocess": "full"})}
    )
    real = Network(plain, in_channels=1, classes=3, channels=4, cells=3).eval()
    real.load_state_dict(signed.state_dict())
    assert not list(latents(real))
    torch.testing.assert_close(real(x), expected)
    expected.sum().backward()
    assert all(weight.grad is not None for weight in latents(network))


def test_latents_stay_within_one():
    network = Network(random_genotype(), in_channels=1, classes=3, channels=4, cells=3)
    weights = list(latents(network))
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(50)
    clamp_latents(weights)
    assert max(weight.abs().max() for weight in weights) == 1
    assert network.stem.weight.abs().max() > 1
    clamp_latents([])


# -- Packed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "layout"),
    [
        ("binary8", {}, torch.channels_last),
        ("binary8", {"pre_bn": True, "alpha": "none"}, torch.contiguous_format),
        ("binary8-dense", {"alpha": "layer", "pad": "plus_one"}, torch.contiguous_format),
        ("binary8-dense", {"pre_bn": True}, torch.channels_last),
    ],
)
def test_packed_logits_are_those_of_the_network(name, options, layout):
    """Bit for bit, at any batch, after a copy."""
    genotype = random_genotype(name, **options)
    network = Network(genotype, in_channels=1, classes=10, channels=6, cells=3)
    network = trained(network.to(memory_format=layout), size=9)
    packed = copy.deepcopy(pack(network))
    kinds = {type(module) for module in packed.modules()}
    assert kinds & {PackedConvBN, PackedSepConv}
    assert not kinds & {BinaryConv2d, BinaryDepthwiseConv2d, BinarySepConv, BinaryConvBN}
    assert not list(latents(packed))
    for count in (1, 7):
        x = torch.rand(count, 1, 9, 9).contiguous(memory_format=layout)
        expected = network(x).detach()
        assert torch.equal(packed(x), expected)
        with torch.inference_mode():
            assert torch.equal(packed(x), expected)
    assert expected.std() > 0


def test_the_packed_network_of_kim():
    genotype = Genotype.published("BNAS_A_KIM")
    network = trained(Network(genotype, in_channels=1, classes=3, channels=4, cells=4), size=7)
    x = torch.rand(3, 1, 7, 7)
    assert torch.equal(pack(network)(x), network(x).detach())


def test_a_node_is_packed_once(monkeypatch):
    network = trained(Network(everywhere("bin_sep_conv_3x3"), in_channels=1, classes=3, channels=4))
    packed, calls = pack(network), []
    real = ops.pack_sign
    monkeypatch.setattr(signs_module.ops, "pack_sign", lambda x: calls.append(x.shape) or real(x))
    packed(torch.rand(2, 1, 8, 8))
    # Of each cell nodes 0 to 4; the stem's map; and of each cell but the last its last node, which
    # both cells after it read.
    assert len(calls) == 6 * 5 + 1 + 5


@pytest.mark.parametrize(
    "widths", [(64, 128), (16,) * 5, (4,) * 4, (3, 5), (16, 32), (20,) * 4, (7,)]
)
def test_bits_of_maps_side_by_side_are_those_of_one_map(widths):
    """Also where bits, not numbers, are put together."""
    torch.manual_seed(0)
    maps = [torch.randn(2, width, 3, 5) for width in widths]
    for shared in (False, True):
        with signs_module.shared_signs() if shared else contextlib.nullcontext():
            bits = signs_module.packed_signs(*maps)
        assert torch.equal(bits, ops.pack_sign(torch.cat(maps, 1)))


def test_words_stay_side_by_side_in_another_layout():
    """Else each call would copy the weights first."""
    layer = pack(BinarySepConv(3, 130).eval()).to(memory_format=torch.channels_last)
    assert layer.depthwise_bits.shape == (1, 3, 3, 3)
    assert layer.depthwise_bits.is_contiguous()
    x = torch.randn(2, 130, 5, 5)
    assert torch.equal(layer(x), pack(layer)(x))
    assert layer.to_empty(device="cpu").depthwise_bits.is_contiguous()


@pytest.mark.parametrize("inference", [False, True])
def test_a_written_map_is_packed_again(inference):
    """A caller's buffer, read anew at each call; within a network a map that changed."""
    with torch.inference_mode(inference):
        packed, x = BinaryConv2d(3, 4, 1).freeze(), torch.randn(1, 3, 2, 2)
        first = packed(x)
        for write in (lambda: x.neg_(), lambda: x.data.neg_()):
            write()
            assert torch.equal(packed(x), -first)
            write()
            assert torch.equal(packed(x), first)
    with signs_module.shared_signs():
        x = torch.randn(1, 3, 2, 2)
        bits = signs_module.packed_signs(x)
        assert signs_module.packed_signs(x) is bits
        x.neg_()
        assert torch.equal(signs_module.packed_signs(x), ops.pack_sign(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_of_the_weights_is_seen_at_once(frozen, mode):
    """Nothing of the layer is kept from one call to the next; a packed copy keeps what it had."""
    layer = BinarySepConv(3, 4)
    layer(torch.randn(5, 4, 6, 6))
    layer.eval()
    if frozen:
        freeze(layer)
    x = torch.randn(2, 4, 6, 6)
    packed, before = pack(layer), layer(x).detach()
    assert torch.equal(packed(x), before)
    changes = (
        lambda: layer.pointwise.weight.neg_(),
        lambda: layer.depthwise.weight.data.neg_(),
        lambda: layer.bn1.running_mean.add_(3),
        lambda: layer.bn2.weight.mul_(-2),
        lambda: setattr(layer.pointwise, "weight", nn.Parameter(torch.randn(4, 4, 1, 1))),
    )
    for change in changes:
        with torch.no_grad():
            change()
        with mode():
            after = layer(x).clone()
        assert not torch.equal(after, before)
        assert torch.equal(pack(layer)(x), after)
        assert torch.equal(packed(x), packed(x.clone()))
        before = after


@pytest.mark.parametrize("options", [{}, {"pre_bn": True}])
def test_what_is_packed_refuses_a_gradient(options):
    options = OperationOptions(**options)
    x = torch.randn(2, 4, 5, 5)
    for layer in (
        BinaryConv2d(4, 5, 3, options=options),
        BinaryDepthwiseConv2d(4, 3, options=options),
        BinaryConvBN(4, 5, options=options),
        BinarySepConv(3, 4, options=options),
    ):
        layer(x)
        packed = layer.freeze()
        assert torch.equal(packed(x), layer.eval()(x).detach())
        assert not packed(x).requires_grad
        leaf = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=r"^Packed\w+: expected an input without gradient"):
            packed(leaf)
        with torch.no_grad():
            assert torch.equal(packed(leaf), packed(x))
        with pytest.raises(RuntimeError, match="expected evaluation mode"):
            packed.train()(x)
    network = pack(trained(Network(random_genotype(), in_channels=1, classes=3, channels=4)))
    with pytest.raises(RuntimeError, match="expected an input without gradient"):
        network(torch.rand(2, 1, 8, 8, requires_grad=True))


def test_lone_layers_are_packed():
    """By themselves, in a module of the user's, and one that stands at two places."""
    layer = BinaryConv2d(4, 4, 3)
    once = pack(layer)
    assert type(once) is PackedConv2d
    stack = nn.Sequential(layer, BatchNorm2d(4), nn.Sequential(layer, BinaryConvBN(4, 4))).eval()
    packed, x = pack(stack), torch.randn(2, 4, 6, 6)
    assert [type(one) for one in packed] == [PackedConv2d, BatchNorm2d, nn.Sequential]
    assert packed[0] is packed[2][0]
    assert type(packed[2][1]) is PackedConvBN
    assert torch.equal(packed(x), stack(x).detach())
    assert type(stack[0]) is BinaryConv2d
    use_full_precision(layer, True)
    with pytest.raises(RuntimeError, match="expected the child"):
        layer.freeze()


def test_what_is_attached_to_a_layer_acts():
    """A hook, a replaced norm, a class of the user's: in evaluation, and where it is packed."""

    class Own(BinaryConvBN):
        def forward(self, x):
            return -super().forward(x)

    def doubled(module, args, y):
        return 2 * y

    x = torch.randn(2, 4, 6, 6)
    for kind in ("block", "norm hook", "conv hook", "norm", "class"):
        block = Own(4, 4) if kind == "class" else BinaryConvBN(4, 4)
        conv, norm = copy.deepcopy(block.conv).eval(), copy.deepcopy(block.bn).eval()
        if kind == "norm":
            block.bn = norm = nn.GroupNorm(1, 4)
        if kind in ("block", "norm hook", "conv hook"):
            hooked = {"block": block, "norm hook": block.bn, "conv hook": block.conv}[kind]
            hooked.register_forward_hook(doubled)
        sums = conv(x) * (2 if kind == "conv hook" else 1)
        expected = norm(sums) * {"block": 2, "norm hook": 2, "class": -1}.get(kind, 1)
        block.eval()
        torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(pack(nn.Sequential(block))(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"pre_bn": True, "alpha": "none"}])
def test_half_precision_and_autocast(dtype, options):
    """Packed as it is, under autocast, of a map and of a network in that precision."""
    genotype = random_genotype(**options)
    network = trained(Network(genotype, in_channels=1, classes=3, channels=4, cells=3))
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            expected = network(x)
            assert torch.equal(pack(network)(x), expected)
        half = copy.deepcopy(network).to(dtype)
        y = half(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(pack(half)(x.to(dtype)), y)
        assert pack(network).to(dtype)(x.to(dtype)).dtype == dtype
    # Sums past 256 and 2,048 are no numbers of these types; batch norm is of the sums themselves.
    layer = BinaryConvBN(4097, 2)
    layer(torch.randn(2, 4097, 2, 2))
    layer.eval()
    map_ = torch.randn(2, 4097, 2, 2).to(dtype)
    expected = layer(map_.float())
    assert torch.equal(layer(map_), expected.to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(map_.float()), expected.to(dtype))
        assert torch.equal(layer.freeze()(map_), expected.to(dtype))


def test_layers_take_the_short_way(monkeypatch):
    """No public checks of a map of the usual form; one that does not fit is refused by name."""

    def refused(*args, **kwargs):
        raise AssertionError("the long way")

    layers = [BinaryConv2d(4, 5, 3), BinaryDepthwiseConv2d(4, 5, 2), BinarySepConv(3, 4)]
    x = torch.randn(2, 4, 6, 6)
    for layer in layers:
        layer(x)
        packed = layer.eval().freeze()
        with monkeypatch.context() as patched:
            patched.setattr(binary_ste, "_check", refused)
            if "cpu" in _native.served:
                patched.setattr(binary_conv2d, "check_bits", refused)
            for map_ in (x, x.clone().requires_grad_()):
                assert layer(map_).requires_grad
            with torch.no_grad():
                assert torch.equal(layer(x), packed(x))
        with pytest.raises(ValueError, match=r"binary_conv2d_ste: (weight|groups): expected"):
            layer(torch.randn(2, 5, 6, 6))
        with pytest.raises(TypeError, match="binary_conv2d_ste: x: expected float32"):
            layer(torch.ones(2, 4, 6, 6).int())


# -- Two inputs -----------------------------------------------------------------------------------


def test_a_cell_reads_the_two_before_it():
    """Written out: the third cell takes the second as node 1 and the first as node 0."""
    torch.manual_seed(0)
    genotype = random_genotype()
    network = Network(genotype, in_channels=1, classes=3, channels=4, cells=3)
    assert network.reductions == (1, 2)
    assert network.cell_type == (0, 1, 1)
    x = torch.rand(2, 1, 9, 9)
    network.eval()
    stem = network.stem_bn(network.stem(network.normalize(x)))
    first = torch.cat(network.cells[0]([stem], 0.0, [stem]), 1)
    second = torch.cat(network.cells[1]([first], 0.0, [stem]), 1)
    third = torch.cat(network.cells[2]([second], 0.0, [first]), 1)
    assert (first.shape[1:], second.shape[1:], third.shape[1:]) == (
        (16, 9, 9), (32, 5, 5), (64, 3, 3),
    )  # fmt: skip
    torch.testing.assert_close(network(x), network.classifier(third.mean((2, 3))))
    # Node 0 of the third cell is the first cell at half its size.
    nodes = network.cells[2].preprocess0([first])
    assert nodes.shape == (2, 16, 5, 5)
    assert not torch.equal(
        torch.cat(network.cells[2]([second], 0.0, [torch.zeros_like(first)]), 1), third
    )


def test_a_supernet_has_both_kinds_of_cells():
    """Two cells would both halve the map, and half of the edges would have no cell."""
    for cells in (1, 2):
        with pytest.raises(ValueError, match="Supernet: cells: expected at least 3"):
            Supernet("binary8", in_channels=1, classes=3, channels=4, cells=cells)
        with pytest.raises(ValueError, match="cells: expected 3 or more"):
            space.get("binary8", cells=cells)
    assert space.get("binary8").least_cells == 3
    assert space.get("robust9").least_cells == 6
    for types in range(1, 6):
        shortest = space.get("binary8", cell_types=types).least_cells
        for cells in range(shortest, 9):
            net = Supernet(
                space.get("binary8", nodes=1, cell_types=types),
                in_channels=1, classes=3, channels=1, cells=cells,
            )  # fmt: skip
            assert set(net.cell_type) == set(range(types))


def test_supernet_and_network_of_two_inputs_agree():
    """The path of a supernet is the network of its genotype."""
    torch.manual_seed(0)
    searched = space.get("binary7")
    options = OperationOptions(preprocess="binary")
    supernet = Supernet(searched, in_channels=1, classes=3, channels=4, options=options)
    choice = torch.randint(7, (28,)).tolist()
    supernet.set_path(choice)
    genotype = Genotype.from_choices(searched, choice, options=options)
    network = Network(genotype, in_channels=1, classes=3, channels=4)
    weights = [p for p in supernet.path_parameters() if p.dim() > 1]
    own = dict(supernet.named_parameters())
    names = {id(p): name for name, p in own.items()}
    assert len({names[id(p)] for p in weights}) == len(weights)
    state, shared = {}, supernet.state_dict()
    for name in network.state_dict():
        parts = name.split(".")
        if "operations" in parts:
            cell, edge = int(parts[1]), int(parts[3])
            arm = choice[supernet.cell_type[cell] * 14 + edge]
            parts = ["cells", str(cell), "edges", str(edge), str(arm), *parts[4:]]
        state[name] = shared.get(".".join(parts))
    affine = {name for name, value in state.items() if value is None}
    assert all(name.endswith(("weight", "bias")) for name in affine)  # of batch norms
    network.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(supernet.eval()(x), network.eval()(x))
    supernet.train()(x).sum().backward()
    assert all(p.grad is not None for p in supernet.path_parameters())
    assert sum(p.grad is not None for p in supernet.parameters()) == len(
        list(supernet.path_parameters())
    )


def test_a_path_of_zeros_has_a_gradient():
    supernet = Supernet("binary8", in_channels=1, classes=3, channels=2)
    supernet.set_path([0] * 28)
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    logits = supernet(x)
    assert torch.equal(logits, supernet.classifier.bias.expand(2, 3))
    logits.sum().backward()
    assert not x.grad.any()
    with pytest.raises(ValueError, match="residual: expected False"):
        Supernet("binary8", in_channels=1, classes=3, channels=2, residual=True)
