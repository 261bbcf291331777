"""A shortcut around the call of a module computes what the call does, or is not taken."""

import copy
import types

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fastbandit import ops
from fastbandit._modes import may_keep
from fastbandit.data import Loader, load
from fastbandit.genotype import Genotype
from fastbandit.nn.blocks import DepthwiseConv2d
from fastbandit.nn.frozen import FrozenBatchNorm, freeze
from fastbandit.nn.network import Network
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.nn.operations import make
from fastbandit.nn.shortcuts import Plain
from fastbandit.nn.supernet import Supernet
from fastbandit.threat import ThreatModel
from fastbandit.training import batches as inputs

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def squash(module, inputs, output):
    return torch.tanh(3 * output)


def squash_input(module, inputs):
    return (torch.tanh(3 * inputs[0]),)


def scale_gradient(module, *gradients):
    return tuple(3 * gradient for gradient in gradients[0])


def own_forward(module):
    def forward(self, x):
        return torch.tanh(type(self).forward(self, x))

    module.forward = types.MethodType(forward, module)


def subclass(module):
    class Own(type(module)):
        def forward(self, x):
            return torch.tanh(super().forward(x))

    module.__class__ = Own


def compiled(module):
    module._compiled_call_impl = lambda x: torch.tanh(type(module).forward(module, x))


