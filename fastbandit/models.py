"""The model file: a trained network that loads in a process which has never seen its run.

One safetensors file holds the weights and, in its metadata, the genotype, the arguments that
build the network from it, the data it was trained on and how. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbandit._files import MEGABYTE, FileError, plain_file, read_text, write_atomic
from fastbandit._latest import newest
from fastbandit.genotype import Genotype
from fastbandit.model_code import torch_file
from fastbandit.nn.binary import PackedLayer
from fastbandit.nn.network import Network
from fastbandit.operations import OperationOptions, without_defaults
from fastbandit.runs.tensors import (
    CheckpointError,
    RunError,
    kind_of,
    load_tensors,
    save_tensors,
)

__all__ = [
    "BEST",
    "LAST",
    "Architecture",
    "Model",
    "find_model",
    "load",
    "load_model",
    "multiply_adds",
    "save_model",
    "save_network",
    "write_card",
]

#: Names of the two model files of a retraining run: that of the best robust validation accuracy,
#: and that of the last epoch.
BEST, LAST = "model-best.safetensors", "model-last.safetensors"

_KIND = "network"
#: What the metadata of a packed file call it, see :mod:`fastbandit.packed`.
PACKED = "packed network"
_OWN = (
    "a model of your own is named by its code, and its weights beside: "
    "python -m fastbandit.evaluate my_package.my_module:make_model --weights FILE"
)


@dataclass(frozen=True)
class Architecture(OperationOptions):
    """The arguments of :class:`~fastbandit.nn.network.Network` beside the genotype.

    The options of its operations are among them, so that a model file says all in one object.
    """

    in_channels: int
    classes: int
    channels: int
    cells: int
    denoise_blocks: bool = False
    bn_eps: float = 1e-5

    def build(self, genotype: Genotype, **more: Any) -> Network:
        """The network, with fresh weights; ``more``: other arguments of :class:`Network`."""
        return Network(genotype, **{**dataclasses.asdict(self), **more})


@dataclass(frozen=True)
class Model:
    """What a model file holds.

    network: in evaluation mode on the CPU, without auxiliary head; takes images in [0, 1].
    data: name, digest and image shape [C, H, W] of what it was trained on.
    training: how: run id, seed, method, threat, epoch, checkpoint rule, validation accuracies.
    """

    network: Network
    genotype: Genotype
    architecture: Architecture
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def save_model(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    genotype: Genotype,
    architecture: Architecture,
    data: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write a model file atomically.

    Args:
        tensors: the network's state dict; an auxiliary head in it is left out.
        data, training: plain values, see :class:`Model`.
    """
    kept = {k: v for k, v in tensors.items() if not k.startswith("auxiliary.")}
    save_tensors(
        Path(path),
        kept,
        _KIND,
        {
            "genotype": genotype.to_dict(),
            "architecture": without_defaults(dataclasses.asdict(architecture)),
            "data": dict(data),
            "training": dict(training),
        },
    )


def find_model(path: str | Path) -> Path:
    """The model file that ``path`` names: itself, or the best one of a run's folder.

    Of a search's folder it is the network that was found, as it was trained from scratch. A path
    that ends in ``latest``, such as ``runs/latest``, is the newest folder there that has a model.

    Raises:
        RunError: there is none.
        FileError: in the folder, a link or a pipe is in its place.
    """
    path = Path(path)
    path = newest(path, _model_in, "a folder with a model", RunError) or path
    if path.is_file():
        return path
    if not path.is_dir():
        raise RunError(
            f"{path}: no such file or folder; expected a model file or the folder of a retraining "
            "run, or code such as my_package.my_module:make_model"
        )
    model = _model_in(path)
    if model is not None:
        return model
    raise RunError(
        f"{path}: expected a folder with {BEST} or {LAST}, as python -m fastbandit.retrain "
        "writes it"
    )


def _model_in(folder: Path) -> Path | None:
    for place in (folder, folder / "networks" / "found"):
        for name in (BEST, LAST):
            if plain_file(place / name).is_file():
                return place / name
    return None


def load_model(path: str | Path) -> Model:
    """Read a model file, or the best one of a retraining run's folder.

    Raises:
        RunError: no such file.
        CheckpointError: damaged, or not a model file; the message says what is wrong.
    """
    file = find_model(path)
    if (kind := torch_file(file)) is not None:
        raise CheckpointError(f"{file}: {kind}, and not of fastbandit; {_OWN}")
    if kind_of(file) == PACKED:
        raise CheckpointError(
            f"{file}: a packed network, which has no gradient and no weights to train; expected "
            "the model file that it was made from, whose logits are the same (fastbandit.load "
            "reads this one)"
        )
    try:
        tensors, metadata = load_tensors(file, _KIND)
    except CheckpointError as error:
        if "not one that fastbandit wrote" in str(error):
            raise CheckpointError(f"{error}; {_OWN}") from None
        raise
    try:
        genotype = Genotype.from_dict(metadata["genotype"], where=str(file))
        architecture = Architecture(**metadata["architecture"])
        _check_sizes(architecture, genotype, tensors)
        network = architecture.build(genotype)
        network.load_state_dict(tensors)
        data, training = dict(metadata["data"]), dict(metadata["training"])
    except (KeyError, TypeError, RuntimeError, ValueError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{file}: not a model that this version can build: {reason}"
        ) from None
    network.eval()
    network.about = {"data": data, "training": training}
    return Model(network, genotype, architecture, data, training)


