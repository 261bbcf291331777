"""The supernet: every operation on every edge, with one sampled path alive at a time.

Normalisation - stem (3x3 convolution to 3 C channels, batch norm) - cells - global average
pooling - linear classifier. The cell of index V // 3 and that of index 2 V // 3 halve the map
and double C; there the edges from the inputs have stride 2. Each cell takes the previous output
through ReLU - 1x1 convolution - batch norm to its C channels, and gives its nodes, concatenated. A
cell of two inputs takes the output before that one too.
Source: Zhang, Xu et al., "Binary Neural Networks", section 4.2; Chen et al., ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fastbandit.nn.blocks import classify
from fastbandit.nn.cell import concatenate, run_nodes
from fastbandit.nn.norm import BatchNorm2d, Normalize, reset_running_stats, use_cumulative_average
from fastbandit.nn.operations import make
from fastbandit.nn.preprocess import preprocessing
from fastbandit.nn.signs import shared_signs
from fastbandit.operations import OperationOptions
from fastbandit.space import SearchSpace, cell_sequence, get, reduction_cells, widest

__all__ = ["SuperCell", "Supernet"]


class SuperCell(nn.Module):
    """One cell with all operations on all edges; runs those that :meth:`set_arms` chose.

    Args:
        space: operations and nodes.
        in_channels: channels of the previous output.
        channels: C of this cell; the output has ``nodes * channels``.
        stride: of the edges from the inputs: 2 in a reduction cell, else 1.
        options: how operations with variants are built.
        before: channels of the output before that one and how much larger it is (1 or 2), for a
            space with two inputs.
    """

    def __init__(
        self,
        space: SearchSpace,
        in_channels: int,
        channels: int,
        stride: int,
        options: OperationOptions,
        before: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.space = space
        if space.inputs == 2:
            self.preprocess0 = preprocessing(before[0], channels, before[1], False, options)
        self.preprocess = preprocessing(in_channels, channels, 1, False, options)
        self.edges = nn.ModuleList(
            nn.ModuleList(
                make(name, channels, stride if source < space.inputs else 1, False, options)
                for name in space.operations
            )
            for source, _ in space.edges
        )
        self._names: tuple[str, ...] = ()  # of the chosen operations in their ModuleLists

    def set_arms(self, arms: Sequence[int]) -> None:
        """Choose one operation for every edge."""
        if len(arms) != len(self.edges):
            raise ValueError(f"SuperCell: arms: expected {len(self.edges)}, got {len(arms)}")
        self._names = tuple(map(str, arms))

    @property
    def chosen(self) -> list[nn.Module]:
        """The chosen operations in the order of the edges; none before :meth:`set_arms`.

        They are looked up at each call: any of them may have been replaced since it was chosen.
        """
        # Not operations[arm], which takes ten times as long.
        return [
            operations._modules[name]  # type: ignore[misc]
            for operations, name in zip(self.edges, self._names, strict=False)
        ]

    @property
    def preprocesses(self) -> list[nn.Module]:
        """What brings the inputs to the cell's width."""
        both = self.space.inputs == 2
        return [self.preprocess0, self.preprocess] if both else [self.preprocess]

    def forward(
        self, x: Tensor | list[Tensor], before: Tensor | list[Tensor] | None = None
    ) -> list[Tensor]:
        """The nodes after the inputs, which side by side are the output.

        Args:
            x: the previous output, as one map or as several that are meant side by side.
            before: the output before it, for a space with two inputs.
        """
        inputs = [self.preprocess(x)]
        if self.space.inputs == 2:
            inputs.insert(0, self.preprocess0(before))
        return run_nodes(inputs, self.space.edges, self.chosen)[len(inputs) :]


