"""fastbandit.nn, its layers: normalisation, batch norm, Gabor, denoising, halving."""

from __future__ import annotations

import copy
import importlib
import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbandit.nn.blocks import DepthwiseConv2d, DilatedConv2d, ReluConvBN, conv_weight, halve
from fastbandit.nn.denoise import Denoise, DenoiseBlock
from fastbandit.nn.frozen import FrozenBatchNorm, freeze
from fastbandit.nn.gabor import Gabor, GaborBlock
from fastbandit.nn.norm import BatchNorm2d, Normalize, reset_running_stats, use_cumulative_average
from fastbandit.nn.operations import make
from fastbandit.operations import DenoiseKind, GaborKind

blocks = importlib.import_module("fastbandit.ops.conv_block")

# -- Normalize ------------------------------------------------------------------------------------


def test_normalize_by_hand(device):
    layer = Normalize(2, mean=(0.5, 0.25), std=(0.5, 0.25)).to(device)
    x = torch.tensor([[[[1.0]], [[0.0]]]], device=device)
    assert layer(x).flatten().tolist() == [1.0, -1.0]
    assert torch.equal(Normalize(2).to(device)(x), x)
    assert set(Normalize(3, 0.1, 0.2).state_dict()) == {"mean", "std"}


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_normalize_refuses(std):
    with pytest.raises(ValueError, match="std: expected positive finite"):
        Normalize(1, 0.0, std)
    with pytest.raises(ValueError, match="mean: expected 1 number or 3, got 2"):
        Normalize(3, (0.0, 0.0))
    with pytest.raises(ValueError, match="mean: expected finite"):
        Normalize(1, math.nan)


# -- BatchNorm2d ----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_that_of_torch(momentum, affine, device, tolerance):
    ours = BatchNorm2d(3, affine=affine, momentum=momentum).to(device)
    theirs = nn.BatchNorm2d(3, affine=affine, momentum=momentum).to(device)
    for step in range(4):
        x = torch.randn(4, 3, 2, 5, device=device) * (step + 1)
        torch.testing.assert_close(ours(x), theirs(x), **tolerance(x.dtype))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **tolerance(x.dtype))
    torch.testing.assert_close(ours.running_var, theirs.running_var, **tolerance(x.dtype))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **tolerance(x.dtype))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    if momentum is None:
        assert ours.state_dict()["num_batches_tracked"] == 4
        restored = nn.BatchNorm2d(3, affine=affine, momentum=None)
        restored.load_state_dict(ours.state_dict())
        assert restored.num_batches_tracked == 4


def test_batch_norm_without_tracking_uses_the_batch_and_keeps_its_memory():
    """What an attack in training mode relies on."""
    layer = BatchNorm2d(3, momentum=None)
    layer(torch.randn(8, 3, 4, 4))
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    x = torch.randn(8, 3, 4, 4) * 5 + 1
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(layer(x), expected)
    layer.track_running_stats = True
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    # The next batch is the second one, not the third.
    layer(x)
    assert layer.batches == 2


def test_batch_norm_reset_starts_again():
    layer = BatchNorm2d(2, momentum=None)
    for _ in range(3):
        layer(torch.randn(8, 2, 4, 4) + 10)
    reset_running_stats([nn.Identity(), layer])
    x = torch.randn(8, 2, 4, 4)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_batch_norm_counts_survive_copies_and_loading():
    layer = BatchNorm2d(2, momentum=None)
    batches = [torch.randn(8, 2, 4, 4) for _ in range(4)]
    for x in batches[:3]:
        layer(x)
    loaded = BatchNorm2d(2, momentum=None)
    loaded.load_state_dict(layer.state_dict())
    for twin in (loaded, copy.deepcopy(layer)):
        twin(batches[3])
        torch.testing.assert_close(
            twin.running_mean, torch.stack(batches).mean((0, 1, 3, 4)), rtol=1e-5, atol=1e-6
        )


def test_use_cumulative_average():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(BatchNorm2d(2)))
    use_cumulative_average(model)
    assert model[1][0].momentum is None


def test_batch_norm_refuses_a_single_value():
    with pytest.raises(ValueError, match=r"more than one value .* shape \(1, 3, 1, 1\)"):
        BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    assert BatchNorm2d(3).eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


# -- Convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (5, 2), (7, 2)])
def test_convolutions_are_relu_then_conv2d(kernel_size, dilation, stride, device, tolerance):
    x = torch.randn(2, 3, 7, 6, device=device)
    for layer, groups in (
        (DepthwiseConv2d(3, kernel_size, stride, dilation), 3),
        (DilatedConv2d(3, kernel_size, stride, dilation), 1),
    ):
        layer.to(device)
        padding = dilation * (kernel_size - 1) // 2
        expected = F.conv2d(x.relu(), layer.weight, None, stride, padding, dilation, groups)
        torch.testing.assert_close(layer(x), expected, **tolerance(x.dtype))