def load(path: str | Path) -> Network:
    """The trained network of a model file or of a run's folder, in evaluation mode on the CPU.

    It takes images in [0, 1]; see :meth:`Network.predict` and :meth:`Network.save`. A packed file
    gives a packed network, see :mod:`fastbandit.packed`.

    Args:
        path: as of :func:`find_model`; ``"runs/latest"`` is the newest one.

    Raises:
        RunError, CheckpointError: as :func:`load_model`.
    """
    file = find_model(path)
    if kind_of(file) == PACKED:
        from fastbandit.packed import load_packed  # it reads Architecture from here

        return load_packed(file)
    return load_model(file).network


def save_network(network: Network, path: str | Path) -> Path:
    """What :meth:`Network.save` does."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save: expected a file name that ends in .safetensors, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(isinstance(layer, PackedLayer) for layer in network.modules()):
        raise ValueError(
            "save: expected a network with its weights, got a packed one, which "
            "fastbandit.packed.save_packed writes"
        )
    architecture = Architecture(**network.arguments)
    data, training = (dict(network.about.get(key, {})) for key in ("data", "training"))
    save_model(
        path,
        network.state_dict(),
        genotype=network.genotype,
        architecture=architecture,
        data=data,
        training=training,
    )
    _write_card(path.with_suffix(".md"), _card(network, path.name, data, training))
    return path


def write_card(file: Path) -> None:
    """Write the page about a model file beside it, with the suffix ``.md``."""
    model = load_model(file)
    text = _card(model.network, file.name, model.data, model.training)
    _write_card(file.with_suffix(".md"), text)


#: Ends a card, with the checksum of what is above it: what was edited since is nobody's to replace.
_SEAL = re.compile(r"<!-- fastbandit ([0-9a-f]{8}) -->\n\Z")


def _write_card(file: Path, text: str) -> None:
    """Write the page about a model, in place of one that was written here and of no other file."""
    if os.path.lexists(file):
        try:
            card = read_text(plain_file(file), MEGABYTE)
        except FileError:
            card = ""
        seal = _SEAL.search(card)
        if seal is None or seal[1] != _checksum(card[: seal.start()]):
            warnings.warn(
                f"{file}: kept: it is not, or not as, save wrote it; the page about the model is "
                "not written",
                stacklevel=4,
            )
            return
    write_atomic(file, f"{text}<!-- fastbandit {_checksum(text)} -->\n")


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _how_to_evaluate(name: str, data: dict[str, Any], training: dict[str, Any]) -> str:
    """The command that measures a model; words for what its file does not say."""
    from fastbandit.data.published import PUBLISHED
    from fastbandit.data.readers import EMBEDDED

    images, threat = data.get("name"), training.get("threat")
    published = images in (EMBEDDED, *PUBLISHED)
    radius = threat.get("epsilon") if isinstance(threat, dict) else None
    parts = ["fastbandit evaluate", shlex.quote(name), "--preset standard"]
    parts.append(f"--data {images if published else 'DATA'}")
    parts.append(f"--epsilon {radius or 'EPSILON'}")
    if isinstance(threat, dict) and threat.get("norm") == "l2":
        parts.append("--norm l2")
    words = [] if published else ["DATA for its images, a folder or file"]
    words += [] if radius else ["EPSILON for a radius such as 8/255"]
    return f"`{' '.join(parts)}`" + (f", with {' and '.join(words)}" if words else "") + "."


# Of the validation facts, what other lines of a card say.
_ELSEWHERE = ("epoch", "split", "file")


def _card(network: Network, name: str, data: dict[str, Any], training: dict[str, Any]) -> str:
    """A page about a model file, Markdown."""
    facts = {
        "genotype": network.genotype.hash[:12],
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        **{key.replace("_", " "): value for key, value in network.arguments.items()},
        "trained on": data.get("name", "not recorded"),
        "image shape": data.get("shape", "not recorded"),
        "method": training.get("method", "not recorded"),
        "threat": training.get("threat", "not recorded"),
        "checkpoint rule": training.get("checkpoint_rule") or training.get("rule", "not recorded"),
    }
    epoch, validation = training.get("epoch"), training.get("validation")
    if isinstance(epoch, int):
        facts["epoch"] = f"{epoch + 1} of {training.get('epochs', 'an unknown number')}"
    if isinstance(validation, dict):
        facts["validation images"] = {k: v for k, v in validation.items() if k not in _ELSEWHERE}
    shape = data.get("shape")
    if isinstance(shape, (list, tuple)):
        facts["multiply-adds of an image"] = f"{multiply_adds(network, shape):,}"
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    return (
        f"# {name}\n\nA classifier of images in [0, 1]; its normalisation is its first layer.\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n"
        f"```python\nimport fastbandit\n\nnetwork = fastbandit.load({name!r})\n"
        "classes = network.predict(images)\n```\n\n"
        f"How robust it is: {_how_to_evaluate(name, data, training)}\n\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _check_sizes(
    architecture: Architecture, genotype: Genotype, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Refuse what is not the network of these tensors before memory is taken for it.

    A file of a few bytes may ask for a network of any size.
    """
    # A cell has more tensors than one.
    if architecture.cells > len(tensors):
        raise ValueError(f"expected {architecture.cells} cells, got {len(tensors)} tensors")
    with torch.device("meta"):
        expected = architecture.build(genotype).state_dict()
    for name, tensor in expected.items():
        got = tensors[name].shape if name in tensors else None
        if got != tensor.shape:
            raise ValueError(
                f"{name}: expected shape {list(tensor.shape)}, "
                f"got {'no such tensor' if got is None else list(got)}"
            )


def multiply_adds(network: torch.nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulate operations (MACs; a MAC is 2 FLOPs) of one image's logits.

    Those of convolutions, matrix products and attention, as torch counts them; batch norm,
    pooling and activations are not among them.

    Args:
        network: on the CPU; its mode is restored.
        shape: of an image, [C, H, W].
    """
    training = network.training
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *shape))
    finally:
        network.train(training)
    return counter.get_total_flops() // 2
