"""Layers of 1-bit networks: signs of weights times signs of the map, summed.

A layer keeps real weights, its *latents*, which training moves; what it computes with are their
signs, times a scale. The *child* is the network with these layers, the *parent* the same network
with ``full_precision`` set: real weights, and ReLU where the child takes a sign (Zhuo et al.,
"CP-NAS", IJCAI 2020; Zhang, Xu et al., "Binary Neural Networks", section 4.3, Fig. 4.8).

In evaluation mode batch norm after a 1-bit convolution is ``scale * sum + bias`` with one rounding
for the product and one for the sum, where the sum is an integer. So what :func:`pack` makes of a
network, which keeps bits and integer thresholds alone, gives the same logits bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops
from fastbandit._modes import result_dtype
from fastbandit.nn.blocks import Signed, conv_weight
from fastbandit.nn.cell import concatenate
from fastbandit.nn.frozen import is_plain_norm
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.nn.packed import PackedLayer, wide
from fastbandit.nn.shortcuts import Plain
from fastbandit.operations import OperationOptions
from fastbandit.ops.binary_sep import separable
from fastbandit.ops.binary_ste import of_layer, weight_scale

__all__ = [
    "BinaryConv2d",
    "BinaryConvBN",
    "BinaryDepthwiseConv2d",
    "BinarySepConv",
    "PackedConv2d",
    "PackedConvBN",
    "PackedLayer",
    "PackedSepConv",
    "clamp_latents",
    "latents",
    "pack",
    "surrogate_of",
    "use_full_precision",
    "use_real_weights",
    "use_surrogate",
]


class BinaryConv2d(nn.Module):
    """A 1-bit k x k convolution with 'same' padding: alpha * (sign(x) * sign(weight)).

    Output: [N, C_out, ceil(H / stride), ceil(W / stride)].

    Args:
        in_channels, out_channels, kernel_size, stride, dilation: of the convolution; the kernel's
            size is odd.
        groups: 1, or ``in_channels`` for a depthwise one.
        options: ``alpha``, ``pad``, ``ste`` and ``weight_ste`` are read.

    Attributes:
        weight: the latents, [C_out, C_in / groups, k, k].
        full_precision: compute with the latents themselves on ReLU(x), as the parent does; the
            padding is 0 then.
        real_weights: compute with the latents themselves on the signs of x, as the first of two
            steps of training does.
    """

    full_precision = False
    real_weights = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        options: OperationOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or OperationOptions()
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = dilation * (kernel_size // 2)
        self.alpha, self.pad = options.alpha, options.pad
        self.ste, self.weight_ste = options.ste, options.weight_ste
        self.weight = conv_weight(out_channels, in_channels // groups, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.full_precision:
            return self.real(x, F.relu)
        if self.real_weights:
            return self.real(x, self._signs, 0 if self.pad == "plus_one" else None)
        return self.binary(x, self.alpha)

    def freeze(self) -> nn.Module:
        """The layer on bits, for evaluation; see :func:`pack`."""
        return PackedConv2d(self)

    def _signs(self, x: Tensor) -> Tensor:
        """The signs of x, with what is around them where that is +1."""
        signs = ops.sign_ste(x, ste=self.ste)
        return F.pad(signs, [self.padding] * 4, value=1.0) if self.pad == "plus_one" else signs

    def real(
        self, x: Tensor, activation: Callable[[Tensor], Tensor], padding: int | None = None
    ) -> Tensor:
        """The latents on ``activation(x)``; None: the padding of the layer, with 0."""
        padding = self.padding if padding is None else padding
        if self.groups > 1:
            relu = activation is F.relu  # the op has it inside
            return ops.depthwise_conv2d(
                x if relu else activation(x),
                self.weight,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                relu=relu,
            )
        return F.conv2d(activation(x), self.weight, None, self.stride, padding, self.dilation)

    def binary(
        self, x: Tensor, alpha: Literal["filter", "layer", "none"], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The child, with a scale of this kind; ``none`` gives the integers.

        Args:
            dtype: of the result; None: as autocast says, else that of x.
        """
        return of_layer(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            alpha=alpha,
            ste=self.ste,
            weight_ste=self.weight_ste,
            pad=self.pad,
            out_dtype=dtype,
        )

    @property
    def taps(self) -> int:
        """Products in a sum away from the border."""
        return self.weight[0].numel()

    def scale(self) -> Tensor:
        """alpha of each filter, [C_out]."""
        alpha = weight_scale(self.weight, self.alpha)
        if alpha is not None:
            return alpha
        return self.weight.new_ones(len(self.weight), dtype=wide(self.weight.dtype))


