"""The model that is evaluated: what is known about it, and that no other takes its place."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastbandit import ops
from fastbandit._identity import Fingerprint
from fastbandit.attacks._model import Oracle, kind
from fastbandit.config import ConfigError
from fastbandit.model_code import ModelCode, names_code
from fastbandit.models import Model, find_model, load_model
from fastbandit.nn.frozen import FrozenBatchNorm, freeze
from fastbandit.operations import without_defaults
from fastbandit.runs.tensors import RunError

if TYPE_CHECKING:
    from fastbandit.evaluate.config import EvaluateConfig

__all__ = [
    "Subject",
    "borrowed",
    "fast_copy",
    "load_subject",
    "place",
    "prepare",
    "probe_images",
    "take_fingerprint",
]


@dataclass
class Subject:
    """The model to evaluate and what is known about it."""

    network: nn.Module
    # A faster one that computes nearly the same; ``network`` decides what counts.
    fast: nn.Module | None
    facts: dict[str, Any]
    training: dict[str, Any]
    shape: tuple[int, ...] | None
    classes: int | None
    file: Path | None
    # Where the model is code of the user's: its name, and the file of its weights.
    code: str | None = None
    weights: Path | None = None

    def identity(self, folder: Path) -> dict[str, Any]:
        """What the folder remembers of the model, so that no other goes on in its place.

        The file's name is relative to the folder: both may be moved together. What the weights do
        not say, the fingerprint in the checkpoint does.
        """

        def relative(file: Path | None) -> str | None:
            return None if file is None else Path(os.path.relpath(file, folder)).as_posix()

        identity = {"file": relative(self.file), "digest": self.facts["digest"]}
        if self.code is not None:
            identity |= {"code": self.code, "weights": relative(self.weights)}
        return identity


def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def module_digest(model: nn.Module) -> str:
    """16 hexadecimal digits for the class, the parameters and all buffers of a module."""
    tensors: dict[str, Any] = dict(model.state_dict())
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    # Those that the state dict leaves out, too: a mean to subtract is often such a buffer.
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ConfigError(f"model: {name}: expected weights, got a tensor on the device meta")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_subject(model: nn.Module | ModelCode | str | Path) -> Subject:
    if isinstance(model, str) and names_code(model):
        model = ModelCode(model)
    if isinstance(model, ModelCode):
        subject = _of_module(model.load())
        subject.code, subject.weights = model.code, model.weights
        subject.facts["code"] = model.code
        subject.facts["weights"] = None if model.weights is None else str(model.weights)
        return subject
    if not isinstance(model, nn.Module):
        file = find_model(model)
        digest = file_digest(file)
        loaded: Model = load_model(file)
        if file_digest(file) != digest:
            # A retraining in progress replaces its best model.
            raise RunError(f"{file}: another model was written there while it was read")
        architecture = without_defaults(dataclasses.asdict(loaded.architecture))
        facts = {
            "file": str(file),
            "digest": digest,
            "genotype_hash": loaded.genotype.hash,
            "parameters": sum(p.numel() for p in loaded.network.parameters()),
            "architecture": architecture,
            "training": loaded.training,
        }
        shape = loaded.data.get("shape")
        return Subject(
            loaded.network,
            None,
            facts,
            loaded.training,
            tuple(shape) if isinstance(shape, (list, tuple)) else None,
            loaded.architecture.classes,
            file,
        )
    return _of_module(model)


def _of_module(model: nn.Module) -> Subject:
    facts = {
        "file": None,
        "digest": module_digest(model),
        "genotype_hash": None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "architecture": {"class": type(model).__qualname__},
        "training": {},
    }
    return Subject(model, None, facts, {}, None, None, None)


def prepare(
    model: nn.Module | ModelCode | str | Path, config: EvaluateConfig
) -> tuple[Subject, EvaluateConfig]:
    """The model, and the configuration with nothing left open."""
    if not isinstance(model, (nn.Module, ModelCode, str, Path)):
        raise TypeError(
            f"model: expected a torch.nn.Module or the path of a model, got {kind(model)}"
        )
    subject = load_subject(model)
    config = config.resolve(subject.training)
    if config.transfer_from is not None and not names_code(config.transfer_from):
        # As it will be found again, whatever else the folder holds by then.
        config = dataclasses.replace(config, transfer_from=str(find_model(config.transfer_from)))
    return subject, config


def probe_images(images: Tensor, device: torch.device) -> Tensor:
    """32 images to know a model by, float32 [32, C, H, W] in [0, 1], the same on every device.

    16 spread over ``images`` (uint8), 8 of these moved by noise, which tells apart what is the same
    at 8 bits, and 8 of noise alone.
    """
    spread = torch.linspace(0, len(images) - 1, 16).long()
    white = torch.tensor(255.0, device=device)
    clean = images[spread.to(images.device)].to(device).float() / white
    moved = clean[::2] + ops.random_start(clean[::2], epsilon=0.1, seed=1, lower=0.0, upper=1.0)
    grey = torch.full_like(moved, 0.5)
    noise = grey + ops.random_start(grey, epsilon=0.5, seed=2)
    return torch.cat([clean, moved, noise]).clamp_(0, 1)


def take_fingerprint(network: nn.Module, probes: Tensor) -> Fingerprint:
    """What ``network`` says to ``probes``; torch's random numbers are the same each time."""
    device = probes.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), Oracle(network, batch_size=16) as oracle:
        # Not torch.manual_seed, which would also seed devices that are not put back.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(0)
        first, second = (oracle.logits(probes, exact=True).float().cpu().numpy() for _ in range(2))
    return Fingerprint.of(first, second)