# What may be done to any module, and what to one with a weight of more than one dimension.
ATTACHED = {
    "forward hook": lambda m: m.register_forward_hook(squash),
    "forward hook with keywords": lambda m: m.register_forward_hook(
        lambda module, inputs, keywords, output: torch.tanh(output), with_kwargs=True
    ),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(squash_input),
    "backward hook": lambda m: m.register_full_backward_hook(scale_gradient),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(scale_gradient),
    "own forward": own_forward,
    "subclass": subclass,
    "compiled": compiled,
}
TO_WEIGHTS = {
    "spectral norm": lambda m: parametrizations.spectral_norm(m),
    "spectral norm, old form": lambda m: spectral_norm(m),
    "weight norm": lambda m: parametrizations.weight_norm(m),
    "weight norm, old form": lambda m: weight_norm(m),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("attach", [*ATTACHED, *TO_WEIGHTS])
def test_a_module_with_something_attached_is_not_plain(attach):
    is_plain = Plain(DepthwiseConv2d)
    module = DepthwiseConv2d(4, 3)
    assert is_plain(module)
    assert not Plain(BatchNorm2d)(module)
    (ATTACHED | TO_WEIGHTS)[attach](module)
    assert not is_plain(module)


def test_a_hook_that_is_removed_leaves_a_plain_module():
    is_plain, module = Plain(BatchNorm2d), BatchNorm2d(4)
    handle = module.register_forward_hook(squash)
    assert not is_plain(module)
    handle.remove()
    assert is_plain(module)


@pytest.mark.parametrize(
    "register",
    [
        all_modules.register_module_forward_hook,
        all_modules.register_module_forward_pre_hook,
        all_modules.register_module_full_backward_hook,
        all_modules.register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_for_all_modules_is_attached_to_each(register):
    handle = register(lambda *_: None)
    try:
        assert not Plain(BatchNorm2d)(BatchNorm2d(4))
    finally:
        handle.remove()
    assert Plain(BatchNorm2d)(BatchNorm2d(4))


def test_a_patched_class_is_not_plain(monkeypatch):
    is_plain = Plain(BatchNorm2d)
    monkeypatch.setattr(BatchNorm2d, "forward", lambda self, x: x)
    assert not is_plain(BatchNorm2d(4))


# -- Blocks in one op -----------------------------------------------------------------------------


def trained(name, channels=8):
    """An operation whose batch norms have statistics, scale and shift of their own."""
    torch.manual_seed(0)
    operation = make(name, channels)
    for norm in operation.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.uniform_(tensor, -1.0, 1.0)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return operation


def answer(operation, x, layout):
    """Output, and gradient of the input."""
    x = x.detach().clone(memory_format=layout).requires_grad_()
    y = operation(x)
    (gradient,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape))
    return y.detach(), gradient


@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
@pytest.mark.parametrize("attach", ATTACHED)
@pytest.mark.parametrize("part", ["bn", "depthwise"])
def test_what_is_attached_acts_in_both_layouts(part, attach, mode):
    operation = trained("dil_conv_3x3").train(mode == "training")
    plain = copy.deepcopy(operation)
    ATTACHED[attach](getattr(operation, part))
    if mode == "frozen":
        freeze(operation)
    x = torch.randn(4, 8, 7, 6)
    contiguous, channels_last = (answer(operation, x, layout) for layout in LAYOUTS)
    for one, other in zip(contiguous, channels_last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    without = answer(plain, x, torch.channels_last)
    assert any(
        not torch.allclose(one, other, rtol=1e-2, atol=1e-2)
        for one, other in zip(contiguous, without, strict=True)
    ), "what is attached changes nothing: the test tests nothing"


@pytest.mark.parametrize("attach", TO_WEIGHTS)
def test_weights_that_are_computed_act_in_both_layouts(attach):
    def operation(seed):
        torch.manual_seed(seed)
        made = make("dil_conv_3x3", 16).eval()
        TO_WEIGHTS[attach](made.depthwise)
        return made

    for layout in LAYOUTS:
        a, b = operation(0), operation(1)
        b.load_state_dict(a.state_dict())  # what is computed of it is stale until b is called
        x = torch.randn(8, 16, 12, 12).contiguous(memory_format=layout)
        assert torch.equal(a(x), b(x))


def test_a_hook_for_all_modules_sees_the_modules_of_a_block():
    operation = trained("sep_conv_m_3x3").eval()
    seen = []
    handle = all_modules.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        operation(torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last))
    finally:
        handle.remove()
    assert seen == ["DepthwiseConv2d", "BatchNorm2d"] * 2 + ["SepConvM"]


def test_the_pass_over_bytes_does_not_go_round_a_hook():
    source = load("digits")
    batches = Loader(source.test, torch.arange(16), batch_size=8)
    threat = ThreatModel(epsilon="0.2")
    supernet = Supernet("robust9-light", in_channels=1, classes=10, channels=2, cells=1)

    def kind():
        found = inputs.input_of(batches, supernet, threat, torch.float32)
        return type(found)

    assert kind() is inputs.BytesInput
    for module in (supernet, supernet.normalize):
        for attach in ATTACHED.values():
            before = dict(module.__dict__), type(module)
            hooks = {k: copy.copy(v) for k, v in module.__dict__.items() if k.endswith("_hooks")}
            attach(module)
            assert kind() is inputs.ReadyInput
            module.__class__ = before[1]
            module.__dict__.clear()
            module.__dict__.update(before[0] | hooks)
    assert kind() is inputs.BytesInput


# -- Modules that are replaced, and hooks that keep what they see ---------------------------------


def genotype():
    cell = {
        "name": "a",
        "nodes": [
            [{"op": "max_pool_3x3", "source": 0}],
            [{"op": "dil_conv_3x3", "source": 0}, {"op": "avg_pool_3x3", "source": 1}],
        ],
        "concat": [1, 2],
    }
    return Genotype(cells=[cell])


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_a_replaced_operation_of_a_network_is_the_one_that_runs():
    torch.manual_seed(0)
    network = Network(genotype(), in_channels=1, classes=3, channels=4, cells=1).eval()
    x = torch.rand(2, 1, 6, 6)
    seen = []
    network.cells[0].operations[0].register_forward_hook(lambda *_: seen.append("max"))
    network(x)
    assert seen == ["max"]
    for index in range(3):
        network.cells[0].operations[index] = Zero()
    network(x)
    assert seen == ["max"]
    assert torch.equal(network(x)[0], network.classifier.bias)


def test_a_replaced_operation_of_the_path_is_the_one_that_runs_and_learns():
    torch.manual_seed(0)
    supernet = Supernet("robust9-light", in_channels=1, classes=3, channels=4, cells=1, nodes=2)
    supernet.set_path([2, 0, 1])
    supernet.eval()
    for operations in supernet.cells[0].edges:
        for arm in range(supernet.arms):
            operations[arm] = Zero()
    assert torch.equal(supernet(torch.rand(1, 1, 6, 6))[0], supernet.classifier.bias)
    assert sum(isinstance(module, Zero) for module in supernet.path_modules()) == 3


@pytest.mark.parametrize("kind", ["network", "supernet"])
def test_what_a_hook_keeps_does_not_change_afterwards(kind):
    torch.manual_seed(0)
    if kind == "network":
        model = Network(genotype(), in_channels=1, classes=3, channels=4, cells=1)
        operations = list(model.cells[0].operations)
    else:
        model = Supernet("robust9-light", in_channels=1, classes=3, channels=4, cells=1, nodes=2)
        model.set_path([0, 1, 1])
        operations = model.cells[0].chosen
    kept = []

    def keep(module, inputs, output):
        kept.append((output, output.clone()))
        return torch.sigmoid(output)  # whose backward pass needs its result

    for operation in operations:
        operation.register_forward_hook(keep)
    model(torch.rand(4, 1, 6, 6)).sum().backward()
    assert len(kept) == 3
    for output, at_the_time in kept:
        assert torch.equal(output, at_the_time)


# -- Frozen batch norms ---------------------------------------------------------------------------


def test_a_norm_with_something_attached_is_not_frozen():
    for attach in ATTACHED.values():
        network = nn.Sequential(nn.BatchNorm2d(4)).eval()
        attach(network[0])
        kind = type(network[0])
        assert type(freeze(network)[0]) is kind


class Reads(nn.Module):
    """Computes its batch norm by itself, and moves its statistics, from what the norm holds."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.norms = [self.bn]  # not a registered name

    def forward(self, x):
        bn = self.norms[0]
        if not isinstance(bn, nn.BatchNorm2d):
            return x
        y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        with torch.no_grad():
            bn.running_mean.add_(0.25)
        return y + self.bn(x)


def test_a_module_that_reads_its_norm_finds_all_of_it():
    model = Reads().eval()
    frozen = freeze(copy.deepcopy(model))
    assert type(frozen.bn) is FrozenBatchNorm
    assert frozen.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 4, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for each in (model, frozen):
            each.bn.weight.fill_(2.0)
            each.bn.eps = 0.1
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


def test_hooks_set_after_freezing_act():
    operation = freeze(trained("dil_conv_3x3").eval())
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    before = operation(x)
    operation.bn.register_forward_hook(squash)
    torch.testing.assert_close(operation(x), torch.tanh(3 * before), rtol=1e-5, atol=1e-5)


# -- Tensors that are kept ------------------------------------------------------------------------


def pool(x):
    return ops.avg_pool2d(x, 1)


def frozen_norm(x):
    return FROZEN(x)


def frozen_block(x):
    return BLOCK(x)


FROZEN = freeze(nn.BatchNorm2d(8).eval()).requires_grad_(False)
BLOCK = freeze(trained("dil_conv_3x3").eval()).requires_grad_(False)


@pytest.mark.parametrize("first", ["real", "fake", "inference", "functionalize"])
@pytest.mark.parametrize("function", [pool, frozen_norm, frozen_block])
def test_tensors_are_kept_for_callers_of_their_own_kind(function, first):
    # A size of its own for each case, so that nothing is kept for it yet.
    side = 60 + 2 * ["real", "fake", "inference", "functionalize"].index(first)
    shape = (2, 8, side, side)
    real = torch.randn(shape).contiguous(memory_format=torch.channels_last)

    def fake():
        # Parameters are real ones, unlike whatever a pool makes.
        with FakeTensorMode(allow_non_fake_inputs=function is not pool):
            assert not may_keep()
            x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
            assert function(x).shape == shape

    def inference():
        with torch.inference_mode():
            function(real)

    def transformed():
        y = torch.func.functionalize(function)(real)
        torch.testing.assert_close(y, function(real), rtol=1e-5, atol=1e-5)

    before = {
        "real": lambda: None, "fake": fake, "inference": inference, "functionalize": transformed,
    }  # fmt: skip
    before[first]()
    x = real.clone().requires_grad_()
    y = function(x)
    assert type(y) is torch.Tensor
    y.sum().backward()
    assert type(x.grad) is torch.Tensor
    if function is pool:
        expected = F.avg_pool2d(real, 3, 1, 1, count_include_pad=False)
        torch.testing.assert_close(y.detach(), expected)
    fake()  # what was kept of real tensors is not shown to fake ones