class BinaryDepthwiseConv2d(BinaryConv2d):
    """A 1-bit depthwise k x k convolution; see :class:`BinaryConv2d`."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        options: OperationOptions | None = None,
    ) -> None:
        super().__init__(channels, channels, kernel_size, stride, dilation, channels, options)


_is_conv, _is_depthwise = Plain(BinaryConv2d), Plain(BinaryDepthwiseConv2d)


def _is_plain_conv(conv: nn.Module) -> bool:
    return _is_conv(conv) or _is_depthwise(conv)


def _affine(conv: BinaryConv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of the integer sums: alpha and batch norm with its running statistics.

    Made anew at each call, so a change of weights or statistics is never missed.
    """
    if getattr(norm, "moves", None) is not None:
        norm.moves.make()  # type: ignore[union-attr, operator]
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise RuntimeError("pack: expected batch norms with running statistics, got one without")
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = wide(mean.dtype)
    return (factor * conv.scale().double()).to(dtype), shift.to(dtype)


def _foldable(conv: BinaryConv2d, norm: nn.Module) -> bool:
    """Whether ``norm`` of ``conv`` is a scale and a shift of the integer sums."""
    if (
        norm.training
        or conv.full_precision
        or conv.real_weights
        or getattr(norm, "running_mean", None) is None
    ):
        return False
    # A compiler or exporter looks on through patched modules. It is shown the same arithmetic.
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in (conv, norm))
        return isinstance(norm, nn.BatchNorm2d) and not hooked
    return _is_plain_conv(conv) and is_plain_norm(norm)


