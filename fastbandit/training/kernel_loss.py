"""The kernel-level loss of CP-NAS: what 1-bit weights lose, and how far the classes spread.

Zhuo et al., IJCAI 2020; Zhang, Xu et al., "Binary Neural Networks", Eqs. 4.17 and 4.18. The text
says neither the weights of the two terms nor how they are averaged; what is taken here is said with
:class:`KernelLoss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastbandit.nn.binary import BinaryConv2d, latents
from fastbandit.ops.binary_ste import weight_scale

__all__ = ["KernelLoss", "center_loss", "kernel_loss"]


def kernel_loss(network: nn.Module) -> Tensor:
    """Sum over all filters of the mean squared difference of H and alpha sign(H).

    That is the mean of ``(|w| - alpha)^2`` over a filter, whose gradient ``2 / n (|w| - alpha)
    sign(w)`` pulls magnitudes to their mean. alpha has none of its own: where it is the mean of the
    filter that changes nothing.

    Args:
        network: with 1-bit weights; 0 without.
    """
    kinds = {id(m.weight): m.alpha for m in network.modules() if isinstance(m, BinaryConv2d)}
    terms = [
        # 1-bit weights on real maps have one scale for a layer.
        (weight.abs() - _alpha(weight, kinds.get(id(weight), "layer"))).square().mean((1, 2, 3))
        for weight in latents(network)
    ]
    return torch.cat(terms).sum() if terms else torch.zeros(())


def _alpha(weight: Tensor, alpha: str) -> Tensor | float:
    scale = weight_scale(weight, alpha)
    return 1.0 if scale is None else scale.view(-1, 1, 1, 1)


def center_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Half the mean over a batch of the squared distance to the mean of an image's class.

    Args:
        features: [N, D].
        labels: int64 [N].
    """
    classes = int(labels.max()) + 1 if labels.numel() else 1
    sums = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)
    counts = torch.bincount(labels, minlength=classes).clamp_min(1).unsqueeze(1)
    return (features - (sums / counts)[labels]).square().sum(1).mean() / 2


class KernelLoss:
    """Both terms, to be added to the loss of a mini-batch.

    The second is taken of the features that the classifier gets, the last map averaged over its
    pixels, and averaged over the batch as cross-entropy is; the means of the classes are those of
    the mini-batch.

    Args:
        network: the one in training; its ``classifier`` tells the features.
        kernel_weight, center_weight: factors of :func:`kernel_loss` and :func:`center_loss`; a
            term of factor 0 is not computed.
    """

    def __init__(self, network: nn.Module, kernel_weight: float, center_weight: float) -> None:
        self.network = network
        self.kernel_weight, self.center_weight = kernel_weight, center_weight
        self._features: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the features of the last forward pass are kept for a call of this object."""
        if not self.center_weight:
            yield
            return
        classifier: nn.Module = self.network.classifier  # type: ignore[assignment]

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._features = inputs[0]

        handle = classifier.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._features = None

    def __call__(self, labels: Tensor) -> Tensor:
        """The weighted sum of both terms; called within :meth:`watching`, after a forward pass."""
        loss = torch.zeros((), device=labels.device)
        if self.kernel_weight:
            loss = loss + self.kernel_weight * kernel_loss(self.network)
        if self.center_weight:
            assert self._features is not None
            loss = loss + self.center_weight * center_loss(self._features, labels)
        return loss
