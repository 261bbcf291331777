"""sign_ste and binary_conv2d_ste: exact signs, closed forms of gradients, two bits kept."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import ops

module = importlib.import_module("fastbandit.ops.binary_ste")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ESTIMATORS = ["poly", "clip", "tanh", "identity"]
SLOPES = {
    "poly": lambda x: (2 - 2 * x.abs()) * (x.abs() <= 1),
    "clip": lambda x: (x.abs() <= 1) * 1.0,
    "tanh": lambda x: 2 / (2 * x).cosh() ** 2,
    "identity": torch.ones_like,
}
# Both ends, what lies next to them, zeros.
POINTS = [-3.0, -1.0, -0.75, -0.5, -0.0, 0.0, 0.25, 0.5, 0.996, 1.0, 1.0079, 2.0, -1.0079]


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def surrogate(x: Tensor, ste: str) -> Tensor:
    """What the sign's gradient is the derivative of."""
    inner = x.clamp(-1, 1)
    return {
        "poly": lambda: inner * (2 - inner.abs()),
        "clip": lambda: inner,
        "tanh": lambda: (2 * x).tanh(),
        "identity": lambda: x,
    }[ste]()


def plain(x: Tensor, ste: str) -> Tensor:
    """The sign with a gradient, in the usual way of PyTorch."""
    smooth = surrogate(x, ste)
    return sign(x).detach() + smooth - smooth.detach()


# --- sign_ste -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ste", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_and_closed_forms(device, tolerance, dtype, ste):
    x = torch.tensor(POINTS, dtype=dtype, device=device)
    for shape in ((13,), (1, 13, 1, 1), (13, 1), (13, 1, 1), (1, 1, 13, 1)):
        leaf = x.view(shape).requires_grad_()
        y = ops.sign_ste(leaf, ste=ste)
        assert y.dtype == dtype
        assert torch.equal(y, sign(leaf))
        grad = torch.linspace(-1, 2, 13, device=device).to(dtype).view(shape)
        (got,) = torch.autograd.grad(y, leaf, grad)
        expected = (grad.double() * SLOPES[ste](leaf.detach().double())).to(dtype)
        if ste == "tanh":
            torch.testing.assert_close(got, expected, **tolerance(dtype))
        else:
            torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("ste", ESTIMATORS)
def test_many_channels_and_layouts(device, ste):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randint(-12, 13, (2, 70, 5, 3), device=device) / 8).contiguous(
            memory_format=layout
        )
        leaf = x.requires_grad_()
        y = ops.sign_ste(leaf, ste=ste)
        assert torch.equal(y, sign(x))
        assert y.is_contiguous(memory_format=layout)
        for grad in (
            torch.randn_like(y),
            torch.randn(2, 5, 3, 70, device=device).permute(0, 3, 1, 2),
        ):
            (got,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
            torch.testing.assert_close(got, grad * SLOPES[ste](x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_has_a_sign_and_no_gradient(device, dtype):
    """NaN is -1 and lies outside; ``identity`` alone looks at no value."""
    points = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0]
    for ste in ESTIMATORS:
        x = torch.tensor(points, device=device, dtype=dtype, requires_grad=True)
        y = ops.sign_ste(x, ste=ste)
        assert y.tolist() == [-1, 1, -1, 1, 1]
        y.sum().backward()
        assert x.grad.tolist()[:3] == ([1, 1, 1] if ste == "identity" else [0, 0, 0])
        assert (x.grad[3:] > 0).all()

        def function(x: Tensor, ste: str = ste) -> Tensor:
            return ops.sign_ste(x, ste=ste)

        # In torch's operations: the same signs, and 0 for every estimator.
        x = x.detach()
        y, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        assert y.tolist() == [-1, 1, -1, 1, 1]
        assert tangent.tolist()[:3] == [0, 0, 0]
        y, back = torch.func.vjp(function, x)
        assert y.tolist() == [-1, 1, -1, 1, 1]
        assert back(torch.ones_like(x))[0].tolist()[:3] == [0, 0, 0]


@pytest.mark.parametrize("ste", ESTIMATORS)
def test_what_is_not_finite_in_an_exported_program(ste):
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return ops.sign_ste(x, ste=ste), ops.binary_conv2d_ste(x, weight, ste=ste)

    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 2.0, -2.0]).view(1, 6, 1, 1)
    weight = torch.randn(3, 6, 1, 1)
    weight[0, 0] = 0.0
    program = torch.export.export(Layer(), (x, weight), strict=False).module()
    for one, other in zip(program(x, weight), Layer()(x, weight), strict=True):
        assert other.isfinite().all()
        assert torch.equal(one, other)


