"""torch.export of the convolution ops: plain ATen ops, so that the result runs anywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbandit import ops


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1, 5, 5))
        self.dense = nn.Parameter(torch.randn(6, 6, 5, 5))
        self.parameters_of_filters = nn.ParameterList(
            [nn.Parameter(1.0 + torch.rand(6)) for _ in range(5)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = ops.depthwise_conv2d(x, self.weight, padding=4, dilation=2, relu=True)
        x = ops.dilated_conv2d(x, self.dense, padding=4, relu=True)
        bank = ops.gabor_filters(*self.parameters_of_filters, 3)
        return ops.gabor_conv2d(x, *self.parameters_of_filters) * bank.sum()


def test_an_exported_program_needs_no_kernels_of_this_package():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 6, 8, 8)
    exported = torch.export.export(block, (x,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [target for target in targets if "fastbandit" in target]
    torch.testing.assert_close(exported.module()(x), block(x), rtol=1e-4, atol=1e-3)
