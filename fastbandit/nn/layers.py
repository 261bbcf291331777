"""Layers that candidate operations and networks are made of.

Every layer takes ``[N, C, H, W]`` of any floating dtype, contiguous or channels-last, down to a
1 x 1 map. Depthwise, Gabor and dilated convolutions go through :mod:`fastbandit.ops`, so that
whichever kernel serves the device is the one that runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops
from fastbandit._modes import autocast_dtype
from fastbandit.nn.cell import concatenate
from fastbandit.nn.frozen import foldable
from fastbandit.nn.shortcuts import Plain
from fastbandit.operations import DenoiseKind, GaborKind, check_option

__all__ = [
    "BatchNorm2d",
    "Denoise",
    "DenoiseBlock",
    "DepthwiseConv2d",
    "DilatedConv2d",
    "Gabor",
    "GaborBlock",
    "Moves",
    "Normalize",
    "ReluConvBN",
    "classify",
    "conv_block",
    "conv_weight",
    "dot_product",
    "halve",
    "reset_running_stats",
    "set_eps",
    "use_cumulative_average",
]


def conv_weight(out_channels: int, in_channels: int, kernel_size: int) -> nn.Parameter:
    """A convolution weight [out, in, k, k] drawn as ``torch.nn.Conv2d`` draws its own."""
    weight = torch.empty(out_channels, in_channels, kernel_size, kernel_size)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


class Normalize(nn.Module):
    """(x - mean) / std for each channel: the first layer of every model, whose input is in [0, 1].

    Args:
        channels: channels of the input.
        mean, std: one number for each channel, or one for all; None stands for 0 and 1.

    Raises:
        ValueError: their number is not ``channels``, or a std is not positive and finite.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        for name, given, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = default if given is None else given
            vector = [values] * channels if isinstance(values, int | float) else list(values)
            vector = [float(value) for value in vector]
            if len(vector) != channels:
                raise ValueError(
                    f"Normalize: {name}: expected 1 number or {channels}, got {len(vector)}"
                )
            if not all(map(math.isfinite, vector)) or (name == "std" and min(vector) <= 0):
                kind = "positive finite" if name == "std" else "finite"
                raise ValueError(f"Normalize: {name}: expected {kind} numbers, got {vector}")
            self.register_buffer(name, torch.tensor(vector).view(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose cumulative average costs no host synchronisation.

    As ``torch.nn.BatchNorm2d`` (same parameters, buffers and state dict), including
    ``track_running_stats``: set to False in training mode it uses batch statistics and leaves the
    running ones alone. With ``momentum=None`` the running statistics are the mean over all batches
    since the last :meth:`reset_running_stats`; torch reads their number back from the device at
    every forward, here it is a Python integer that is written to ``num_batches_tracked`` when the
    state is saved. With a momentum batches are not counted.

    Raises:
        ValueError: in training mode with a single value for each channel (N = H = W = 1), whose
            variance does not exist.
    """

    batches: int  # seen since the last reset, in cumulative mode; set by reset_running_stats
    # In a step that is recorded once and replayed: what moves the running statistics, by a factor
    # that lies on the device, since a Python number would be replayed too. None: this layer does.
    moves: Moves | None = None
    # Normalises with the statistics of several processes: (x, weight, bias, running mean and
    # variance or None, factor, eps) -> y. None: those of the batch at hand.
    synchronise: Callable[..., Tensor] | None = None

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def reset_running_stats(self) -> None:
        if self.track_running_stats:
            self.batches = 0
        super().reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            if self.moves is not None:
                self.moves.make()
            return torch.batch_norm(
                x, self.weight, self.bias, self.running_mean, self.running_var,
                False, 0.0, self.eps, torch.backends.cudnn.enabled,
            )  # fmt: skip
        if x.numel() == x.size(1):
            raise ValueError(
                f"BatchNorm2d: training needs more than one value for each channel, "
                f"got a batch of shape {tuple(x.shape)}"
            )
        if not self.track_running_stats:
            if self.synchronise is not None:
                return self.synchronise(x, self.weight, self.bias, None, 0.0, self.eps)
            return ops.batch_norm(x, self.weight, self.bias, eps=self.eps)
        factor = self.next_factor()
        if self.moves is not None and self.running_mean is not None:
            # With a momentum of 1 the running statistics are those of the batch.
            mean, var = self.moves.take(self)
            return ops.batch_norm(x, self.weight, self.bias, mean, var, momentum=1.0, eps=self.eps)
        if self.synchronise is not None:
            running = (self.running_mean, self.running_var)
            return self.synchronise(x, self.weight, self.bias, running, factor, self.eps)
        return ops.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            momentum=factor,
            eps=self.eps,
        )

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that is ``weight``'s and this after it, in evaluation
        mode with running statistics."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        bias = -mean * scale if self.bias is None else self.bias - mean * scale
        return weight * scale.view(-1, 1, 1, 1), bias

    def next_factor(self) -> float:
        """By how much the running statistics move towards those of one more batch; counts it."""
        if self.momentum is not None:
            return self.momentum
        self.batches += 1
        return 1.0 / self.batches

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.fill_(self.batches)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.num_batches_tracked is not None:
            self.batches = int(self.num_batches_tracked)


is_batch_norm = Plain(BatchNorm2d)


class Moves:
    """The running statistics of many batch norms, moved by one operation in place of three each.

    For a step that is recorded: a layer whose ``moves`` this is has the statistics of its batch
    written to buffers of this object, and :meth:`make` moves the running ones of all layers that
    did. Whatever reads a running statistic in between calls it first.

    Args:
        norms: those that may take part.
    """

    def __init__(self, norms: Iterable[BatchNorm2d]) -> None:
        self._batch: dict[BatchNorm2d, tuple[Tensor, Tensor]] = {}
        widths: dict[torch.dtype, int] = {}
        for norm in norms:
            if (mean := norm.running_mean) is not None:
                self._batch[norm] = mean.new_zeros(len(mean)), mean.new_zeros(len(mean))
                widths[mean.dtype] = max(len(mean), widths.get(mean.dtype, 0))
        # As many numbers as the widest layer has channels: the one operation wants its three
        # lists alike.
        self._factors = {
            dtype: next(iter(self._batch)).running_mean.new_zeros(width, dtype=dtype)  # type: ignore
            for dtype, width in widths.items()
        }
        self._waiting: dict[BatchNorm2d, tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        """Forget old batches: torch takes 0 times what lies in a buffer, which is NaN for a NaN."""
        for batch in self._batch.values():
            torch._foreach_zero_(batch)

    def fill(self, factor: float) -> None:
        """By how much the next steps move."""
        for tensor in self._factors.values():
            tensor.fill_(factor)

    def take(self, norm: BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] for ``norm`` to write, which :meth:`make` takes account of."""
        if norm in self._waiting:
            self.make()
        self._waiting[norm] = self._batch[norm]
        return self._batch[norm]

    @torch.no_grad()
    def make(self) -> None:
        """running <- running + factor (batch - running), for all that wait."""
        running: list[Tensor] = []
        batch: list[Tensor] = []
        for norm, statistics in self._waiting.items():
            running += [norm.running_mean, norm.running_var]  # type: ignore[list-item]
            batch += statistics
        self._waiting.clear()
        if running:
            factors = [self._factors[tensor.dtype][: len(tensor)] for tensor in running]
            torch._foreach_lerp_(running, batch, factors)


def use_cumulative_average(module: nn.Module) -> None:
    """Switch every BatchNorm2d in ``module`` to cumulative averages (``momentum=None``)."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.momentum = None


def set_eps(module: nn.Module, eps: float) -> None:
    """Let every BatchNorm2d in ``module`` add ``eps`` to the variance."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.eps = eps


def reset_running_stats(modules: Iterable[nn.Module]) -> None:
    """Forget the running statistics of those of ``modules`` that are batch norms.

    The modules themselves are looked at, not their children: pass ``model.modules()`` or
    ``supernet.path_modules()``.
    """
    for layer in modules:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()


def classify(x: Tensor, classifier: nn.Module) -> Tensor:
    """Global average pooling and the classifier, in float32 under autocast: logits are differences
    of large sums, and the loss is taken of them."""
    if autocast_dtype(x) is not None:
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = classifier(x.float().mean(dim=(2, 3)))
            return logits
    return classifier(x.mean(dim=(2, 3)))


class DepthwiseConv2d(nn.Module):
    """ReLU, then a depthwise k x k convolution with 'same' padding, as one op.

    Output: [N, C, ceil(H / stride), ceil(W / stride)]. ``kernel_size`` is odd.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.padding = dilation * (kernel_size // 2)
        self.weight = conv_weight(channels, 1, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=True,
        )


is_depthwise = Plain(DepthwiseConv2d)


def _compiling() -> bool:
    """Whether a compiler or exporter looks on; it is shown the layers themselves."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def conv_block(
    x: Tensor | Sequence[Tensor],
    pointwise: Tensor,
    norm: nn.Module,
    depthwise: DepthwiseConv2d | None = None,
) -> Tensor:
    """ReLU, ``depthwise`` if there is one, a 1x1 convolution and ``norm``, as one op.

    A layer to which something is attached (see :class:`~fastbandit.nn.shortcuts.Plain`) is called.

    Args:
        x: a map, or several of one size that are taken side by side.
        pointwise: [C_out, C, 1, 1].
        norm: the batch norm.
        depthwise: a depthwise convolution, which has the ReLU inside; with one map only.
    """
    if _compiling() or not (depthwise is None or is_depthwise(depthwise)):
        joined = x if isinstance(x, Tensor) else concatenate(x)
        activated = F.relu(joined) if depthwise is None else depthwise(joined)
        y: Tensor = norm(F.conv2d(activated, pointwise))
        return y
    if depthwise is None:
        return ops.conv_block(x, pointwise, **normalization(norm, x))
    stride = depthwise.stride
    return ops.conv_block(
        x,
        pointwise,
        depthwise=depthwise.weight,
        stride=stride,
        padding=depthwise.padding,
        dilation=depthwise.dilation,
        **normalization(norm, x, stride),
    )


def normalization(norm: nn.Module, x: Tensor | Sequence[Tensor], stride: int = 1) -> dict[str, Any]:
    """How :func:`fastbandit.ops.conv_block` is told of ``norm`` after a convolution of ``x``.

    A plain batch norm is told by its tensors or folded into the convolution; any other is called.
    """
    if _compiling():
        return {"norm": norm}
    if foldable(norm):
        return {"norm": norm, "fold": norm.fold}
    if not is_batch_norm(norm):
        return {"norm": norm}
    mean, variance = norm.running_mean, norm.running_var
    if not norm.training and norm.moves is None and mean is not None and variance is not None:
        return {"norm": norm, "fold": norm.fold}
    # A single value for each channel is for the batch norm to refuse.
    first = x if isinstance(x, Tensor) else x[0]
    several = first.shape[0] > 1 or max(first.shape[2:]) > stride
    if norm.training and norm.synchronise is None and norm.moves is None and several:
        tracking = norm.track_running_stats
        return {
            "normalize": True,
            "weight": norm.weight,
            "bias": norm.bias,
            "running_mean": mean if tracking else None,
            "running_var": variance if tracking else None,
            "momentum": norm.next_factor() if tracking else 0.0,
            "eps": norm.eps,
        }
    return {"norm": norm}


class ReluConvBN(nn.Module):
    """ReLU - 1x1 convolution - batch norm: brings the input of a cell to its width.

    Takes the input as one map or as several that are meant side by side, as a cell gives them.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        self.weight = conv_weight(out_channels, in_channels, 1)
        self.bn = BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        return conv_block(x, self.weight, self.bn)


class DilatedConv2d(nn.Module):
    """ReLU, then a dense k x k convolution of dilation 2 with 'same' padding.

    Output: [N, C, ceil(H / stride), ceil(W / stride)]. ``kernel_size`` is odd.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, dilation: int = 2) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.padding = dilation * (kernel_size // 2)
        self.weight = conv_weight(channels, channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dilated_conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=True,
        )


class Gabor(nn.Module):
    """A bank of ``channels`` Gabor filters, the same for every input channel.

    Five learnable vectors ``t`` are mapped to the parameters of the filters (s is the logistic
    function; lengths in pixels):

    ============ ========================= ========================= ==================
    parameter    ``pixels`` (default)      ``released``              t starts as
    ============ ========================= ========================= ==================
    theta        2 pi s(t)                 2 pi s(t)                 N(0, 1)
    sigma        0.5 + s(t)                0.1 + 0.4 s(t)            N(0, 1)
    wavelength   2 + 4 s(t)                0.001 + 0.999 s(t)        U(0, 1)
    gamma        1 + t / 2                 1 + t / 2                 0
    psi          t                         t                         N(0, 0.02^2)
    ============ ========================= ========================= ==================

    ``released`` is what the authors' evaluation code does; a sigma below half a pixel leaves
    little but the centre tap, which is why ``pixels`` is the default.

    Args:
        channels: filters, and so output channels; the input may have any number.
        kind: ``pixels`` or ``released``.
        kernel_size: odd.
    """

    def __init__(self, channels: int, kind: GaborKind = "pixels", kernel_size: int = 3) -> None:
        super().__init__()
        check_option("gabor", kind)
        self.kind, self.kernel_size = kind, kernel_size
        self.theta = nn.Parameter(torch.randn(channels))
        self.sigma = nn.Parameter(torch.randn(channels))
        self.wavelength = nn.Parameter(torch.rand(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.psi = nn.Parameter(0.02 * torch.randn(channels))

    def filter_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """theta, sigma, gamma, wavelength, psi of each filter, [channels] each, differentiable."""
        if self.kind == "pixels":
            sigma = 0.5 + torch.sigmoid(self.sigma)
            wavelength = 2.0 + 4.0 * torch.sigmoid(self.wavelength)
        else:
            sigma = 0.1 + 0.4 * torch.sigmoid(self.sigma)
            wavelength = 0.001 + 0.999 * torch.sigmoid(self.wavelength)
        theta = 2.0 * math.pi * torch.sigmoid(self.theta)
        return theta, sigma, 1.0 + 0.5 * self.gamma, wavelength, self.psi

    def forward(self, x: Tensor) -> Tensor:
        return ops.gabor_conv2d(
            x,
            *self.filter_parameters(),
            kernel_size=self.kernel_size,
            padding=self.kernel_size // 2,
        )


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


def halve(x: Tensor) -> Tensor:
    """Bilinear resize (corners aligned) to ceil(H / 2) x ceil(W / 2)."""
    size = ((x.size(2) + 1) // 2, (x.size(3) + 1) // 2)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class _Residual(nn.Module):
    """x + BN(f(x)), halved at stride 2; starts as the identity.

    The batch norm has scale and shift, starting at 0, even where the others have none (in the
    supernet): the block *is* that learnt scale. With a fixed scale of 1 it would add noise of unit
    variance from the first step and could never be the identity.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn = BatchNorm2d(channels, affine=True)
        nn.init.zeros_(self.bn.weight)

    def transform(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.bn(self.transform(x))
        return y if self.stride == 1 else halve(y)


class GaborBlock(_Residual):
    """x + BN(gabor(x)), computed at full size and halved at stride 2; starts as the identity."""

    def __init__(self, channels: int, stride: int = 1, kind: GaborKind = "pixels") -> None:
        super().__init__(channels, stride)
        self.gabor = Gabor(channels, kind)

    def transform(self, x: Tensor) -> Tensor:
        return self.gabor(x)


class DenoiseBlock(_Residual):
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
