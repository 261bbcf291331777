"""conv_block: the numbers of its parts one by one, whichever way they come about."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _processes import run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastbandit import _native, ops
from fastbandit.ops.conv_block import serves

OP = torch.ops.fastbandit.conv_block.default
BACKWARD = torch.ops.fastbandit.conv_block_backward.default

# N, channels of each map, C_out, H, W, k of the depthwise convolution (0: none), stride.
CASES = [
    (3, (16,), 16, 7, 5, 3, 1),
    (2, (5, 3, 17), 9, 5, 6, 0, 1),
    (4, (8, 8, 8, 8), 8, 8, 8, 0, 1),
    (1, (33,), 70, 3, 4, 5, 2),
    (5, (2,), 1, 1, 1, 3, 1),
    (6, (64, 64), 48, 9, 9, 0, 1),
    (7, (24,), 40, 31, 17, 3, 1),  # many tiles and blocks, none of them full
    (33, (7,), 300, 2, 3, 1, 1),
]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
native = pytest.mark.skipif("cpu" not in _native.served, reason="a promise of the native kernel")


def make(case, normalize, *, dtype=torch.float32, device="cpu", layout=torch.channels_last):
    """Tensors by name, gradients wanted, and the settings."""
    n, channels, c_out, h, w, k, stride = case
    generator = torch.Generator().manual_seed(sum(channels) + h)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    c = sum(channels)
    tensors = {f"x{i}": draw(n, part, h, w) + 0.3 for i, part in enumerate(channels)}
    tensors = {name: x.contiguous(memory_format=layout) for name, x in tensors.items()}
    tensors["pointwise"] = draw(c_out, c, 1, 1)
    settings = {}
    if k:
        tensors["depthwise"] = draw(c, 1, k, k)
        settings = {"stride": stride, "padding": k // 2 * 2, "dilation": 2}
    if normalize:
        tensors["weight"] = draw(c_out) + 2.0
        settings["normalize"] = True
    tensors["bias"] = draw(c_out)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, settings


def split(tensors):
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("x")}
    return [tensor for name, tensor in tensors.items() if name.startswith("x")], rest


def block(tensors, settings, **more):
    xs, rest = split(tensors)
    return ops.conv_block(xs, rest.pop("pointwise"), **rest, **settings, **more)


def by_definition(tensors, settings):
    xs, rest = split(tensors)
    y = F.relu(torch.cat(xs, 1))
    if "depthwise" in rest:
        geometry = (settings["stride"], settings["padding"], settings["dilation"])
        y = F.conv2d(y, rest["depthwise"], None, *geometry, groups=y.shape[1])
    if "normalize" not in settings:
        return F.conv2d(y, rest["pointwise"], rest["bias"])
    y = F.conv2d(y, rest["pointwise"])
    return F.batch_norm(y, None, None, rest["weight"], rest["bias"], training=True)


def close(one: Tensor, other: Tensor, limit: float) -> None:
    """Relative to the largest value: sums in which the terms cancel have no digits of their own."""
    scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=limit * scale)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(device, case, layout, normalize):
    tensors, settings = make(case, normalize, device=device, layout=layout)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    y, expected = block(tensors, settings), by_definition(exact, settings)
    close(y, expected, 1e-5)
    assert y.is_contiguous(memory_format=layout)
    grad = torch.randn(y.shape, device=device)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad)
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), grad.double())
    for name, one, other in zip(tensors, gradients, expected_gradients, strict=True):
        assert one.shape == tensors[name].shape, name
        close(one, other, 2e-5)
    # Torch's are views of the gradient of what was put side by side.
    if serves(split(tensors)[0], tensors["pointwise"]):
        for name, one in zip(tensors, gradients, strict=True):
            assert one.is_contiguous(memory_format=layout) or not name.startswith("x")


@pytest.mark.parametrize("normalize", [False, True])
def test_by_hand(device, normalize):
    # Pixels (1, 3) and (0, 4) after the ReLU; outputs 1 - 6 = -5 and 0 - 8 = -8; 10 and 20 added.
    x = torch.tensor([1.0, -2.0, 3.0, 4.0], device=device).view(1, 2, 1, 2)
    pointwise = torch.tensor([[1.0, -2.0], [0.0, 1.0]], device=device).view(2, 2, 1, 1)
    bias = torch.tensor([10.0, 20.0], device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = ops.conv_block(x, pointwise, bias=bias, normalize=normalize, eps=0.0)
    # Two values are one deviation on either side of their mean.
    expected = [11.0, 9.0, 19.0, 21.0] if normalize else [5.0, 2.0, 23.0, 24.0]
    assert y.flatten().tolist() == expected


def test_running_statistics(device):
    tensors, settings = make(CASES[0], True, device=device)
    xs, rest = split(tensors)
    mean, var = torch.zeros(16, device=device), torch.ones(16, device=device)
    block(tensors, settings, running_mean=mean, running_var=var, momentum=0.25)
    z = F.conv2d(
        F.conv2d(F.relu(xs[0]), rest["depthwise"], None, 1, 2, 2, groups=16), rest["pointwise"]
    )
    wide = [torch.zeros(16, device=device), torch.ones(16, device=device)]
    F.batch_norm(z, *wide, training=True, momentum=0.25)
    torch.testing.assert_close(mean, wide[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, wide[1], rtol=1e-5, atol=1e-5)


@native
def test_a_mean_far_from_zero_costs_no_digits():
    tensors, settings = make((4, (8, 8), 6, 16, 16, 0, 1), True)
    with torch.no_grad():
        tensors["x0"] += 1000.0
    exact = {name: t.detach().double() for name, t in tensors.items()}
    # The product itself rounds at 1000 * 2^-24 of a term; the statistics must not add to that.
    close(block(tensors, settings), by_definition(exact, settings), 5e-4)


# --- Which way ------------------------------------------------------------------------------------


@native
def test_the_kernel_is_what_runs():
    for case in CASES:
        if case[3:5] == (1, 1):  # both layouts at once, and counts as the other
            continue
        y = block(*make(case, True))
        assert type(y.grad_fn).__name__ == "_FunctionBackward", case
    for change in ({"layout": torch.contiguous_format}, {"dtype": torch.float64}):
        y = block(*make(CASES[0], True, **change))
        assert type(y.grad_fn).__name__ != "_FunctionBackward"


@native
def test_an_attack_computes_no_gradient_of_weights():
    tensors, settings = make(CASES[0], True)

    def flops(*wanted):
        y = block(tensors, settings)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), [tensors[name] for name in wanted])
        return counter.get_total_flops()

    assert flops("x0") == flops("x0", "pointwise") // 2 > 0


@native
def test_flops_are_those_of_the_parts():
    for case in CASES[:3]:
        counts = []
        for function in (block, by_definition):
            tensors, settings = make(case, False)
            with FlopCounterMode(display=False) as counter:
                y = function(tensors, settings)
            counts.append(counter.get_total_flops())
            if function is block:
                with FlopCounterMode(display=False) as counter:
                    y.sum().backward()
                assert counter.get_total_flops() == 2 * counts[0]
        assert counts[0] == counts[1] > 0


@native
def test_the_number_of_threads_changes_nothing():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for case in ((64, (16,), 24, 16, 16, 3, 1), (64, (16, 16), 24, 16, 16, 0, 1)):
                tensors, settings = make(case, True)
                y = block(tensors, settings)
                gradients = torch.autograd.grad(y.square().sum(), list(tensors.values()))
                results.append((y.detach(), *gradients))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results, results[2:], strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@native
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6]], ids=str)
def test_an_image_has_the_same_bits_in_any_batch(case):
    tensors, settings = make(case, False)
    xs, rest = split(tensors)
    pointwise = rest.pop("pointwise")
    whole = ops.conv_block(xs, pointwise, **rest, **settings)
    for image in range(case[0]):
        alone = [x[image : image + 1].contiguous(memory_format=torch.channels_last) for x in xs]
        y = ops.conv_block(alone, pointwise, **rest, **settings)
        assert torch.equal(y[0], whole[image])


# --- Autograd, compile, autocast ------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(device, normalize):
    for case in ((2, (3,), 4, 3, 4, 3, 1), (2, (2, 3), 4, 2, 3, 0, 1)):
        tensors, settings = make(case, normalize, dtype=torch.float64, device=device)
        names = list(tensors)
        assert torch.autograd.gradcheck(
            lambda *values, names=names, settings=settings: block(
                dict(zip(names, values, strict=True)), settings
            ),
            list(tensors.values()),
        )


def test_second_derivative_is_refused():
    tensors, settings = make(CASES[0], True)
    y = block(tensors, settings)
    with pytest.raises(RuntimeError, match=r"no second derivative"):
        torch.autograd.grad(y.sum(), tensors["x0"], create_graph=True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_opcheck(case, normalize):
    tensors, settings = make(case, normalize)
    xs, rest = split(tensors)
    given = [rest.get(name) for name in ("depthwise", "pointwise", "weight", "bias")]
    geometry = [settings.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
    results = OP(xs, *given, *geometry, normalize, 1e-5)
    torch.library.opcheck(
        OP,
        (xs, *given, *geometry, normalize, 1e-5),
        # A list of differentiable tensors is outside of what this check can look into.
        test_utils=("test_schema", "test_faketensor"),
    )
    y, *saved = (tensor.detach() for tensor in results)
    d = saved.pop(0) if given[0] is not None else None
    z, mean, inverse = saved if normalize else (None, None, None)
    xs, given = [x.detach() for x in xs], [None if t is None else t.detach() for t in given]
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            BACKWARD,
            (torch.randn_like(y), xs, *given[:3], d, z, mean, inverse, *geometry, *wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.slow
def test_compile(device):
    tensors, settings = make(CASES[0], True, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    y, expected = compiled(tensors, settings), block(tensors, settings)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(y)
    pairs = (torch.autograd.grad(t, list(tensors.values()), grad) for t in (y, expected))
    for one, other in zip(*pairs, strict=True):
        close(one, other, 1e-4)


def test_autocast(device):
    tensors, settings = make(CASES[0], True, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = block(tensors, settings)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), block(tensors, settings), rtol=0.05, atol=0.1)


# --- Corners --------------------------------------------------------------------------------------


@native
def test_gradients_in_other_layouts():
    tensors, settings = make(CASES[2], True)
    y = block(tensors, settings)
    wide = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    for grad in (wide[:, 3:11], wide[:, :8].contiguous(), torch.ones(1).expand(y.shape)):
        results = [
            torch.autograd.grad(y, list(tensors.values()), g, retain_graph=True)
            for g in (grad, grad.contiguous(memory_format=torch.channels_last))
        ]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("k", [0, 3])
def test_an_empty_batch(device, k):
    tensors, settings = make((0, (4,), 3, 5, 5, k, 1), False, device=device)
    y = block(tensors, settings)
    assert y.shape == (0, 3, 5, 5)
    y.sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any(), name


@pytest.mark.parametrize("k", [0, 3])
def test_what_is_not_a_number_stays_so(device, k):
    tensors, settings = make((2, (3,), 4, 5, 5, k, 1), False, device=device)
    with torch.no_grad():
        tensors["x0"][1, 2, 2, 2] = torch.nan
    y = block(tensors, settings)
    assert bool(y[1, :, 2, 2].isnan().all())
    assert bool(y[0].isfinite().all())


def test_relu_passes_no_gradient_at_zero_and_below(device):
    x = torch.tensor([-1.0, 0.0, -0.0, 2.0], device=device).view(1, 2, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    ops.conv_block(x, torch.full((1, 2, 1, 1), 3.0, device=device)).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.0, 0.0, 3.0]


def test_inputs_are_not_written(device):
    tensors, settings = make(CASES[2], True, device=device)
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    block(tensors, settings).sum().backward()
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": []}, ValueError, "x: expected at least one tensor, got none"),
        (
            {"x": [torch.zeros(1, 2, 4, 4)] * 2, "depthwise": torch.zeros(4, 1, 3, 3)},
            ValueError,
            "x: expected one tensor before a depthwise convolution, got 2",
        ),
        ({"stride": 2}, ValueError, "stride, padding: expected 1 and 0 .* got 2 and 0"),
        ({"weight": torch.ones(3)}, ValueError, "weight: expected None without normalize"),
        ({"pointwise": torch.zeros(3, 5, 1, 1)}, RuntimeError, "5"),
        ({"pointwise": torch.zeros(3, 4, 3, 3), "padding": 0}, RuntimeError, "3"),
        ({"depthwise": torch.zeros(3, 1, 3, 3)}, (RuntimeError, ValueError), "4"),
    ],
)
def test_errors(change, error, message):
    x = torch.zeros(1, 4, 4, 2).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "pointwise": torch.zeros(3, 4, 1, 1), **change}
    with pytest.raises(error, match=message):
        ops.conv_block(arguments.pop("x"), arguments.pop("pointwise"), **arguments)


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": []}, "xs: expected at least one"),
        ({"xs": [torch.zeros(1, 4, 2, 2)]}, "xs: expected dense channels-last"),
        ({"pointwise": torch.zeros(3, 5, 1, 1)}, r"pointwise: expected \[C_out, 4, 1, 1\]"),
        ({"bias": torch.zeros(4)}, "bias: expected one value for each of 3"),
        ({"weight": torch.zeros(3)}, "weight: expected none without a batch norm"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change, message):
    x = torch.zeros(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    arguments = {
        "xs": [x], "depthwise": None, "pointwise": torch.zeros(3, 4, 1, 1), "weight": None,
        "bias": None, **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments.values(), 1, 0, 1, False, 1e-5)


@native
def test_want_of_memory_is_called_by_its_name():
    """The limit on the address space stands in for a full memory; a process of its own."""
    code = (
        "import resource, torch\n"
        "from fastbandit import ops\n"
        "from fastbandit.training import is_out_of_memory\n"
        "x = torch.randn(64, 64, 64, 64).contiguous(memory_format=torch.channels_last)\n"
        "weight, taps = torch.randn(64, 64, 1, 1), torch.randn(64, 1, 3, 3)\n"
        "calls = [lambda: ops.conv_block(x, weight), lambda: ops.batch_norm(x),\n"
        "         lambda: ops.depthwise_conv2d(x, taps, padding=1)]\n"
        "for call in calls: call()\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "size = pages * resource.getpagesize() + 2**24\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "for call in calls:\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(is_out_of_memory(error), error)\n"
        "    else: print('no error')\n"
    )
    done = run("-c", code)
    assert done.stdout.count("True fastbandit: out of memory") == 3, done.stdout + done.stderr


def test_another_norm_is_folded_where_one_kernel_computes_all_and_called_elsewhere(device):
    tensors, settings = make(CASES[0], False)
    xs, rest = split(tensors)
    pointwise = rest.pop("pointwise").detach().to(device)
    rest = {name: tensor.detach().to(device) for name, tensor in rest.items()}
    x = xs[0].detach().to(device).contiguous(memory_format=torch.channels_last)
    rest["bias"] = None
    calls = []

    def norm(y):
        calls.append("norm")
        return 2 * y + 1

    def fold(weight):
        calls.append("fold")
        return 2 * weight, weight.new_ones(weight.shape[0])

    expected = 2 * ops.conv_block(x, pointwise, **rest, **settings) + 1
    y = ops.conv_block(x, pointwise, **rest, **settings, norm=norm, fold=fold)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert calls == ["fold" if serves([x], pointwise) else "norm"]
    with pytest.raises(ValueError, match="norm, fold: expected norm alone or both"):
        ops.conv_block(x, pointwise, fold=fold)
    with pytest.raises(ValueError, match="norm, fold: expected norm alone or both"):
        ops.conv_block(x, pointwise, normalize=True, norm=norm)