def _normalized(conv: BinaryConv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``norm`` of ``conv``; in evaluation mode of the child as the packed layer computes it.

    That is in float32 at least: rounded to half precision, a small value could lose its sign.
    """
    if not _foldable(conv, norm):
        y: Tensor = norm(conv(x))
        return y
    scale, shift = _affine(conv, norm)
    dtype = wide(x.dtype)
    y = conv.binary(x, "none", dtype)
    # Two operations, so that no fused one rounds once where the packed layer rounds twice.
    return scale.to(dtype).view(-1, 1, 1) * y + shift.to(dtype).view(-1, 1, 1)


class BinaryConvBN(nn.Module):
    """A 1-bit convolution and a batch norm; with ``pre_bn`` the norm first and a ReLU at the end.

    Takes one map, or several that are meant side by side.

    Args:
        affine: the batch norm has scale and shift.
        options: see :class:`BinaryConv2d`; ``pre_bn`` is read too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        affine: bool = True,
        options: OperationOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or OperationOptions()
        self.pre_bn = options.pre_bn
        self.conv = BinaryConv2d(
            in_channels, out_channels, kernel_size, stride, dilation, options=options
        )
        self.bn = BatchNorm2d(in_channels if self.pre_bn else out_channels, affine=affine)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        joined = x if isinstance(x, Tensor) else concatenate(x)
        if self.pre_bn:
            return F.relu(self.conv(self.bn(joined)))
        return _normalized(self.conv, self.bn, joined).to(result_dtype(joined))

    def freeze(self) -> nn.Module:
        """The layer on bits, for evaluation; see :func:`pack`."""
        return PackedConvBN(self)


class BinarySepConv(nn.Module):
    """1-bit depthwise k x k, BN, 1-bit 1x1, BN: the separable convolution of CP-NAS, once.

    With ``pre_bn``: BN, 1-bit depthwise, BN, 1-bit 1x1, ReLU. Source: "Binary Neural Networks",
    Fig. 4.8.

    Args:
        dilation: 2 for the dilated convolution, which is the same otherwise.
        affine: the batch norms have scale and shift.
        options: see :class:`BinaryConvBN`.
    """

    def __init__(
        self,
        kernel_size: int,
        channels: int,
        stride: int = 1,
        affine: bool = True,
        options: OperationOptions | None = None,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        options = options or OperationOptions()
        self.pre_bn = options.pre_bn
        self.depthwise = BinaryDepthwiseConv2d(channels, kernel_size, stride, dilation, options)
        self.bn1 = BatchNorm2d(channels, affine=affine)
        self.pointwise = BinaryConv2d(channels, channels, 1, options=options)
        self.bn2 = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        dtype = result_dtype(x)
        if self.pre_bn:
            x = _normalized(self.depthwise, self.bn2, self.bn1(x))
            return F.relu(self.pointwise(x)).to(dtype)
        x = _normalized(self.depthwise, self.bn1, x)
        return _normalized(self.pointwise, self.bn2, x).to(dtype)

    def freeze(self) -> nn.Module:
        """The layer on bits, for evaluation; see :func:`pack`."""
        return PackedSepConv(self)


# --- Parent and child -----------------------------------------------------------------------------


def _layers(module: nn.Module) -> Iterator[BinaryConv2d]:
    return (layer for layer in module.modules() if isinstance(layer, BinaryConv2d))


def use_full_precision(module: nn.Module, parent: bool) -> None:
    """Let every 1-bit convolution in ``module`` be the parent's, or the child's."""
    for layer in _layers(module):
        layer.full_precision = parent


def use_real_weights(module: nn.Module, real: bool) -> None:
    """Let every layer in ``module`` compute with its latents themselves, or with their signs."""
    for layer in module.modules():
        if isinstance(layer, BinaryConv2d | Signed):
            layer.real_weights = real


def use_surrogate(module: nn.Module, ste: str, weight_ste: str | None = None) -> None:
    """Let every 1-bit convolution in ``module`` have these derivatives for its signs.

    Args:
        ste, weight_ste: as in :class:`~fastbandit.operations.OperationOptions`; None leaves it.
    """
    OperationOptions().changed({"ste": ste, "weight_ste": weight_ste})  # refuses another value
    for layer in _layers(module):
        layer.ste = ste  # type: ignore[assignment]
        if weight_ste is not None:
            layer.weight_ste = weight_ste  # type: ignore[assignment]


@contextmanager
def surrogate_of(module: nn.Module, ste: str) -> Iterator[None]:
    """Within it every child in ``module`` has this derivative for the signs of its maps."""
    before = [(layer, layer.ste) for layer in _layers(module) if not layer.full_precision]
    try:
        use_surrogate(module, ste)
        yield
    finally:
        for layer, own in before:
            layer.ste = own


def latents(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weights in ``module`` that it computes with the signs of, each once."""
    seen: set[int] = set()
    for layer in module.modules():
        weights = [layer.weight] if isinstance(layer, BinaryConv2d) else []
        weights += getattr(layer, "signed", ())
        for weight in weights:
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight


@torch.no_grad()
def clamp_latents(weights: Sequence[Tensor]) -> None:
    """Latents to [-1, 1], after a step: beyond it they would have no gradient any more."""
    if weights:
        torch._foreach_clamp_min_(list(weights), -1.0)
        torch._foreach_clamp_max_(list(weights), 1.0)


# --- Packed ---------------------------------------------------------------------------------------


def _norm_of(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A copy for evaluation of the batch norm before a sign."""
    return copy.deepcopy(layer).eval().requires_grad_(False)


class PackedConv2d(PackedLayer):
    """:class:`BinaryConv2d` for evaluation: bits of the weights, and a scale."""

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        self._keep("conv", layer)
        self._keep_affine(weight_scale(layer.weight, layer.alpha), None)

    def forward(self, x: Tensor) -> Tensor:
        return self._scaled("conv", self._bits(x), result_dtype(x))


class PackedConvBN(PackedLayer):
    """:class:`BinaryConvBN` for evaluation: bits of the weights, a scale and a shift."""

    def __init__(self, layer: BinaryConvBN) -> None:
        super().__init__()
        self.pre_bn = layer.pre_bn
        self._keep("conv", layer.conv)
        if self.pre_bn:
            self.bn = _norm_of(layer.bn)
            self._keep_affine(weight_scale(layer.conv.weight, layer.conv.alpha), None)
        else:
            self._keep_affine(*_affine(layer.conv, layer.bn))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        if self.pre_bn:
            joined = x if isinstance(x, Tensor) else concatenate(x)
            return F.relu(self._scaled("conv", self._bits(self.bn(joined)), result_dtype(joined)))
        first = x if isinstance(x, Tensor) else x[0]
        return self._scaled("conv", self._bits(x), result_dtype(first))


class PackedSepConv(PackedLayer):
    """:class:`BinarySepConv` for evaluation: the map between its two convolutions is bits.

    The batch norm between them and the sign after it are an integer threshold for each channel.
    """

    def __init__(self, layer: BinarySepConv) -> None:
        super().__init__()
        self.pre_bn = layer.pre_bn
        self._keep("depthwise", layer.depthwise)
        self._keep("pointwise", layer.pointwise)
        if self.pre_bn:
            self.bn = _norm_of(layer.bn1)
            first = _affine(layer.depthwise, layer.bn2)
            self._keep_affine(weight_scale(layer.pointwise.weight, layer.pointwise.alpha), None)
        else:
            first = _affine(layer.depthwise, layer.bn1)
            self._keep_affine(*_affine(layer.pointwise, layer.bn2))
        threshold, flip = ops.sign_threshold(
            first[0].detach(), first[1].detach(), layer.depthwise.taps
        )
        self.register_buffer("threshold", threshold)
        self.register_buffer("flip", flip)

    def forward(self, x: Tensor) -> Tensor:
        bits = self._bits(self.bn(x) if self.pre_bn else x)
        own, first = self._buffers, self.settings["depthwise"]  # an attribute takes a microsecond
        y = separable(
            bits, own["depthwise_bits"], own["threshold"], own["flip"], own["pointwise_bits"],
            *self._affine(), first["channels"], first["stride"], first["padding"],
            first["dilation"], first["pad"] == "plus_one", result_dtype(x),
        )  # fmt: skip
        return F.relu(y) if self.pre_bn else y


_is_conv_bn, _is_sep_conv = Plain(BinaryConvBN), Plain(BinarySepConv)


def _replaceable(layer: nn.Module) -> bool:
    """Whether the packed layer computes all that ``layer`` does, hooks and replaced parts too."""
    if _is_conv_bn(layer):
        return _is_plain_conv(layer.conv) and (layer.pre_bn or _foldable(layer.conv, layer.bn))
    if _is_sep_conv(layer):
        last = _is_plain_conv(layer.pointwise)
        if layer.pre_bn:
            return last and _foldable(layer.depthwise, layer.bn2)
        return _foldable(layer.depthwise, layer.bn1) and _foldable(layer.pointwise, layer.bn2)
    return _is_plain_conv(layer)


def _replaced(module: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """``module`` with its 1-bit layers packed; one that stands at several places, once."""
    if module not in replacements:
        replacements[module] = module
        if _replaceable(module):
            replacements[module] = module.freeze()  # type: ignore[operator]
        # What is left of a 1-bit block is called by its own forward, with its own layers.
        elif not isinstance(module, BinaryConvBN | BinarySepConv):
            for name, child in module._modules.items():
                if child is not None:
                    setattr(module, name, _replaced(child, replacements))
    return replacements[module]


def pack(network: nn.Module) -> nn.Module:
    """A copy of ``network``, or of a single layer, for evaluation whose 1-bit layers hold bits.

    Its logits are those of ``network`` in evaluation mode, bit for bit, where the rest of the two
    computes the same. A node of a cell is packed once for all its edges. A 1-bit layer to which
    something is attached (a hook, a forward of its own) stays as it is.

    A change of the weights afterwards does not reach the copy. It has no gradient: an input that
    requires grad is refused.

    Raises:
        RuntimeError: ``network`` is the parent, or computes with real weights.
    """
    for name in ("full_precision", "real_weights"):
        if any(getattr(layer, name, False) for layer in network.modules()):
            raise RuntimeError(f"pack: expected the child, got a network with {name} set")
    packed = copy.deepcopy(network).eval()
    return _replaced(packed, {}).requires_grad_(False)
