"""The packed file: a trained network whose 1-bit weights take one bit each; it loads by itself.

One safetensors file. Weights that the network computes with the signs of are uint8, eight signs to
a byte in the order of the weight ``[C_out, C_in / groups, k, k]`` in memory, the first in bit 0; a
set bit is +1. A batch norm after a 1-bit convolution is a scale and a shift for each channel, or
before the next sign an integer threshold and a direction. Everything else is as in a model file.
The metadata hold what builds the network, and the shape of each packed weight under ``bits``.

On disk the bits of a filter are not padded to the words that the kernels read: with 16 channels
three quarters of a word would be empty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbandit.genotype import Genotype
from fastbandit.models import PACKED, Architecture
from fastbandit.nn.binary import BinaryConv2d, PackedLayer, pack
from fastbandit.nn.blocks import Signed
from fastbandit.nn.network import Network
from fastbandit.operations import without_defaults
from fastbandit.ops.binary_conv2d import signs_of_weight
from fastbandit.ops.binary_ste import pack_weight
from fastbandit.runs.tensors import CheckpointError, load_tensors, save_tensors

__all__ = ["SUFFIX", "bits_of", "load_packed", "save_packed", "signs_from"]

SUFFIX = ".packed.safetensors"

_BATCHES = ".num_batches_tracked"


def bits_of(signs: Tensor) -> Tensor:
    """The signs of a tensor, eight to a byte: uint8 [ceil(numel / 8)], 1 where ``>= 0``."""
    ones = (signs.detach().cpu() >= 0).flatten().numpy()
    return torch.from_numpy(np.packbits(ones, bitorder="little"))


def signs_from(bits: Tensor, shape: list[int]) -> Tensor:
    """The inverse of :func:`bits_of`: +1 and -1 in float32.

    Raises:
        ValueError: there are not as many bytes as the shape needs.
    """
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or list(bits.shape) != [(count + 7) // 8]:
        raise ValueError(
            f"expected {(count + 7) // 8} bytes for the signs of shape {shape}, got "
            f"{str(bits.dtype).removeprefix('torch.')} {list(bits.shape)}"
        )
    ones = np.unpackbits(bits.numpy(), count=count, bitorder="little")
    return (2 * torch.from_numpy(ones).float() - 1).view(shape)


def _on_real_maps(network: nn.Module) -> Iterator[tuple[str, Signed, str]]:
    """1-bit weights on real maps: the name of each, its layer, its name there."""
    for path, layer in network.named_modules():
        if isinstance(layer, Signed):
            for name, weight in layer.named_parameters(recurse=False):
                if any(weight is one for one in layer.signed):
                    yield f"{path}.{name}", layer, name


def _convolutions(packed: nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """1-bit weights on bits: the name of each in the state, its words, its settings."""
    for path, layer in packed.named_modules():
        if isinstance(layer, PackedLayer):
            for name, settings in layer.settings.items():
                bits = f"{name}_bits"
                yield (f"{path}.{bits}" if path else bits), getattr(layer, bits), settings


def _tensors(packed: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What the file holds of a packed network, and the shape of each packed weight.

    How many batches running statistics were made of is left out: nothing reads it any more.
    """
    tensors = {
        name: tensor
        for name, tensor in packed.state_dict().items()
        if not name.startswith("auxiliary.") and not name.endswith(_BATCHES)
    }
    shapes: dict[str, list[int]] = {}
    for name, words, settings in _convolutions(packed):
        signs = signs_of_weight(words, settings["channels"], settings["groups"])
        tensors[name], shapes[name] = bits_of(signs), list(signs.shape)
    for name, layer, own in _on_real_maps(packed):
        weight = getattr(layer, own)
        del tensors[name]
        tensors[f"{name}_bits"], shapes[f"{name}_bits"] = bits_of(weight), list(weight.shape)
        tensors[f"{name}_scale"] = layer.used(weight).detach().abs().flatten()[0].clone()
    return tensors, shapes