# --- what is kept for backward --------------------------------------------------------------------


def kept(call: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return found


def bits_of(tensors: list[Tensor], but: tuple[Tensor, ...]) -> int:
    """Bits of memory behind ``tensors``, without that of ``but``."""
    known = {t.untyped_storage().data_ptr() for t in but}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return 8 * sum(size for place, size in new.items() if place not in known)


def test_bits_that_are_kept_for_each_value(device):
    x = torch.randn(2, 128, 6, 6, device=device, requires_grad=True)
    weight = torch.randn(8, 128, 3, 3, device=device, requires_grad=True)
    deep = torch.randn(128, 1, 3, 3, device=device, requires_grad=True)
    values = x.numel()
    # Bits for the gradients of both, of the map alone, of the weight alone; x itself for the map.
    for ste, both, of_x, itself in (
        ("clip", 2, 1, False),
        ("identity", 1, 0, False),
        ("poly", 0, 0, True),
        ("tanh", 0, 0, True),
    ):
        for w, groups in ((weight, 1), (deep, 128)):
            for map_, filters, most in (
                (x, w, both),
                (x, w.detach(), of_x),
                (x.detach(), w, 1),
            ):
                found = kept(
                    lambda m=map_, f=filters, s=ste, g=groups: ops.binary_conv2d_ste(
                        m, f, padding=1, groups=g, ste=s
                    )
                )
                # What is kept beside the arguments is bits.
                assert bits_of(found, (x, w)) == most * values
                assert any(t.data_ptr() == x.data_ptr() for t in found) is (
                    itself and map_.requires_grad
                )
        assert bits_of(kept(lambda s=ste: ops.sign_ste(x, ste=s)), (x,)) == of_x * values


def test_without_a_gradient_no_mask_is_made(device, monkeypatch):
    """A map's signs are packed for the product, and nothing else is."""
    calls: list[Any] = []
    real = module.kept_of
    for place in (module, importlib.import_module("fastbandit.ops.sign_ste")):
        monkeypatch.setattr(place, "kept_of", lambda *a: calls.append(a[1]) or real(*a))
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    weight = torch.randn(4, 8, 1, 1, device=device, requires_grad=True)
    with torch.no_grad():
        ops.binary_conv2d_ste(x, weight, ste="clip")
        ops.sign_ste(x, ste="clip")
    ops.binary_conv2d_ste(x.detach(), weight, ste="clip")
    ops.sign_ste(x.detach(), ste="clip")
    assert calls == []
    ops.binary_conv2d_ste(x, weight, ste="clip")
    ops.sign_ste(x, ste="clip")
    assert calls == ["clip", "clip"]


# --- binary_conv2d_ste ----------------------------------------------------------------------------

# N, C, C_out, H, W, k, stride, padding, dilation, depthwise, pad
CASES = [
    (2, 6, 5, 7, 6, 3, 1, 1, 1, False, "zero"),
    (1, 70, 9, 5, 8, 3, 2, 2, 2, False, "plus_one"),
    (2, 5, 5, 8, 6, 5, (1, 2), (4, 2), (2, 1), True, "zero"),
    (1, 6, 6, 6, 6, 3, 1, 1, 1, True, "plus_one"),
    (2, 8, 12, 4, 4, 1, 1, 0, 1, False, "zero"),
    (2, 1, 3, 4, 5, 3, 1, 1, 1, False, "zero"),
]


def made(case: Any, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    n, channels, filters, h, w, k, stride, padding, dilation, depthwise, pad = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, h, w, generator=generator, dtype=torch.float64)
    shape = (filters, 1 if depthwise else channels, k, k)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "pad": pad}
    settings["groups"] = channels if depthwise else 1
    leaves = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    return (*leaves, settings)


def scale_of(weight: Tensor, alpha: str) -> Tensor:
    if alpha == "none":
        return torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    if alpha == "layer":
        return weight.abs().mean().expand(len(weight))
    return weight.abs().mean((1, 2, 3))


