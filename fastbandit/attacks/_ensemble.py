"""The worst case of three attacks on each image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastbandit.attacks._apgd import apgd_ce, apgd_t
from fastbandit.attacks._attack import check_radius
from fastbandit.attacks._model import Oracle, aimed, misclassified, with_autograd
from fastbandit.attacks._square import square


@with_autograd
def ensemble(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
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
    check_radius(norm, epsilon)
    images, labels, ids, _ = aimed(model, images, labels, index, batch_size=batch_size)
    adversarial = images.clone()
    attacks: tuple[tuple[Callable[..., Tensor], dict[str, int]], ...] = (
        (apgd_ce, {"steps": steps}),
        (apgd_t, {"steps": steps, "targets": targets}),
        (square, {"queries": queries}),
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