class Supernet(nn.Module):
    """Shared weights of every network of a search space.

    Call :meth:`set_path` first; ``forward`` then runs that path and nothing else, so memory and
    time are those of one network. Batch norms have no scale and shift, except in the Gabor and
    denoising blocks, which start as the identity, and average their statistics cumulatively:
    call :meth:`reset_path_statistics` when a path begins.

    Args:
        space: a :class:`~fastbandit.space.SearchSpace` or the name of one.
        in_channels: channels of the images.
        classes: logits.
        channels: C of the first cell.
        cells: cells in the chain, at least ``space.least_cells``, each with weights of its own;
            :func:`~fastbandit.space.cell_sequence` says of which type each is. Default: one of each
            type, or 6 where cells have two inputs. With the name of a space with one input and
            fewer than six cells, there are that many types.
        nodes: nodes of a cell, default 4; only with the name of a space.
        mean, std: of the images, for each channel or one for all; None: 0 and 1.
        options: how operations with variants are built.
        changes: single options by name (``denoise``, ``denoise_1x1``, ``gabor``), in place of those
            of ``options``.

    Raises:
        ValueError: a size below 1, too few cells, an unknown name or option, or the option
            ``residual``, which final networks alone have.
    """

    def __init__(
        self,
        space: SearchSpace | str,
        *,
        in_channels: int,
        classes: int,
        channels: int,
        cells: int | None = None,
        nodes: int | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        options: OperationOptions | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        options = (options or OperationOptions()).changed(changes)
        sizes = {"in_channels": in_channels, "classes": classes, "channels": channels}
        if cells is not None:
            sizes["cells"] = cells
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Supernet: {name}: expected >= 1, got {size}")
        if isinstance(space, str):
            space = get(space, nodes=4 if nodes is None else nodes)
            if space.inputs == 1 and cells is not None and cells < space.cell_types:
                space = get(space.name, nodes=space.nodes, cell_types=cells)
        elif nodes is not None and nodes != space.nodes:
            raise ValueError(
                f"Supernet: nodes: expected {space.nodes} as in the search space, got {nodes}"
            )
        if options.residual:
            raise ValueError(
                "Supernet: residual: expected False, as a search has no residual cells"
            )
        cells = space.cells if cells is None else cells
        if cells < space.least_cells:
            raise ValueError(
                f"Supernet: cells: expected at least {space.least_cells}, so that each of the "
                f"{space.cell_types} cell types of the search space is there, got {cells}"
            )
        self.space = space
        self.reductions = reduction_cells(cells)
        self.normalize = Normalize(in_channels, mean, std)
        self.stem = nn.Conv2d(in_channels, 3 * channels, 3, padding=1, bias=False)
        self.stem_bn = BatchNorm2d(3 * channels, affine=False)
        self.cells = nn.ModuleList()
        self.cell_type = tuple(space.cell_types * index // cells for index in range(cells))
        if space.inputs == 2:
            self.cell_type = cell_sequence(
                cells, space.cell_types, inputs=2, reductions=self.reductions
            )
        width = 3 * channels
        before = (width, 1)  # the output before the previous one: channels, how much larger it is
        for index in range(cells):
            reduction = index in self.reductions
            channels *= 2 if reduction else 1
            stride = 2 if reduction else 1
            cell = SuperCell(space, width, channels, stride, options, before)
            self.cells.append(cell)
            before, width = (width, stride), space.nodes * channels
        self.classifier = nn.Linear(width, classes)
        use_cumulative_average(self)
        self._path: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Edges of all cell types: the length of a path."""
        return self.space.rows

    @property
    def arms(self) -> int:
        """Operations to choose from on each edge."""
        return self.space.arms

    @property
    def path(self) -> tuple[int, ...] | None:
        """The current path, one arm for each row; None before the first :meth:`set_path`."""
        return self._path

    def set_path(self, choice: Sequence[int] | Tensor) -> None:
        """Make ``choice`` the path that ``forward`` runs.

        Args:
            choice: ``rows`` arms, as a sequence or an integer tensor; row = cell type * edges of
                a cell + edge.

        Raises:
            ValueError: wrong length, or an arm out of range. The old path stays then.
        """
        values = self.space.check_choice(choice)  # type: ignore[arg-type]
        edges = len(self.space.edges)
        for kind, cell in zip(self.cell_type, self.cells, strict=True):
            assert isinstance(cell, SuperCell)
            cell.set_arms(values[kind * edges : (kind + 1) * edges])
        self._path = tuple(values)

    def widest_path(self, by: Literal["memory", "compute"] = "memory") -> list[int]:
        """The choice that costs most memory (or compute); see :func:`fastbandit.space.widest`."""
        return widest(self.space, by=by, channels=self.stem.out_channels // 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, in_channels, H, W] in [0, 1], by the current path."""
        return self.forward_normalized(self.normalize(x))

    def forward_normalized(self, x: Tensor) -> Tensor:
        """:meth:`forward` after its first layer: x is what ``normalize`` makes of the images."""
        if self._path is None:
            raise RuntimeError("Supernet: no path is set: call set_path(choice) before forward")
        x = self.stem_bn(self.stem(x))
        before = output = [x]
        with shared_signs():
            for cell in self.cells:
                before, output = output, cell(output, before)
        return classify(concatenate(output), self.classifier)

    def path_modules(self) -> Iterator[nn.Module]:
        """Every module, submodules included, that ``forward`` runs on the current path.

        Normalisation, stem, preprocessing of each cell, the chosen operations, the classifier;
        each once. Without a path: those that every path has.
        """
        yield from self.normalize.modules()
        yield from self.stem.modules()
        yield from self.stem_bn.modules()
        for cell in self.cells:
            assert isinstance(cell, SuperCell)
            for preprocess in cell.preprocesses:
                yield from preprocess.modules()
        for cell in self.cells:
            for operation in cell.chosen:  # type: ignore[union-attr]
                yield from operation.modules()
        yield from self.classifier.modules()

    def path_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of :meth:`path_modules`, each once."""
        for module in self.path_modules():
            yield from module.parameters(recurse=False)

    def reset_path_statistics(self) -> None:
        """Forget the running statistics of the batch norms on the current path."""
        reset_running_stats(self.path_modules())
