"""Attacks in function form: FGSM and PGD on :mod:`fastbandit.ops`.

An attack takes a model that returns logits for images in [0, 1] (normalisation is a layer of the
model). It computes gradients with respect to the input only, leaves ``.grad`` of every parameter
alone, and hands the model back in the mode it came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.threat import ThreatModel

__all__ = ["attack_mode", "check_images", "fgsm", "perturb", "pgd"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def check_images(images: Tensor, name: str = "images") -> None:
    """Refuse inputs that are not images in [0, 1]. Reads two numbers back from the device.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: fewer than two dimensions, NaN, or values outside [0, 1].
    """
    if not images.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor in [0, 1], got {images.dtype}")
    if images.dim() < 2:
        raise ValueError(f"{name}: expected shape [N, C, H, W], got {list(images.shape)}")
    if images.numel() == 0:
        return
    low, high = torch.aminmax(images.detach())
    # A comparison written this way is also false for NaN.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: expected values in [0, 1], got [{float(low):.4g}, {float(high):.4g}]; "
            "normalisation belongs inside the model"
        )


@contextmanager
def attack_mode(
    model: nn.Module,
    bn_mode: str,
    *,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Iterator[None]:
    """Put ``model`` into the mode an attack runs in, and back.

    ``bn_mode="eval"``: evaluation mode. ``"train"``: training mode, with batch norm using the
    batch's statistics and leaving the running ones as they are. In both, no parameter requires a
    gradient, so no weight gradient is computed and nothing is saved for one.

    ``modules`` and ``parameters`` name those the forward pass uses (default: all of the model's);
    a supernet that runs one path of many passes that path's.
    """
    train = bn_mode == "train"
    used = list(model.modules() if modules is None else modules)
    modes = [(module, module.training) for module in used]
    tracking = [m for m in used if isinstance(m, _BatchNorm) and m.track_running_stats]
    learning = [
        p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad
    ]
    try:
        for module, was in modes:
            if was is not train:
                module.training = train
        if train:
            for norm in tracking:
                norm.track_running_stats = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was in modes:
            module.training = was
        for norm in tracking:
            norm.track_running_stats = True
        for parameter in learning:
            parameter.requires_grad_(True)


def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    offset: int | Tensor = 0,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """The perturbation delta that ``threat`` finds, without checks; lines 10 to 12 of Algorithm 8.

    delta ~ U(-epsilon, epsilon); then ``steps`` times
    delta <- clip(delta + step * sign(grad_x loss(f(x + delta), y)), -epsilon, epsilon), and
    x + delta stays within the threat's bounds. The loss is cross-entropy, summed, so that the
    gradient of one image does not depend on the others' number.

    Args:
        images: [N, C, H, W] in [0, 1]; labels: [N] int64.
        seed, index, offset: key of the random start, as in :func:`fastbandit.ops.random_start`.
        modules, parameters: as in :func:`attack_mode`.

    Returns:
        delta, of the images' shape, dtype and layout.
    """
    epsilon, step = threat.epsilon_value, threat.step_value
    if threat.random_start and threat.attacks:
        delta = ops.random_start(
            images,
            epsilon=epsilon,
            seed=seed,
            index=index,
            offset=offset,
            lower=threat.lower,
            upper=threat.upper,
        )
    else:
        delta = torch.zeros_like(images)
    if not threat.attacks:
        return delta
    with (
        attack_mode(model, threat.bn_mode, modules=modules, parameters=parameters),
        torch.enable_grad(),
    ):
        for _ in range(threat.steps):
            point = (images + delta).requires_grad_(True)
            loss = F.cross_entropy(model(point), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            ops.pgd_step_(
                delta,
                gradient,
                images,
                step_size=step,
                epsilon=epsilon,
                lower=threat.lower,
                upper=threat.upper,
            )
    return delta


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected int64 of shape [{images.shape[0]}], "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    if labels.device != images.device:
        raise ValueError(f"labels: expected on {images.device} as the images, got {labels.device}")


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Fraction | str | float = "8/255",
    step_size: Fraction | str | float | None = None,
    steps: int = 10,
    random_start: bool = True,
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    bn_mode: str = "eval",
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent in the L-infinity ball (Madry et al., ICLR 2018).

    Args:
        model: returns logits [N, classes] for images in [0, 1].
        images: [N, C, H, W], floating point in [0, 1]. labels: [N] int64.
        epsilon, step_size, steps, random_start, lower, upper, bn_mode: see
            :class:`fastbandit.threat.ThreatModel`.
        seed, index: the random start of image i is drawn from (seed, index[i]) alone, so the same
            images get the same start in any batch; index: [N] int64, default 0..N-1.

    Returns:
        The adversarial images x + delta, of the last step.

    Raises:
        ValueError, TypeError: images outside [0, 1], labels of another shape, or settings that
            cannot mean anything.
    """
    threat = ThreatModel(
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        random_start=random_start,
        lower=lower,
        upper=upper,
        bn_mode=bn_mode,
    )
    check_images(images)
    _check_labels(images, labels)
    images = images.detach()
    return images + perturb(model, images, labels, threat, seed=seed, index=index)


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Fraction | str | float = "8/255",
    step_size: Fraction | str | float | None = None,
    random_start: bool = False,
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    bn_mode: str = "eval",
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """One step along the sign of the gradient (Goodfellow et al., ICLR 2015).

    ``random_start=True`` is the variant of Wong et al. ("Fast is better than free", ICLR 2020),
    with steps of 1.25 epsilon. Arguments, result and errors as :func:`pgd`.
    """
    return pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=step_size,
        steps=1,
        random_start=random_start,
        lower=lower,
        upper=upper,
        bn_mode=bn_mode,
        seed=seed,
        index=index,
    )
