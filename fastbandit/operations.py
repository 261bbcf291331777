"""The table of arms: every operation that an edge may hold, and the options of those with variants.

A new operation is a row here and a class in :mod:`fastbandit.nn.operations`; the search spaces of
:mod:`fastbandit.space` name those they hold. A new option is a field of :class:`OperationOptions`,
named in the row of each operation that it bears on. This module loads nothing but the standard
library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar, get_args, get_type_hints

__all__ = [
    "LATER",
    "OF_CELLS",
    "OF_TRAINING",
    "OPERATIONS",
    "DenoiseKind",
    "GaborKind",
    "Operation",
    "OperationOptions",
    "check_option",
    "without_defaults",
]

#: The mean of the denoising block.
DenoiseKind = Literal["dot", "gaussian", "mean", "median"]
#: The parameterisation of the Gabor filters: ours, or that of the released code.
GaborKind = Literal["pixels", "released"]

#: Options that a file holds only where they are not at their default: they came after the format.
LATER = (
    "weights", "pool_bn", "alpha", "pad", "pre_bn", "ste", "weight_ste", "preprocess", "residual"
)  # fmt: skip
#: Options of the cells, not of an operation.
OF_CELLS = ("preprocess", "residual")
#: Options of the backward pass alone: what a network computes does not depend on them.
OF_TRAINING = ("ste", "weight_ste")


@dataclass(frozen=True)
class Operation:
    """One arm: how it is shown, what it costs, and which options it has.

    Args:
        name: in files, in the text of DARTS, and on the command line.
        label: on an arc of a drawing.
        colour: of that arc; text in it needs a contrast of at least 4.5 to 1 on white.
        maps: feature maps of the size of its input that stay in memory for the backward pass at
            stride 1, rounded (torch.autograd.graph.saved_tensors_hooks tells; the indices of max
            pooling are int64, hence 4).
        dense: multiplications for each output element that grow with the channels.
        fixed: those that do not.
        options: fields of :class:`OperationOptions` that change what it computes.
        binary: its convolutions have 1-bit weights and 1-bit input.
    """

    name: str
    label: str
    colour: str
    maps: int
    dense: int
    fixed: int
    options: tuple[str, ...] = ()
    binary: bool = False


# Okabe and Ito's palette, darkened for the contrast: pools and skip, dense and dilated
# convolutions, separable convolutions, Gabor filters, denoising blocks.
_GREY, _BLUE, _GREEN, _ORANGE, _PURPLE = "#5b6470", "#0068a5", "#00795a", "#b04a00", "#9b3f76"

_POOL, _REAL = ("pool_bn",), ("weights",)
_BIT = ("alpha", "pad", "pre_bn", "ste", "weight_ste")

#: Every operation there is, by name. Files list operations in this order.
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("max_pool_3x3", "max pool", _GREY, maps=4, dense=0, fixed=0, options=_POOL),
        Operation("avg_pool_3x3", "avg pool", _GREY, maps=2, dense=0, fixed=0, options=_POOL),
        Operation("skip_connect", "skip", _GREY, maps=0, dense=0, fixed=0, options=_REAL),
        Operation("conv_3x3", "conv 3×3", _BLUE, maps=2, dense=9, fixed=0),
        Operation("conv_5x5", "conv 5×5", _BLUE, maps=2, dense=25, fixed=0),
        Operation("sep_conv_3x3", "sep 3×3", _GREEN, maps=5, dense=9, fixed=9),
        Operation("sep_conv_5x5", "sep 5×5", _GREEN, maps=5, dense=25, fixed=25),
        Operation("gab_filt_3x3", "Gabor", _ORANGE, maps=2, dense=0, fixed=9, options=("gabor",)),
        Operation(
            "dtp_blok_3x3", "denoise", _PURPLE, maps=2, dense=2, fixed=0,
            options=("denoise", "denoise_1x1"),
        ),
        Operation("conv_1x1", "conv 1×1", _BLUE, maps=2, dense=1, fixed=0),
        Operation("conv_7x7", "conv 7×7", _BLUE, maps=2, dense=49, fixed=0),
        Operation("dil_conv_3x3", "dil 3×3", _BLUE, maps=3, dense=1, fixed=9, options=_REAL),
        Operation("dil_conv_5x5", "dil 5×5", _BLUE, maps=3, dense=1, fixed=25, options=_REAL),
        Operation("sep_conv_m_3x3", "sep-m 3×3", _GREEN, maps=6, dense=2, fixed=18, options=_REAL),
        Operation("sep_conv_m_5x5", "sep-m 5×5", _GREEN, maps=6, dense=2, fixed=50, options=_REAL),
        Operation("dil_conv_1x1", "dil 1×1", _BLUE, maps=3, dense=1, fixed=1, options=_REAL),
        Operation("dil_conv_7x7", "dil 7×7", _BLUE, maps=3, dense=1, fixed=49, options=_REAL),
        Operation("zero", "zero", _GREY, maps=0, dense=0, fixed=0),
        Operation(
            "bin_dil_conv_3x3", "bin dil 3×3", _BLUE, maps=4, dense=1, fixed=9,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_dil_conv_5x5", "bin dil 5×5", _BLUE, maps=4, dense=1, fixed=25,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_sep_conv_3x3", "bin sep 3×3", _GREEN, maps=4, dense=1, fixed=9,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_sep_conv_5x5", "bin sep 5×5", _GREEN, maps=4, dense=1, fixed=25,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_conv_3x3", "bin 3×3", _GREEN, maps=2, dense=9, fixed=0,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_conv_5x5", "bin 5×5", _GREEN, maps=2, dense=25, fixed=0,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_conv_d2_3x3", "bin 3×3 d2", _BLUE, maps=2, dense=9, fixed=0,
            options=_BIT, binary=True,
        ),
        Operation(
            "bin_conv_d2_5x5", "bin 5×5 d2", _BLUE, maps=2, dense=25, fixed=0,
            options=_BIT, binary=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OperationOptions:
    """How operations with variants are built.

    Args:
        denoise: what a denoising block does; see :class:`fastbandit.nn.denoise.Denoise`.
        denoise_1x1: a 1x1 convolution in the denoising blocks.
        gabor: how learnt numbers become Gabor parameters; see :class:`fastbandit.nn.gabor.Gabor`.
        weights: of the convolutions of ``dil_conv``, ``sep_conv_m`` and ``skip_connect``: ``sign``
            has 1-bit weights on real maps, with one scale for a layer (BNAS, Chen et al., AAAI
            2020).
        pool_bn: a batch norm after pooling; DARTS has none in a final network.
        alpha: scale of 1-bit weights: the mean of their absolute values over a filter or over the
            layer, or none (XNOR-Net, Rastegari et al., ECCV 2016).
        pad: what surrounds the map of a 1-bit convolution: 0, or +1.
        pre_bn: batch norm before each sign and a ReLU at the end (Kim et al., ECCV 2020), in place
            of a batch norm after each 1-bit convolution.
        ste, weight_ste: derivative that stands for that of the sign, of maps and of weights; see
            :func:`fastbandit.ops.sign_ste`.
        preprocess: the 1x1 convolutions that bring the inputs of a cell to its width: ``full``
            real, ``binary`` 1-bit where their stride is 1, ``sign`` real maps and 1-bit weights
            where it is 1.
        residual: a cell adds its last input to its output; at stride 2 through a batch norm and a
            real 2x2 convolution (Kim et al., ECCV 2020). The other input of the cell after it is
            brought to its size by a 1-bit 3x3 convolution.

    Raises:
        ValueError: an option has an unknown value.
    """

    denoise: DenoiseKind = "dot"
    denoise_1x1: bool = False
    gabor: GaborKind = "pixels"
    weights: Literal["float", "sign"] = "float"
    pool_bn: bool = True
    alpha: Literal["filter", "layer", "none"] = "filter"
    pad: Literal["zero", "plus_one"] = "zero"
    pre_bn: bool = False
    ste: Literal["poly", "clip", "tanh", "identity"] = "poly"
    weight_ste: Literal["clip", "identity"] = "clip"
    preprocess: Literal["full", "binary", "sign"] = "full"
    residual: bool = False

    def __post_init__(self) -> None:
        for name in _choices():
            check_option(name, getattr(self, name))

    @classmethod
    def of(cls, settings: object) -> OperationOptions:
        """The options among the attributes of ``settings``; the default where it has none."""
        names = filter(partial(hasattr, settings), _choices())
        return OperationOptions(**{name: getattr(settings, name) for name in names})

    def recorded(self) -> dict[str, Any]:
        """The options as a file holds them: those of :data:`LATER` where they are not default."""
        return without_defaults({name: getattr(self, name) for name in _choices()})

    def changed(self: Options, changes: Mapping[str, Any]) -> Options:
        """A copy with these options; None leaves one as it is.

        Raises:
            TypeError: there is no option of that name.
            ValueError: an option has an unknown value.
        """
        unknown = set(changes) - set(_choices())
        if unknown:
            raise TypeError(
                f"got an unexpected keyword argument {min(unknown)!r}; the options of operations "
                f"are {', '.join(_choices())}"
            )
        kept = {name: value for name, value in changes.items() if value is not None}
        return replace(self, **kept)


Options = TypeVar("Options", bound=OperationOptions)


def without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without those options of :data:`LATER` that are at their default."""
    default = OperationOptions()
    return {
        name: value
        for name, value in values.items()
        if name not in LATER or value != getattr(default, name)
    }


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """The values of each option."""
    hints = get_type_hints(OperationOptions)
    return {name: (False, True) if hint is bool else get_args(hint) for name, hint in hints.items()}


def check_option(name: str, value: object) -> None:
    """Refuse a value that the option of that name has not.

    Raises:
        ValueError: the message lists those it has.
    """
    values = _choices()[name]
    if value not in values or type(value) is not type(values[0]):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}, got {value!r}")