def place(network: nn.Module, config: EvaluateConfig, device: torch.device) -> nn.Module:
    """The network on the device in the asked layout; it is changed in place."""
    network = network.to(device)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _to_evaluation(network)


def _to_evaluation(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, but for programs of torch.export in it: they have no modes."""
    try:
        return model.eval()
    except NotImplementedError:
        # Such a program computes what it was exported as, and its train and eval raise this. The
        # modules after it have not been reached.
        exported = [m for m in model.modules() if isinstance(m, GraphModule) and "eval" in vars(m)]
        if not exported:
            raise
    for module in model.modules():
        if not any(module is one for one in exported):
            module.training = False
    return model


@contextmanager
def borrowed(subject: Subject) -> Iterator[None]:
    """``subject.network`` as one that may be moved and changed within the context.

    A module of the caller's is copied; one that cannot be copied is used itself, and put back.
    """
    own = subject.network
    if subject.file is not None:
        yield
        return
    with ExitStack() as stack:
        try:
            # With autograd the weights in a copy of a script would be computed from its own.
            with torch.no_grad():
                subject.network = copy.deepcopy(own)
        except Exception:  # whatever a module's own way to be copied raises
            stack.enter_context(_put_back(own))
        # What is attached to a module may call the caller's own modules from within the copy.
        stack.enter_context(_evaluating(own))
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in evaluation mode within the context, and back."""
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    try:
        _to_evaluation(model)
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Parameters, their gradients and buffers of ``model`` as before, after the context."""
    held = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    tensors = [(p, p.data, p.grad) for p in model.parameters()]
    gradients = [(grad, grad.data) for _, _, grad in tensors if grad is not None]
    try:
        yield
    finally:
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for parameter, data, grad in tensors:
            parameter.data, parameter.grad = data, grad
        for grad, data in gradients:
            grad.data = data


def fast_copy(network: nn.Module) -> nn.Module | None:
    """A copy with frozen batch norms; None where it would be no faster, or none can be made."""
    try:
        with torch.no_grad():
            copied = freeze(copy.deepcopy(network))
    except Exception:  # whatever a module's own way to be copied raises
        return None
    return copied if any(type(m) is FrozenBatchNorm for m in copied.modules()) else None