def _state(
    packed: nn.Module, tensors: dict[str, Tensor], shapes: dict[str, list[int]]
) -> dict[str, Tensor]:
    """The inverse of :func:`_tensors`: the state that ``packed`` loads.

    Raises:
        KeyError, ValueError: a tensor is missing or has another shape.
    """
    state = dict(tensors)
    for name, _, settings in _convolutions(packed):
        state[name] = pack_weight(signs_from(tensors[name], shapes[name]), settings["groups"])
    for name, _, _ in _on_real_maps(packed):
        scale = state.pop(f"{name}_scale")
        signs = signs_from(state.pop(f"{name}_bits"), shapes[f"{name}_bits"])
        state[name] = signs * scale
    expected = packed.state_dict()
    for name, tensor in expected.items():
        if name.endswith(_BATCHES):
            state[name] = torch.zeros((), dtype=torch.int64)
        elif name not in state:
            raise ValueError(f"{name}: expected shape {list(tensor.shape)}, got no such tensor")
        elif (state[name].shape, state[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name}: expected {tensor.dtype} {list(tensor.shape)}, got {state[name].dtype} "
                f"{list(state[name].shape)}"
            )
    return state


def save_packed(network: Network, path: str | Path) -> dict[str, int]:
    """Write a network as a packed file, atomically.

    Args:
        network: with 1-bit layers, float32; also what :func:`fastbandit.nn.binary.pack` made of
            one, or :func:`load_packed`.

    Returns:
        ``bytes``: of the file; ``tensor_bytes``: of its tensors, without the header;
        ``float_bytes``: of the parameters of the network that was trained, in float32.

    Raises:
        ValueError: the network has no 1-bit weights, is not float32, or something is attached to
            a 1-bit layer, which a file cannot hold.
        RuntimeError: it is the parent.
    """
    packed = pack(network)
    for name, tensor in packed.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name}: expected a network of float32, got {tensor.dtype}")
    for name, layer in packed.named_modules():
        if isinstance(layer, BinaryConv2d):
            raise ValueError(
                f"{name}: expected a layer of this package as it is, got one with something "
                "attached (a hook, a forward of its own)"
            )
    tensors, shapes = _tensors(packed)
    if not shapes:
        raise ValueError("expected a network with 1-bit weights, got one without")
    architecture = Architecture(**network.arguments)
    metadata: dict[str, Any] = {
        "genotype": network.genotype.to_dict(),
        "architecture": without_defaults(dataclasses.asdict(architecture)),
        "data": dict(network.about.get("data", {})),
        "training": dict(network.about.get("training", {})),
        "bits": shapes,
    }
    save_tensors(Path(path), tensors, PACKED, metadata)
    with torch.device("meta"):
        parameters = list(architecture.build(network.genotype).parameters())
    return {
        "bytes": Path(path).stat().st_size,
        "tensor_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "float_bytes": 4 * sum(p.numel() for p in parameters),
    }


def load_packed(path: str | Path) -> Network:
    """Read a packed file: a network in evaluation mode on the CPU, whose 1-bit layers hold bits.

    It takes images in [0, 1] and has no gradient; see :func:`fastbandit.nn.binary.pack`. 1-bit
    weights on real maps are numbers again in memory, the signs times their scale.

    Raises:
        CheckpointError: damaged, not a packed file, or not one that this version can build; the
            message says what is wrong.
    """
    tensors, metadata = load_tensors(Path(path), PACKED)
    try:
        genotype = Genotype.from_dict(metadata["genotype"], where=str(path))
        architecture, shapes = Architecture(**metadata["architecture"]), metadata["bits"]
        # A file of a few bytes may ask for a network of any size, so it is compared without memory.
        if architecture.cells > len(tensors):
            raise ValueError(f"expected {architecture.cells} cells, got {len(tensors)} tensors")
        with torch.device("meta"):
            expected = pack(architecture.build(genotype))
        state = _state(expected, tensors, shapes)
        network = pack(architecture.build(genotype))
        network.load_state_dict(state)
        for _, layer, _ in _on_real_maps(network):
            layer.fixed = True
        about = {"data": dict(metadata["data"]), "training": dict(metadata["training"])}
    except (KeyError, TypeError, RuntimeError, ValueError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: not a packed network that this version can build: {reason}"
        ) from None
    assert isinstance(network, Network)
    network.about = about
    return network
