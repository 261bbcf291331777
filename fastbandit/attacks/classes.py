"""The attacks in the call form of torchattacks: ``PGD(model, eps=8/255)(images, labels)``.

Argument names and their order are torchattacks' as far as the attacks are the same. Differences,
each on purpose: images outside [0, 1] are refused; APGD runs 100 steps and not 10, as in the
standard AutoAttack; random numbers depend on ``seed`` and the image's id alone (``index`` of the
call), not on the batch or on torch's generator; the device is that of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from fastbandit.attacks import _apgd, _ensemble, _mifgsm, _pgd, _reference, _square

__all__ = ["APGD", "APGDT", "FGSM", "MIFGSM", "PGD", "PGDL2", "AutoAttack", "Ensemble", "Square"]

# torchattacks' names of arguments, and those of the functions.
_NAMES = {
    "eps": "epsilon",
    "alpha": "step_size",
    "n_restarts": "restarts",
    "n_queries": "queries",
    "p_init": "share",
    "n_classes": "targets",
}


@dataclass(repr=False, eq=False)
class _Attack:
    """An attack on one model, called with images and labels; the other fields are its settings."""

    model: nn.Module

    function: ClassVar[Callable[..., Tensor]]
    #: Whether it can aim at a class that is given.
    targeted: ClassVar[bool] = True

    @property
    def settings(self) -> dict[str, Any]:
        """What the function of the attack is called with."""
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        if "norm" in given:
            given["norm"] = given["norm"].lower()
        if "n_classes" in given:
            # The label's own class is no target. Not in place: an array would be the caller's.
            given["n_classes"] = given["n_classes"] - 1
        return {_NAMES.get(name, name): value for name, value in given.items()}

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        target: Tensor | int | None = None,
        index: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """The adversarial images.

        Args:
            images: [N, C, H, W] in [0, 1]; labels: [N] integers, or None: what the model predicts.
            target: of a targeted attack, the class that the model shall answer, [N] integers or one
                for all.
            index: ids of the images, which key the random numbers; default 0..N-1.
            batch_size: images in one call of the model; None for all.
        """
        if target is not None and not self.targeted:
            raise ValueError(
                f"target: {type(self).__name__} aims at classes of its own; expected one of FGSM, "
                "MIFGSM, PGD, PGDL2, APGD and Square"
            )
        aim = {} if target is None else {"target": target}
        return self.function(
            self.model, images, labels, index=index, batch_size=batch_size, **aim, **self.settings
        )

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{type(self).__name__}({inside})"


@dataclass(repr=False, eq=False)
class FGSM(_Attack):
    """Fast gradient sign method."""

    function = staticmethod(_pgd.fgsm)

    eps: float | str = 8 / 255
    _: KW_ONLY
    loss: str = "ce"


@dataclass(repr=False, eq=False)
class MIFGSM(_Attack):
    """Momentum iterative FGSM."""

    function = staticmethod(_mifgsm.mifgsm)

    eps: float | str = 8 / 255
    alpha: float | str = 2 / 255
    steps: int = 10
    decay: float = 1.0
    _: KW_ONLY
    loss: str = "ce"


@dataclass(repr=False, eq=False)
class PGD(_Attack):
    """Projected gradient descent in the L-infinity ball; the last iterate."""

    function = staticmethod(_pgd.pgd)

    eps: float | str = 8 / 255
    alpha: float | str = 2 / 255
    steps: int = 10
    random_start: bool = True
    _: KW_ONLY
    restarts: int = 1
    stop_early: bool = False
    seed: int = 0
    loss: str = "ce"


@dataclass(repr=False, eq=False)
class PGDL2(PGD):
    """Projected gradient descent in the L2 ball; the last iterate."""

    eps: float | str = 1.0
    alpha: float | str = 0.2

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": "l2", **super().settings}


@dataclass(repr=False, eq=False)
class APGD(_Attack):
    """APGD on the cross-entropy (``loss="ce"``), the DLR loss (``"dlr"``) or the ``"margin"``."""

    function = staticmethod(_apgd.apgd_ce)

    norm: str = "Linf"
    eps: float | str = 8 / 255
    steps: int = 100
    n_restarts: int = 1
    seed: int = 0
    loss: str = "ce"


@dataclass(repr=False, eq=False)
class APGDT(_Attack):
    """Targeted APGD on the DLR loss; ``n_classes`` - 1 targets, at most."""

    function = staticmethod(_apgd.apgd_t)
    targeted = False

    norm: str = "Linf"
    eps: float | str = 8 / 255
    steps: int = 100
    n_restarts: int = 1
    seed: int = 0
    n_classes: int = 10


@dataclass(repr=False, eq=False)
class Square(_Attack):
    """The Square attack, by queries alone."""

    function = staticmethod(_square.square)

    norm: str = "Linf"
    eps: float | str = 8 / 255
    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8
    seed: int = 0


@dataclass(repr=False, eq=False)
class Ensemble(_Attack):
    """The worst case of APGD-CE, APGD-T and Square at the settings of the standard AutoAttack.

    It is AutoAttack without FAB-T, which is not included: a robust accuracy from it may be higher
    than that of AutoAttack, and is not to be named so. An image that one attack fools is not
    attacked by the next.
    """

    function = staticmethod(_ensemble.ensemble)
    targeted = False

    norm: str = "Linf"
    eps: float | str = 8 / 255
    seed: int = 0
    n_classes: int = 10


@dataclass(repr=False, eq=False)
class AutoAttack(_Attack):
    """The standard AutoAttack, all four parts, as the reference package runs it (extra ``eval``).

    Its images are those of the package pyautoattack with the same seed and batches. Without the
    package it raises an ImportError; :class:`Ensemble` needs none.
    """

    function = staticmethod(_reference.autoattack)
    targeted = False

    norm: str = "Linf"
    eps: float | str = 8 / 255
    seed: int = 0
    n_classes: int = 10