def shared_block(kind, affine):
    torch.manual_seed(3)
    if kind == "several maps":
        block = ReluConvBN(12, 6, affine)
        return block, [torch.randn(3, 4, 6, 5) for _ in range(3)]
    block = make({"dilated": "dil_conv_3x3", "twice": "sep_conv_m_3x3"}[kind], 6, 2, affine)
    return block, torch.randn(3, 6, 7, 5)


def laid_out(x, layout):
    if isinstance(x, list):
        return [laid_out(part, layout) for part in x]
    return x.detach().contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("state", ["path", "momentum", "untracked", "evaluation", "frozen"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["several maps", "dilated", "twice"])
def test_a_block_in_one_op_is_the_block_layer_by_layer(kind, affine, state, monkeypatch):
    block, x = shared_block(kind, affine)
    norms = [layer for layer in block.modules() if isinstance(layer, BatchNorm2d)]
    for norm in norms:
        if affine:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias)
        if state == "path":
            norm.momentum = None
            norm.reset_running_stats()
        norm.track_running_stats = state != "untracked"
    block(laid_out(x, torch.contiguous_format))  # other running statistics than the first ones
    if state in ("evaluation", "frozen"):
        block.eval()
    results = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(blocks, "serves", lambda *_: False)
        copied = copy.deepcopy(block)
        if state == "frozen":
            copied = freeze(copied)
            for norm in copied.modules():
                if isinstance(norm, FrozenBatchNorm):  # no gradient goes to its parameters
                    norm.requires_grad_(False)
        inputs = laid_out(x, torch.channels_last)
        y = copied(inputs)
        wanted = [*(inputs if isinstance(inputs, list) else [inputs]), *copied.parameters()]
        wanted = [tensor for tensor in wanted if tensor.requires_grad]
        gradients = torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view(y.shape))
        results.append((y, *gradients, *copied.buffers()))
        assert [n.batches for n in copied.modules() if isinstance(n, BatchNorm2d)] == (
            [2] * len(norms) if state == "path" else [0] * (0 if state == "frozen" else len(norms))
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def test_a_block_asks_a_norm_it_does_not_know():
    class Twice(nn.BatchNorm2d):
        def forward(self, x):
            return 2.0 * super().forward(x)

    block, x = shared_block("dilated", True)
    x = laid_out(x, torch.channels_last)
    expected = 2.0 * block(x)
    block.bn = Twice(6)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_block_follows_its_weight():
    block, x = shared_block("dilated", True)
    block = freeze(block.eval()).requires_grad_(False)
    x = laid_out(x, torch.channels_last)
    before = block(x)
    block.pointwise.neg_()
    after = block(x)
    shift = block.bn.fold(block.pointwise)[1].view(1, -1, 1, 1)
    torch.testing.assert_close(after - shift, shift - before, rtol=1e-5, atol=1e-5)


def test_weights_start_as_those_of_torch():
    torch.manual_seed(0)
    ours = conv_weight(8, 4, 3)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, nn.Conv2d(4, 8, 3, bias=False).weight, rtol=0, atol=0)


# -- Gabor ----------------------------------------------------------------------------------------


def dense_gabor(layer: Gabor, x: torch.Tensor) -> torch.Tensor:
    """The bank written out pixel by pixel as a C_out x C_in x k x k weight, for tests only."""
    theta, sigma, gamma, wavelength, psi = layer.filter_parameters()
    half = layer.kernel_size // 2
    rows = []
    for row in range(-half, half + 1):
        columns = []
        for column in range(-half, half + 1):
            across = row * theta.cos() + column * theta.sin()
            along = -row * theta.sin() + column * theta.cos()
            columns.append(
                torch.exp(-(across**2 + gamma**2 * along**2) / (2 * sigma**2))
                * torch.cos(2 * math.pi * across / wavelength + psi)
            )
        rows.append(torch.stack(columns, dim=-1))
    bank = torch.stack(rows, dim=-2)  # [C_out, k, k]
    weight = bank[:, None].expand(-1, x.size(1), -1, -1)
    return F.conv2d(x, weight, padding=half)


