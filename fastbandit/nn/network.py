"""The final network of a genotype: a chain of any number of its cells, trained from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit.nn.blocks import classify
from fastbandit.nn.cell import concatenate, run_nodes
from fastbandit.nn.denoise import DenoiseBlock
from fastbandit.nn.norm import BatchNorm2d, Normalize, set_eps
from fastbandit.nn.operations import Identity, make
from fastbandit.nn.preprocess import preprocessing
from fastbandit.nn.signs import shared_signs
from fastbandit.operations import OperationOptions
from fastbandit.space import cell_sequence, reduction_cells

if TYPE_CHECKING:
    from fastbandit import genotype as genotypes

__all__ = ["AuxiliaryHead", "Network", "NetworkCell", "cell_sequence"]


def _drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero whole samples of a path with that probability and scale the others up (FractalNet)."""
    keep = 1.0 - probability
    mask = x.new_empty(x.size(0), 1, 1, 1).bernoulli_(keep).div_(keep)
    return x * mask


def _dropping(
    operation: Callable[[Tensor], Tensor], probability: float
) -> Callable[[Tensor], Tensor]:
    # As in DARTS, an identity is never dropped: something must reach the node.
    if isinstance(operation, Identity):
        return operation
    return lambda x: _drop_path(operation(x), probability)


class Shortcut(nn.Module):
    """The last input of a cell at the size of its output: itself, or batch norm and a real 2x2
    convolution of stride 2 (Kim et al., ECCV 2020). An odd map is padded with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn = self.conv = None
        if stride == 2:
            self.bn = BatchNorm2d(in_channels)
            self.conv = nn.Conv2d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.bn is None or self.conv is None:
            return x
        return self.conv(F.pad(self.bn(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2)))


class NetworkCell(nn.Module):
    """One cell of a genotype: its inputs at its width, then the edges of each node, summed.

    Args:
        in_channels: channels of the previous output.
        channels: C of this cell.
        stride: of the edges from the inputs: 2 in a reduction cell, else 1.
        options: how operations with variants are built.
        before: channels of the output before that one and how much larger it is (1 or 2), for a
            cell of two inputs.
        residual: add the previous output to this cell's.
    """

    def __init__(
        self,
        cell: genotypes.Cell,
        in_channels: int,
        channels: int,
        stride: int,
        options: OperationOptions,
        before: tuple[int, int] = (0, 1),
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = cell.inputs
        if cell.inputs == 2:
            self.preprocess0 = preprocessing(before[0], channels, before[1], True, options)
        self.preprocess = preprocessing(in_channels, channels, 1, True, options)
        # The operations are looked up at each call: any of them may have been replaced by then.
        self.operations = nn.ModuleList()
        self._edges: list[tuple[int, int]] = []
        for source, node, name in cell.edges:
            first = stride if source < cell.inputs else 1
            self.operations.append(make(name, channels, first, True, options))
            self._edges.append((source, node))
        self.concat = tuple(cell.concat)
        self.out_channels = len(self.concat) * channels
        self.shortcut = Shortcut(in_channels, self.out_channels, stride) if residual else None

    def forward(
        self,
        x: Tensor | list[Tensor],
        drop_path_prob: float = 0.0,
        before: Tensor | list[Tensor] | None = None,
    ) -> list[Tensor]:
        """The nodes that side by side are the output.

        Args:
            x: the previous output, as one map or as several that are meant side by side.
            before: the output before it, for a cell of two inputs.
        """
        operations: list[Callable[[Tensor], Tensor]] = list(self.operations)
        if drop_path_prob > 0.0:
            operations = [_dropping(operation, drop_path_prob) for operation in operations]
        inputs = [self.preprocess(x)]
        if self.inputs == 2:
            inputs.insert(0, self.preprocess0(before))
        values = run_nodes(inputs, self._edges, operations)
        output = [values[node] for node in self.concat]
        if self.shortcut is None:
            return output
        whole = x if isinstance(x, Tensor) else concatenate(x)
        return [concatenate(output) + self.shortcut(whole)]


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier of DARTS, for a map of any size.

    ReLU, average pooling to 2 x 2, 1x1 convolution to 128, BN, ReLU, 2x2 convolution to 768, BN,
    ReLU, linear. DARTS pools an 8 x 8 map by windows of 5 x 5; here the pooling is adaptive.
    """

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 128, 1, bias=False)
        self.bn1 = BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 768, 2, bias=False)
        self.bn2 = BatchNorm2d(768)
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(x), 2)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.classifier(x.flatten(1))


