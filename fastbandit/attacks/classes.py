"""The attacks in the call form of torchattacks: ``PGD(model, eps=8/255)(images, labels)``.

Argument names and their order are torchattacks' as far as the attacks are the same. Differences,
each on purpose: images outside [0, 1] are refused; APGD runs 100 steps and not 10, as in the
standard AutoAttack; random numbers depend on ``seed`` and the image's id alone (``index`` of the
call), not on the batch or on torch's generator; the device is that of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastbandit.attacks import _apgd, _gradient, _square
from fastbandit.attacks._model import Oracle, checked, misclassified, with_autograd

__all__ = ["APGD", "APGDT", "FGSM", "MIFGSM", "PGD", "PGDL2", "AutoAttack", "Square"]


class _Attack:
    """An attack on one model, called with images and labels."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor], **settings: Any) -> None:
        self.model, self._function, self.settings = model, function, settings

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """The adversarial images.

        Args:
            images: [N, C, H, W] in [0, 1]; labels: [N] int64.
            index: ids of the images, which key the random numbers; default 0..N-1.
            batch_size: images in one call of the model; None for all.
        """
        return self._function(
            self.model, images, labels, index=index, batch_size=batch_size, **self.settings
        )

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{type(self).__name__}({inside})"


def _norm(norm: str) -> str:
    return norm.lower()


class FGSM(_Attack):
    """Fast gradient sign method."""

    def __init__(self, model: nn.Module, eps: float | str = 8 / 255) -> None:
        super().__init__(model, _gradient.fgsm, epsilon=eps)


class MIFGSM(_Attack):
    """Momentum iterative FGSM."""

    def __init__(
        self,
        model: nn.Module,
        eps: float | str = 8 / 255,
        alpha: float | str = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
    ) -> None:
        super().__init__(
            model, _gradient.mifgsm, epsilon=eps, step_size=alpha, steps=steps, decay=decay
        )


class PGD(_Attack):
    """Projected gradient descent in the L-infinity ball; the last iterate."""

    def __init__(
        self,
        model: nn.Module,
        eps: float | str = 8 / 255,
        alpha: float | str = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        restarts: int = 1,
        stop_early: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            _gradient.pgd,
            epsilon=eps,
            step_size=alpha,
            steps=steps,
            random_start=random_start,
            restarts=restarts,
            stop_early=stop_early,
            seed=seed,
        )


class PGDL2(_Attack):
    """Projected gradient descent in the L2 ball; the last iterate."""

    def __init__(
        self,
        model: nn.Module,
        eps: float | str = 1.0,
        alpha: float | str = 0.2,
        steps: int = 10,
        random_start: bool = True,
        *,
        restarts: int = 1,
        stop_early: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            _gradient.pgd,
            norm="l2",
            epsilon=eps,
            step_size=alpha,
            steps=steps,
            random_start=random_start,
            restarts=restarts,
            stop_early=stop_early,
            seed=seed,
        )


class APGD(_Attack):
    """APGD on the cross-entropy (``loss="ce"``) or the DLR loss (``"dlr"``)."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | str = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
    ) -> None:
        super().__init__(
            model,
            _apgd.apgd_ce,
            norm=_norm(norm),
            epsilon=eps,
            steps=steps,
            restarts=n_restarts,
            seed=seed,
            loss=loss,
        )


class APGDT(_Attack):
    """Targeted APGD on the DLR loss; ``n_classes`` - 1 targets, at most."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | str = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        n_classes: int = 10,
    ) -> None:
        super().__init__(
            model,
            _apgd.apgd_t,
            norm=_norm(norm),
            epsilon=eps,
            steps=steps,
            restarts=n_restarts,
            targets=n_classes - 1,
            seed=seed,
        )


class Square(_Attack):
    """The Square attack, by queries alone."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | str = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            _square.square,
            norm=_norm(norm),
            epsilon=eps,
            queries=n_queries,
            restarts=n_restarts,
            share=p_init,
            seed=seed,
        )


class AutoAttack(_Attack):
    """The worst case of APGD-CE, APGD-T and Square at the settings of the standard AutoAttack.

    It is AutoAttack without FAB-T, which is not included: a robust accuracy from it may be higher
    than that of AutoAttack, and is not to be named so. An image that one attack fools is not
    attacked by the next.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | str = 8 / 255,
        seed: int = 0,
        n_classes: int = 10,
    ) -> None:
        super().__init__(
            model, ensemble, norm=_norm(norm), epsilon=eps, targets=n_classes - 1, seed=seed
        )


@with_autograd
def ensemble(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | str,
    norm: str = "linf",
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """APGD-CE, APGD-T and Square, one after the other, on the images that still stand.

    Arguments, result and errors as of the three; an image that the model has wrong already is
    returned as it is.
    """
    _apgd.check_radius(norm, epsilon)
    images, labels, ids = checked(images, labels, index)
    adversarial = images.clone()
    attacks: tuple[tuple[Callable[..., Tensor], dict[str, int]], ...] = (
        (_apgd.apgd_ce, {"steps": steps}),
        (_apgd.apgd_t, {"steps": steps, "targets": targets}),
        (_square.square, {"queries": queries}),
    )
    for attack, more in attacks:
        if not len(images):
            break
        with Oracle(model, batch_size=batch_size, labels=labels) as oracle:
            standing = (~misclassified(oracle.logits(adversarial), labels)).nonzero()[:, 0]
        if not len(standing):
            break
        adversarial[standing] = attack(
            model,
            images[standing],
            labels[standing],
            epsilon=epsilon,
            norm=norm,
            seed=seed,
            index=ids[standing],
            batch_size=batch_size,
            **more,
        )
    return adversarial