@pytest.mark.parametrize("kind", get_args(GaborKind))
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_gabor_equals_the_dense_form(kind, kernel_size, device):
    torch.manual_seed(0)
    layer = Gabor(4, kind, kernel_size).double().to(device)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(2, 4, 5, 6, dtype=torch.float64, device=device)
    inputs = [x, *layer.parameters()]
    ours, dense = layer(x), dense_gabor(layer, x)
    torch.testing.assert_close(ours, dense)
    for name, a, b in zip(
        ["x", *dict(layer.named_parameters())],
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((dense * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("kind", "sigma", "wavelength"),
    [("pixels", (0.5, 1.5), (2.0, 6.0)), ("released", (0.1, 0.5), (0.001, 1.0))],
)
def test_gabor_parameters_stay_in_their_range(kind, sigma, wavelength):
    layer = Gabor(64, kind)
    for spread in (1.0, 20.0):
        with torch.no_grad():
            layer.sigma.mul_(spread)
            layer.wavelength.sub_(0.5).mul_(spread)
        _, s, _, w, _ = layer.filter_parameters()
        for values, (low, high) in ((s, sigma), (w, wavelength)):
            assert low <= values.min().item() <= values.max().item() <= high * (1 + 1e-6)


def test_gabor_parameters_learn():
    """Assigned through .data they would get no gradient and stay where they are."""
    torch.manual_seed(0)
    block = GaborBlock(8)
    nn.init.ones_(block.bn.weight)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in block.gabor.named_parameters()}
    assert set(before) == {"theta", "sigma", "wavelength", "gamma", "psi"}
    x, target = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
    first = F.mse_loss(block(x), target)
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(block(x), target)
        loss.backward()
        optimizer.step()
    assert loss < first
    for name, parameter in block.gabor.named_parameters():
        assert parameter.grad.abs().min() > 0, name
        assert not torch.equal(parameter, before[name]), name


def test_gabor_starts_as_stated():
    torch.manual_seed(0)
    layer = Gabor(20_000)
    for name, mean, deviation in (
        ("theta", 0.0, 1.0),
        ("sigma", 0.0, 1.0),
        ("wavelength", 0.5, 12**-0.5),
        ("psi", 0.0, 0.02),
    ):
        values = getattr(layer, name).detach()
        # Six standard errors.
        assert abs(values.mean() - mean) < 6 * deviation / 20_000**0.5, name
        assert abs(values.std() / deviation - 1) < 6 / 40_000**0.5, name
    assert not layer.gamma.any()


# -- Denoising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 20], ids=["channels x channels", "pixels x pixels"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dot_product_is_its_definition(channels, memory_format, device):
    """y_i = sum_j (x_i . x_j) x_j / (C H W), pixel by pixel, in both associations."""
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64, device=device)
    x = x.contiguous(memory_format=memory_format)
    pixels = x.flatten(2)
    expected = torch.zeros_like(pixels)
    for i in range(12):
        for j in range(12):
            weight = (pixels[:, :, i] * pixels[:, :, j]).sum(1, keepdim=True)
            expected[:, :, i] += weight * pixels[:, :, j] / (channels * 12)
    y = Denoise(channels)(x)
    torch.testing.assert_close(y, expected.view_as(y))
    assert y.is_contiguous(memory_format=memory_format)


def test_gaussian_is_its_definition(device):
    layer = Denoise(3, "gaussian").double().to(device)
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, device=device)
    pixels = x.flatten(2)
    theta, phi = layer.theta.flatten(1), layer.phi.flatten(1)
    logits = (theta @ pixels).transpose(1, 2) @ (phi @ pixels) / math.sqrt(3)
    expected = pixels @ logits.softmax(-1).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected.view_as(x))


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_local_denoising_by_hand(kind, device):
    x = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0], [7.0, 8.0, 3.0]], device=device)
    y = Denoise(1, kind)(x.view(1, 1, 3, 3)).view(3, 3)
    assert y[1, 1] == 5.0
    # Corner: the mean of the four pixels there are; the median with the edge repeated,
    # 1 1 1 1 2 2 4 4 5.
    assert y[0, 0] == (3.0 if kind == "mean" else 2.0)


def test_denoising_kinds_differ_and_unknown_is_refused():
    x = torch.randn(2, 4, 5, 5)
    outputs = [Denoise(4, kind)(x) for kind in get_args(DenoiseKind)]
    for i, a in enumerate(outputs):
        assert all(not torch.allclose(a, b) for b in outputs[:i])
    with pytest.raises(ValueError, match="expected one of dot, gaussian, mean, median, got 'max'"):
        Denoise(4, "max")
    with pytest.raises(ValueError, match="expected one of pixels, released, got 'dense'"):
        Gabor(4, "dense")


def test_the_1x1_convolution_comes_before_the_batch_norm():
    block = DenoiseBlock(4, conv=True)
    nn.init.ones_(block.bn.weight)
    x = torch.randn(3, 4, 5, 5)
    inner = F.conv2d(block.denoise(x), block.conv)
    expected = x + F.batch_norm(inner, None, None, training=True)
    torch.testing.assert_close(block(x), expected)


# -- Blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [GaborBlock, DenoiseBlock])
def test_blocks_start_as_the_identity(build, device):
    x = torch.randn(2, 4, 5, 6, device=device)
    assert torch.equal(build(4).to(device)(x), x)
    torch.testing.assert_close(build(4, stride=2).to(device)(x), halve(x))


def test_halve_keeps_the_corners(device):
    x = torch.randn(2, 3, 5, 8, device=device)
    y = halve(x)
    assert y.shape == (2, 3, 3, 4)
    torch.testing.assert_close(y[..., 0, 0], x[..., 0, 0])
    torch.testing.assert_close(y[..., -1, -1], x[..., -1, -1])
    torch.testing.assert_close(y[..., 1, 0], x[..., 2, 0])  # 5 rows to 3: every second row
    assert torch.equal(halve(x[..., :1, :1]), x[..., :1, :1])
