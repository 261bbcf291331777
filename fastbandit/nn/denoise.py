"""Denoising of feature maps, and the block around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit.nn.blocks import Residual, conv_weight
from fastbandit.nn.cell import summand
from fastbandit.operations import DenoiseKind, check_option

__all__ = [
    "Denoise",
    "DenoiseBlock",
    "dot_product",
]


def dot_product(x: Tensor) -> Tensor:
    """Non-local means with dot-product weights: y = x (x^T x) / (C H W), for x [N, C, H*W].

    Wang et al., "Non-local Neural Networks", and Xie et al., "Feature Denoising for Improving
    Adversarial Robustness". The product is associated so that the smaller of the two square
    matrices, C x C or HW x HW, is formed.

    Returns:
        Like ``x``.
    """
    channels, pixels = x.shape[1:]
    transposed = x.transpose(1, 2)
    gram_of_channels = channels <= pixels
    # The scale goes into the product of the small matrix, whose sums are the largest numbers here:
    # float16 does not overflow, and no pass over a full-size tensor is spent on it.
    gram = torch.baddbmm(
        x.new_zeros(1, 1, 1),
        x if gram_of_channels else transposed,
        transposed if gram_of_channels else x,
        beta=0.0,
        alpha=1.0 / (channels * pixels),
    )
    if x.stride(1) == 1 and x.stride(2) != 1:
        # Channels-last in memory. The Gram matrix is symmetric, so the transposed product is as
        # good, and its result lies in memory as x does.
        y = torch.bmm(transposed, gram) if gram_of_channels else torch.bmm(gram, transposed)
        return y.transpose(1, 2)
    return torch.bmm(gram, x) if gram_of_channels else torch.bmm(x, gram)


class Denoise(nn.Module):
    """Denoising of feature maps after Xie et al., CVPR 2019, without the residual connection.

    Args:
        channels: of input and output.
        kind: ``dot``: :func:`dot_product`; ``gaussian``: softmax over all positions of the
            embedded products, theta(x)^T phi(x) / sqrt(C), with two learnt 1x1 embeddings;
            ``mean``: 3x3 mean (padding not counted); ``median``: 3x3 median (edges replicated).
    """

    def __init__(self, channels: int, kind: DenoiseKind = "dot") -> None:
        super().__init__()
        check_option("denoise", kind)
        self.kind = kind
        if kind == "gaussian":
            self.theta = conv_weight(channels, channels, 1)
            self.phi = conv_weight(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dot":
            return dot_product(x.flatten(2)).unflatten(2, x.shape[2:])
        if self.kind == "gaussian":
            # Positions are the tokens: [N, 1, H W, C].
            query, key, value = (
                tensor.flatten(2).transpose(1, 2).unsqueeze(1)
                for tensor in (F.conv2d(x, self.theta), F.conv2d(x, self.phi), x)
            )
            attended = F.scaled_dot_product_attention(query, key, value)
            return attended.squeeze(1).transpose(1, 2).reshape(x.shape)
        if self.kind == "mean":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # [N, C, H, W, 3, 3]
        return windows.flatten(4).median(dim=4).values


@summand
class DenoiseBlock(Residual):
    """x + BN(denoise(x)), computed at full size and halved at stride 2; starts as the identity.

    Args:
        channels, stride: as everywhere.
        kind: see :class:`Denoise`.
        conv: a 1x1 convolution before the batch norm, as the text of the paper has it and the
            released networks have not.
    """

    def __init__(
        self, channels: int, stride: int = 1, kind: DenoiseKind = "dot", conv: bool = False
    ) -> None:
        super().__init__(channels, stride)
        self.denoise = Denoise(channels, kind)
        self.conv: nn.Parameter | None = conv_weight(channels, channels, 1) if conv else None

    def transform(self, x: Tensor) -> Tensor:
        y = self.denoise(x)
        return y if self.conv is None else F.conv2d(y, self.conv)
