"""``python -m fastbandit.export``: a trained network as ONNX, QONNX, ``torch.export`` or packed.

The first three need nothing of this package to run: the ops with kernels of our own are written as
plain ones. The network takes images float32 [N, C, H, W] in [0, 1] (normalisation is its first
layer) for any N, the size of the image fixed, and gives logits [N, classes]. ``packed`` is the file
of :mod:`fastbandit.packed`, for networks with 1-bit weights. Before a file is written it is
compared with the network, image by image.
"""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import copy
import importlib.util
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from fastbandit._files import write_atomic
from fastbandit._program import examples, program
from fastbandit.command import check_choices, guard
from fastbandit.models import Model, find_model, load_model
from fastbandit.nn.binary import latents
from fastbandit.nn.denoise import Denoise
from fastbandit.ops.sign_ste import exported_signs
from fastbandit.packed import SUFFIX, load_packed, save_packed
from fastbandit.runs.progress import Progress

__all__ = ["FORMATS", "OPSET", "ExportError", "export_model", "has_onnx", "main"]

#: The formats, and what a file of each ends in.
FORMATS = {"onnx": ".onnx", "qonnx": ".qonnx.onnx", "torch": ".pt2", "packed": SUFFIX}
Format = Literal["onnx", "qonnx", "torch", "packed"]

#: Version of the ONNX operator set, which ONNX Runtime reads since 1.14 (2023).
OPSET = 18

_INPUT, _OUTPUT = "images", "logits"
# Largest difference of the logits, relative to the largest of them: what another order of
# summation makes of float32 in a deep network. A wrong operation is off by orders more.
_TOLERANCE = 1e-4
# One image, and a number that is no power of two: the file must not have one batch size burnt in.
_BATCHES = (1, 5)


class ExportError(ValueError):
    """A network that cannot be exported, or whose export does not compute the same."""


def export_model(model: Model, out: str | Path, kind: Format = "onnx") -> dict[str, Any]:
    """Write a network to a file that runs without this package, or to a packed one.

    Args:
        model: as :func:`fastbandit.models.load_model` gives it.
        out: the file, for instance ``network.onnx`` or ``network.pt2``.
        kind: ``onnx`` (opset 18); ``qonnx``, the same with the signs of 1-bit layers as nodes
            ``BipolarQuant``; ``torch`` (read by :func:`torch.export.load`); ``packed`` (read by
            :func:`fastbandit.load`).

    Returns:
        ``file``, ``format``, ``opset`` (None without ONNX), ``input``, ``output`` (name, type and
        shape, with N for the batch), ``difference``: the largest of any logit, relative to the
        largest logit; ``batches``: the batch sizes compared. Of ``packed`` also what
        :func:`fastbandit.packed.save_packed` returns; its difference is 0 or it is not written. Of
        ``qonnx`` also ``signs``, the number of nodes.

    Raises:
        ExportError: the network has an operation that the format lacks, the export computes
            something else, or a package is missing. Nothing is written then.
    """
    shape = model.data.get("shape")
    if not (isinstance(shape, Sequence) and len(shape) == 3):
        raise ExportError(f"model: data.shape: expected [C, H, W] of its images, got {shape!r}")
    more: dict[str, Any] = {}
    if kind == "packed":
        difference, more = _packed(model, Path(out), shape)
    else:
        onnx = kind != "torch"
        if onnx and (missing := _missing()):
            raise ExportError(
                f"format {kind} needs {', '.join(missing)}: pip install onnx onnxscript onnxruntime"
            )
        network = _exportable(model.network, kind)
        program = _program_of(network, kind, shape)
        data = _onnx_bytes(program, kind) if onnx else _torch_bytes(program)
        run = _onnx_runner(data) if onnx else _torch_runner(data)
        difference = _difference(network, run, shape)
        if kind == "qonnx":
            more = {"signs": _count_signs(data)}
        write_atomic(out, data)
    return {
        "file": str(out),
        "format": kind,
        "opset": OPSET if kind in ("onnx", "qonnx") else None,
        "input": {"name": _INPUT, "dtype": "float32", "shape": ["N", *shape]},
        "output": {
            "name": _OUTPUT,
            "dtype": "float32",
            "shape": ["N", model.architecture.classes],
        },
        "difference": difference,
        "batches": list(_BATCHES),
        **more,
    }


def _packed(model: Model, out: Path, shape: Sequence[int]) -> tuple[float, dict[str, Any]]:
    """Write the packed file, unless what it loads as gives another bit of any logit."""
    network = _exportable(model.network, "packed")
    network.about = {"data": model.data, "training": model.training}  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        file = Path(folder) / out.name
        try:
            sizes = save_packed(network, file)  # type: ignore[arg-type]
        except ValueError as error:
            raise ExportError(f"format packed: {error}") from None
        difference = _difference(network, load_packed(file), shape)
        if difference:
            raise ExportError(
                f"the packed network differs from the original by {difference:.2g} of its largest "
                "logit, expected the same bits; nothing was written"
            )
        file.replace(out)
    return difference, dict(sizes)


def _program_of(
    network: nn.Module, kind: str, shape: Sequence[int]
) -> torch.export.ExportedProgram:
    # An ONNX file has no gradient, so a sign needs no surrogate there; a program of torch has one.
    signs: AbstractContextManager[None] = nullcontext()
    if kind == "onnx":
        signs = exported_signs()
    elif kind == "qonnx":
        from fastbandit import _qonnx

        signs = exported_signs(_qonnx.bipolar)
    # Only the batch may vary: cells halve the map, and a size is easier to trust than a formula.
    batch = {0: torch.export.Dim("N", min=1)}
    with signs:
        return torch.export.export(
            network, (_images(2, shape),), dynamic_shapes=(batch,), strict=False
        )


