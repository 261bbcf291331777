import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbandit.nn.frozen import FrozenBatchNorm, freeze
from fastbandit.nn.norm import BatchNorm2d


def trained_norm(kind, affine=True, channels=5):
    torch.manual_seed(0)
    norm = kind(channels, affine=affine)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3.0)
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm.eval()


def layouts(x):
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield torch.cat([x, x], 3)[..., ::2]  # neither
    yield x[:0]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [5, 17])  # from 16 on another way
def test_values_and_gradient_are_batch_norms(kind, affine, channels):
    norm = trained_norm(kind, affine, channels)
    frozen = freeze(copy.deepcopy(norm))
    assert type(frozen) is FrozenBatchNorm
    for x in layouts(torch.randn(3, channels, 4, 6)):
        for y in (norm, frozen):
            y.requires_grad_(False)
        a, b = (x.detach().requires_grad_() for _ in range(2))
        weight = torch.randn(3, channels, 4, 6)[: len(x)]
        torch.testing.assert_close(frozen(b), norm(a), rtol=2e-6, atol=2e-6)
        (weight * norm(a)).sum().backward()
        (weight * frozen(b)).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=2e-6, atol=2e-6)


def test_autocast_and_training_mode():
    frozen = freeze(trained_norm(nn.BatchNorm2d))
    x = torch.randn(2, 5, 3, 3)
    low = frozen(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), frozen(x), rtol=2e-2, atol=5e-2)
    frozen.train()
    with pytest.raises(RuntimeError, match="expected evaluation mode"):
        frozen(x)


def test_freeze_replaces_what_it_knows():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x

    network = nn.Sequential(
        trained_norm(BatchNorm2d),
        nn.Sequential(trained_norm(nn.BatchNorm2d), Own(5)),
        nn.BatchNorm2d(5, track_running_stats=False),
    ).eval()
    x = torch.randn(4, 5, 2, 2)
    before = network(x)
    freeze(network)
    assert [type(m).__name__ for m in network.modules() if not isinstance(m, nn.Sequential)] == [
        "FrozenBatchNorm", "FrozenBatchNorm", "Own", "BatchNorm2d",
    ]  # fmt: skip
    torch.testing.assert_close(network(x), before, rtol=2e-6, atol=2e-6)


def test_what_is_folded_follows_the_weights():
    """Kept, once or side by side, until one of them changes."""
    norm = freeze(nn.Sequential(trained_norm(nn.BatchNorm2d)))[0]
    even, odd = torch.randn(2, 3, 1, 1), torch.randn(3, 3, 1, 1)
    x = torch.randn(2, 3, 4, 4)

    def check(weight):
        folded, bias = norm.fold(weight)
        joined = torch.cat(weight) if isinstance(weight, tuple) else weight
        torch.testing.assert_close(F.conv2d(x, folded, bias), norm(F.conv2d(x, joined)))
        return folded

    for weight in ((even, odd), torch.cat((even, odd))):
        first = check(weight)
        assert check(weight) is first
    assert check((even, odd)) is not check((even.clone(), odd))
    odd.mul_(2)
    check((even, odd))
    norm.running_var.mul_(3)
    check((even, odd))
    assert check((even.requires_grad_(), odd)).requires_grad