def twin(
    x: Tensor, weight: Tensor, settings: dict[str, Any], alpha: str, ste: str, weight_ste: str
) -> Tensor:
    """The op in the usual way of PyTorch."""
    settings = dict(settings)
    signs = plain(x, ste)
    scale = scale_of(weight, alpha)
    if weight_ste != "scaled":
        scale = scale.detach()
    binary = plain(weight, "identity" if weight_ste == "identity" else "clip")
    filters = scale.view(-1, 1, 1, 1) * binary
    if settings.pop("pad") == "plus_one":
        p = settings["padding"]
        rows, columns = (p, p) if isinstance(p, int) else p
        settings["padding"] = 0
        signs = F.pad(signs, (columns, columns, rows, rows), value=1.0)
    return F.conv2d(signs, filters, None, **settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(device, case):
    x, weight, settings = made(case, torch.float64, device)
    for alpha, ste, weight_ste in (
        ("filter", "poly", "clip"),
        ("layer", "clip", "scaled"),
        ("filter", "tanh", "scaled"),
        ("none", "identity", "identity"),
    ):
        estimators = {"alpha": alpha, "ste": ste, "weight_ste": weight_ste}
        y = ops.binary_conv2d_ste(x, weight, **settings, **estimators)
        expected = twin(x, weight, settings, **estimators)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(expected)
        got = torch.autograd.grad(y, (x, weight), grad)
        for one, other in zip(got, torch.autograd.grad(expected, (x, weight), grad), strict=True):
            torch.testing.assert_close(one, other)
        # One of the two alone: the same bits, but for PyTorch's own convolution, of which the
        # reference is made: it may take another algorithm for one gradient than for both.
        bits = {} if os.environ.get("FASTBANDIT_BACKEND") == "reference" else {"rtol": 0, "atol": 0}
        (alone,) = torch.autograd.grad(
            ops.binary_conv2d_ste(x.detach(), weight, **settings, **estimators), weight, grad
        )
        torch.testing.assert_close(alone, got[1], **bits)
        (alone,) = torch.autograd.grad(
            ops.binary_conv2d_ste(x, weight.detach(), **settings, **estimators), x, grad
        )
        torch.testing.assert_close(alone, got[0], **bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_the_packed_convolution(device, dtype, case):
    """The contract between training and evaluation."""
    x, weight, settings = made(case, dtype, device)
    weight = weight.detach().float() if dtype != torch.float64 else weight.detach()
    for alpha in ("filter", "layer", "none"):
        y = ops.binary_conv2d_ste(x, weight, alpha=alpha, **settings)
        assert y.dtype == dtype
        assert y.requires_grad
        turned = weight if settings["groups"] == 1 else weight.transpose(0, 1)
        packed = ops.binary_conv2d(
            ops.pack_sign(x.detach()),
            ops.pack_sign(turned),
            x.shape[1],
            kernel_size=weight.shape[2],
            scale=None if alpha == "none" else scale_of(weight, alpha).contiguous(),
            out_dtype=dtype,
            **settings,
        )
        assert torch.equal(y, packed)
        with torch.no_grad():
            assert torch.equal(ops.binary_conv2d_ste(x, weight, alpha=alpha, **settings), y)


@pytest.mark.parametrize("ste", ESTIMATORS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_gradcheck_of_the_surrogate(ste, depthwise):
    """With the sign replaced by what its gradient is the derivative of, numbers agree."""
    torch.manual_seed(1)
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64).mul(1.8).sub(0.9).requires_grad_()
    shape = (3, 1, 3, 3) if depthwise else (2, 3, 3, 3)
    weight = torch.rand(shape, dtype=torch.float64).mul(1.8).sub(0.9).requires_grad_()
    groups = 3 if depthwise else 1

    def smooth(x: Tensor, weight: Tensor) -> Tensor:
        filters = scale_of(weight, "filter").view(-1, 1, 1, 1) * weight
        return F.conv2d(surrogate(x, ste), filters, None, 1, 1, 1, groups)

    assert torch.autograd.gradcheck(smooth, (x, weight))
    # That derivative by x is what the op has, but with signs in place of weights.
    grad = torch.randn(1, 3 if depthwise else 2, 4, 4, dtype=torch.float64)
    y = ops.binary_conv2d_ste(x, weight, padding=1, groups=groups, ste=ste)
    (got,) = torch.autograd.grad(y, x, grad)
    filters = scale_of(weight, "filter").view(-1, 1, 1, 1) * sign(weight)
    (expected,) = torch.autograd.grad(
        F.conv2d(surrogate(x, ste), filters.detach(), None, 1, 1, 1, groups), x, grad
    )
    torch.testing.assert_close(got, expected)


def test_autocast_keeps_the_signs_of_small_values(device):
    x = torch.tensor([1e-30, -1e-30], device=device).view(1, 2, 1, 1).requires_grad_()
    weight = torch.tensor([[1.0, 1.0], [1e-30, -1e-30]], device=device).view(2, 2, 1, 1)
    with torch.autocast(device.type, torch.float16):
        y = ops.binary_conv2d_ste(x, weight, alpha="none")
    assert y.dtype == torch.float16
    assert y.flatten().tolist() == [0, 2]
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_empty_batches(device):
    x = torch.empty(0, 6, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, device=device, requires_grad=True)
    y = ops.binary_conv2d_ste(x, weight, ste="clip")
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert ops.sign_ste(x, ste="clip").shape == x.shape
    assert ops.sign_ste(torch.empty(3, 0), ste="clip").shape == (3, 0)


def test_opcheck():
    x = torch.randn(2, 6, 5, 4, requires_grad=True)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for ste in ("poly", "clip"):
        torch.library.opcheck(torch.ops.fastbandit.sign_ste.default, (x, ste), test_utils=quick)
    weight = torch.randn(6, 1, 3, 3, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastbandit.binary_conv2d_ste.default,
        (x, weight, [1, 2], [1, 0], [1, 1], 6, "filter", "clip", "clip", False, torch.float32),
    )


def test_compile():
    torch._dynamo.reset()

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return ops.binary_conv2d_ste(ops.sign_ste(x, ste="clip") + x, weight, padding=1) * 2

    x, weight, _ = made(CASES[0], torch.float32, "cpu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x, weight), layer(x, weight), strict=True):
        assert torch.equal(one, other)
    grads = [torch.autograd.grad(f(x, weight).sin().sum(), (x, weight)) for f in (compiled, layer)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_errors():
    x, weight, _ = made(CASES[0], torch.float32, "cpu")
    for error, message, call in [
        (TypeError, "sign_ste: x: expected a tensor", lambda: ops.sign_ste(1.0)),
        (TypeError, "sign_ste: x: expected float32", lambda: ops.sign_ste(torch.ones(2).int())),
        (ValueError, "sign_ste: ste: expected one of poly, clip, tanh, identity, got 'hard'",
         lambda: ops.sign_ste(x, ste="hard")),
        (ValueError, "binary_conv2d_ste: weight: expected shape .C_out, 6, kh, kw.",
         lambda: ops.binary_conv2d_ste(x, weight[:, :5])),
        (ValueError, "binary_conv2d_ste: weight: expected shape .6, 1, kh, kw.",
         lambda: ops.binary_conv2d_ste(x, weight, groups=6)),
        (ValueError, "binary_conv2d_ste: groups: expected 1 or",
         lambda: ops.binary_conv2d_ste(x, weight, groups=3)),
        (TypeError, "binary_conv2d_ste: weight: expected torch.float32",
         lambda: ops.binary_conv2d_ste(x, weight.double())),
        (ValueError, "binary_conv2d_ste: alpha: expected one of filter, layer, none",
         lambda: ops.binary_conv2d_ste(x, weight, alpha="mean")),
        (ValueError, "binary_conv2d_ste: weight_ste: expected one of clip, scaled, identity",
         lambda: ops.binary_conv2d_ste(x, weight, weight_ste="poly")),
        (ValueError, "binary_conv2d_ste: pad: expected",
         lambda: ops.binary_conv2d_ste(x, weight, pad="one")),
        (ValueError, "binary_conv2d_ste: x: expected at least the extent",
         lambda: ops.binary_conv2d_ste(x, weight, dilation=9)),
        (RuntimeError, "binary_conv2d_ste: expected a backward pass without create_graph",
         lambda: torch.autograd.grad(ops.binary_conv2d_ste(x, weight).sum(), x, create_graph=True)),
        (RuntimeError, "sign_ste: expected a backward pass without create_graph",
         lambda: torch.autograd.grad(ops.sign_ste(x).sum(), x, create_graph=True)),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