def _count_signs(data: bytes) -> int:
    import onnx

    from fastbandit import _qonnx

    return len(_qonnx.bipolar_nodes(onnx.load_from_string(data)))


def _exportable(network: nn.Module, kind: str) -> nn.Module:
    """A copy on the CPU, in evaluation mode, without gradients."""
    if kind == "qonnx" and next(latents(network), None) is None:
        raise ExportError(
            "format qonnx: expected a network with 1-bit layers, got one without; it is --format "
            "onnx"
        )
    if kind in ("onnx", "qonnx") and any(
        isinstance(layer, Denoise) and layer.kind == "median" for layer in network.modules()
    ):
        raise ExportError(
            "the network has denoising blocks of kind median, and ONNX has no median; expected "
            "dot, gaussian or mean, or --format torch"
        )
    copied = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    return copied.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _images(n: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, *shape, generator=generator)


def _torch_bytes(program: torch.export.ExportedProgram) -> bytes:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


def _torch_runner(data: bytes) -> Any:
    return torch.export.load(io.BytesIO(data)).module()


def _onnx_bytes(program: torch.export.ExportedProgram, kind: str) -> bytes:
    from fastbandit import _qonnx

    with warnings.catch_warnings(), _without_log():
        # The exporter warns about its own internals, and about packages that are not needed here.
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            (),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        # Where in the source each node comes from, with the paths of this machine.
        del node.metadata_props[:]
    if kind == "qonnx":
        _qonnx.finish(model)
    data: bytes = model.SerializeToString()
    return data


@contextmanager
def _without_log() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _onnx_runner(data: bytes) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([_OUTPUT], {_INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run


def has_onnx() -> bool:
    """Whether the packages of the extra ``export`` are there."""
    return not _missing()


def _missing() -> list[str]:
    names = ("onnx", "onnxscript", "onnxruntime")
    return [name for name in names if importlib.util.find_spec(name) is None]


@torch.no_grad()
def _difference(network: nn.Module, run: Any, shape: Sequence[int]) -> float:
    """Largest difference of the logits, relative to the largest one, over all batch sizes."""
    worst = 0.0
    for n in _BATCHES:
        images = _images(n, shape)
        expected, actual = network(images), run(images)
        if actual.shape != expected.shape:
            raise ExportError(
                f"the exported network gives logits of shape {list(actual.shape)}, expected "
                f"{list(expected.shape)}; nothing was written"
            )
        scale = max(float(expected.abs().max()), 1e-6)
        worst = max(worst, float((actual - expected).abs().max()) / scale)
        # Written this way it also catches NaN.
        if not worst <= _TOLERANCE:
            raise ExportError(
                f"the exported network differs from the original by {worst:.2g} of its largest "
                f"logit in a batch of {n}, expected {_TOLERANCE:g} or less; nothing was written"
            )
    return worst


@dataclass(frozen=True)
class _Command:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """a model file, or the folder of a retraining run, whose best model is taken
    (runs/latest: of the newest run with a model)"""
    format: Format = "onnx"
    """onnx; qonnx, with 1-bit layers as BipolarQuant; torch for torch.export.load; packed, whose
    1-bit weights take a bit each, for fastbandit.load"""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """the file to write; default: beside the model, with the suffix .onnx, .qonnx.onnx, .pt2 or
    .packed.safetensors"""
    json: bool = False
    """print the result as JSON on standard output"""


def _run(arguments: Sequence[str]) -> int:
    check_choices(program("export"), (_Command,), arguments)
    command = tyro.cli(
        _Command,
        args=list(arguments),
        prog=program("export"),
        description="Write a trained network as an ONNX file or a torch.export program that needs "
        "nothing of this package, or with packed 1-bit weights, checked against the network itself."
        + examples("export"),
    )
    file = find_model(command.model)
    out = Path(command.out) if command.out else file.with_suffix(FORMATS[command.format])
    model = load_model(file)
    with Progress().working(f"exporting {file}, then comparing the file with it"):
        result = export_model(model, out, command.format)
    if command.json:
        print(json.dumps(result))
        return 0
    for what in ("input", "output"):
        port = result[what]
        print(f"{what:<7} {port['name']}: {port['dtype']} {port['shape']}")
    if result["opset"] is not None:
        print(f"opset   {result['opset']}")
    print(
        f"checked against the network with batches of {' and '.join(map(str, _BATCHES))}: largest "
        f"difference {result['difference']:.1e} of the largest logit"
    )
    if "signs" in result:
        print(f"signs   {result['signs']} nodes BipolarQuant")
    if "float_bytes" in result:
        ratio = result["float_bytes"] / result["bytes"]
        print(
            f"size    {result['bytes']:,} bytes, {result['tensor_bytes']:,} without the header; "
            f"parameters in float32: {result['float_bytes']:,} ({ratio:.1f} times the file)"
        )
    print(f"exported: {out}")
    print(f"next: {program('evaluate')} {command.model} --preset quick   (under several attacks)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return guard("export", lambda: _run(given))


if __name__ == "__main__":
    raise SystemExit(main())