class Network(nn.Module):
    """Normalisation - stem - cells of a genotype - global average pooling - linear classifier.

    Parameters of the published networks without auxiliary head, as the authors' code counts them
    (images of 3 channels, MNIST of 1; 10 classes; stem without bias, 3x3 to 3 C; every batch norm
    with scale and shift, those of the pools included; no 1x1 convolution in denoising blocks, so
    that a block, hand-placed ones included, has no parameters but its batch norm's; a classifier
    with bias):

    ======================= ======= ======= ================ ===========
    genotype                C       V       hand-placed      parameters
    ======================= ======= ======= ================ ===========
    ABANDIT_CIFAR_1         48      10      3 blocks         5,187,898
    ABANDIT_CIFAR_1         48      6       3 blocks         2,891,674
    ABANDIT_MNIST_NORMAL_1  16      6       none             102,410
    BNAS_XNOR_1             36      20      none             2,499,814
    BNAS_A_KIM              36      20      none             5,578,252
    ======================= ======= ======= ================ ===========

    Args:
        genotype: cells and the options of their operations.
        in_channels: channels of the images, which are in [0, 1].
        classes: logits.
        channels: C of the first cell. None: as in ``genotype.macro``.
        cells: length V of the chain; see :func:`cell_sequence`. None: as in ``genotype.macro``,
            or 6 where there is none.
        mean, std: of the images, for each channel or one for all; None: 0 and 1.
        auxiliary: a second classifier after cell 2 V // 3, for training; see :meth:`forward`.
        drop_path_prob: chance, in [0, 1), that an operation other than the identity is dropped
            for one image in training mode. An attribute: a schedule may change it.
        denoise_blocks: hand-placed denoising blocks on the outputs of cells V // 4, 2 V // 4 and
            3 V // 4. None: as in ``genotype.macro``, or none.
        bn_eps: of every batch norm. None: as in ``genotype.macro``, or 1e-5.
        options: how operations with variants are built. None: as in ``genotype.options``.
        changes: single options by name (``denoise``, ``denoise_1x1``, ``gabor``), in place of those
            of ``options``; None leaves one as it is.

    Raises:
        ValueError: a size below 1, ``channels`` given nowhere, an option out of range.
    """

    def __init__(
        self,
        genotype: genotypes.Genotype,
        *,
        in_channels: int,
        classes: int,
        channels: int | None = None,
        cells: int | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        auxiliary: bool = False,
        drop_path_prob: float = 0.0,
        denoise_blocks: bool | None = None,
        bn_eps: float | None = None,
        options: OperationOptions | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        macro = genotype.macro
        options = (options or genotype.options).changed(changes)
        if channels is None:
            channels = None if macro is None else macro.channels
        if channels is None:
            raise ValueError("Network: channels: expected a number: the genotype says none")
        if cells is None:
            cells = (macro and macro.layers) or 6
        if bn_eps is None:
            bn_eps = 1e-5 if macro is None else macro.bn_eps
        if not 0.0 < bn_eps < 1.0:
            raise ValueError(f"Network: bn_eps: expected in (0, 1), got {bn_eps}")
        if denoise_blocks is None:
            denoise_blocks = macro is not None and macro.denoise_blocks
        sizes = {
            "in_channels": in_channels, "classes": classes, "channels": channels, "cells": cells
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Network: {name}: expected >= 1, got {size}")
        if not 0.0 <= drop_path_prob < 1.0:
            raise ValueError(f"Network: drop_path_prob: expected in [0, 1), got {drop_path_prob}")
        self.drop_path_prob = drop_path_prob
        # The macro of the file describes a chain of its own length only.
        same_length = macro is not None and macro.layers == cells
        self.reductions = macro.reductions if macro and same_length else reduction_cells(cells)
        stem = macro.stem if macro else 3

        self.genotype = genotype
        #: What builds the network from its genotype, beside the normalisation, which is stored.
        self.arguments: dict[str, Any] = {
            **sizes, "denoise_blocks": denoise_blocks, "bn_eps": bn_eps,
            **dataclasses.asdict(options),
        }  # fmt: skip
        #: Of a trained one, how it was trained and on what; a model file has it.
        self.about: dict[str, Any] = {}

        self.normalize = Normalize(in_channels, mean, std)
        self._looked = False  # at the values of images on a GPU
        self.stem = nn.Conv2d(in_channels, stem * channels, 3, padding=1, bias=False)
        # With residual cells the stem is BN - convolution - ReLU.
        self.residual = options.residual
        self.stem_bn = BatchNorm2d(in_channels if options.residual else stem * channels)
        self.cells = nn.ModuleList()
        self.cell_type = cell_sequence(
            cells, len(genotype.cells), inputs=genotype.inputs, reductions=self.reductions
        )
        self.inputs = genotype.inputs
        self.denoise_blocks = nn.ModuleDict()
        after = {cells // 4, 2 * cells // 4, 3 * cells // 4} if denoise_blocks else set()
        self.auxiliary_index = 2 * cells // 3
        self.auxiliary: AuxiliaryHead | None = None
        width = stem * channels
        before = (width, 1)  # the output before the previous one: channels, how much larger it is
        for index, kind in enumerate(self.cell_type):
            reduction = index in self.reductions
            channels *= 2 if reduction else 1
            stride = 2 if reduction else 1
            cell = NetworkCell(
                genotype.cells[kind], width, channels, stride, options, before,
                residual=options.residual and index > 0,
            )  # fmt: skip
            self.cells.append(cell)
            before, width = (width, stride), cell.out_channels
            if index in after:
                self.denoise_blocks[str(index)] = DenoiseBlock(
                    width, 1, options.denoise, options.denoise_1x1
                )
            if auxiliary and index == self.auxiliary_index:
                self.auxiliary = AuxiliaryHead(width, classes)
        self.classifier = nn.Linear(width, classes)
        set_eps(self, bn_eps)

    def forward(self, x: Tensor, with_auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [N, classes] of images [N, in_channels, H, W] in [0, 1].

        Attacks and evaluation call ``network(x)`` and get logits, in either mode. With
        ``with_auxiliary`` the result is (logits, logits of the auxiliary head).

        Raises:
            TypeError: images that are not floating point, such as bytes.
            ValueError: another number of channels; values far outside [0, 1], such as 0 .. 255
                (on a GPU the first call looks, later ones would wait for it); ``with_auxiliary``,
                but the network was built without that head.
        """
        self._check(x)
        return self.forward_normalized(self.normalize(x), with_auxiliary)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The class of each image, int64 [N], in evaluation mode; the mode is restored.

        Args:
            images: [N, in_channels, H, W] in [0, 1].
        """
        modes = [(module, module.training) for module in self.modules()]
        try:
            self.eval()
            logits = self(images)
        finally:
            for module, training in modes:
                module.training = training
        assert isinstance(logits, Tensor)
        return logits.argmax(1)

    def save(self, path: str | Path) -> Path:
        """Write a model file that needs nothing else to be loaded, and a page about it beside.

        Args:
            path: ends in ``.safetensors``; the page has the suffix ``.md``.

        Returns:
            The file, for :func:`fastbandit.load`.
        """
        from fastbandit.models import save_network  # it builds networks

        return save_network(self, path)

    def _check(self, x: Tensor) -> None:
        """Refuse what the normalisation would take in silence: other channels, another scale."""
        if not x.is_floating_point():
            raise TypeError(
                f"Network: expected floating-point images in [0, 1], got {x.dtype}; divide bytes "
                "by 255"
            )
        if x.dim() != 4 or x.shape[1] != self.normalize.mean.numel():
            raise ValueError(
                f"Network: expected images [N, {self.normalize.mean.numel()}, H, W], got "
                f"{list(x.shape)}"
            )
        # A graph that is compiled, exported or recorded has no values to look at.
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta or not x.numel():
            return
        if x.is_cuda:
            if self._looked or torch.cuda.is_current_stream_capturing():
                return
            self._looked = True
        low, high = (float(bound) for bound in torch.aminmax(x.detach()))
        # Attacks may leave [0, 1] where a threat model has no bounds, by less than 1; a comparison
        # written this way lets NaN pass.
        if low < -1 or high > 2:
            raise ValueError(
                f"Network: expected images in [0, 1], got values in [{low:.4g}, {high:.4g}]; the "
                "normalisation is the network's first layer"
            )

    def forward_normalized(
        self, x: Tensor, with_auxiliary: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """:meth:`forward` after its first layer: x is what ``normalize`` makes of the images."""
        if with_auxiliary and self.auxiliary is None:
            raise ValueError("Network: with_auxiliary: the network has no auxiliary head")
        drop_path_prob = self.drop_path_prob if self.training else 0.0
        second: Tensor | None = None
        x = F.relu(self.stem(self.stem_bn(x))) if self.residual else self.stem_bn(self.stem(x))
        before = output = [x]
        with shared_signs():
            for index, cell in enumerate(self.cells):
                before, output = output, cell(output, drop_path_prob, before)
                if str(index) in self.denoise_blocks:
                    output = [self.denoise_blocks[str(index)](concatenate(output))]
                if with_auxiliary and index == self.auxiliary_index:
                    assert self.auxiliary is not None
                    output = [concatenate(output)]
                    second = self.auxiliary(output[0])
        logits = classify(concatenate(output), self.classifier)
        return logits if second is None else (logits, second)
