"""APGD: projected gradient ascent with momentum that sets its own step size.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, Algorithm 1 and section 4.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from fastbandit.attacks import _ball, _draws
from fastbandit.attacks._model import (
    LARGEST_SEED,
    Attacked,
    Loss,
    Oracle,
    checked,
    cross_entropy,
    with_autograd,
)
from fastbandit.threat import ThreatModel, parse_whole

# The constants of the paper: momentum, least share of steps that must improve, the first length
# of a period, by how much periods shrink and to what.
_MOMENTUM, _RHO = 0.75, 0.75
_FIRST, _SHRINK, _LEAST = 0.22, 0.03, 0.06


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, Eq. (5) of the paper, [n]; it knows no scale and no shift.

    -(z_y - max_{i != y} z_i) / (z_1st - z_3rd), for at least three classes.

    Raises:
        ValueError: fewer classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"loss: dlr: expected a model of three classes or more, got {logits.shape[1]}; "
            "ce is for any number"
        )
    order = logits.sort(dim=1, descending=True).values
    own = labels[:, None]
    other = logits.scatter(1, own, -torch.inf).amax(1)
    return -(logits.gather(1, own)[:, 0] - other) / (order[:, 0] - order[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted difference of logits ratio, Eq. (6) of the paper, [n].

    -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2). With three classes the divisor is z_1st - z_3rd;
    with two there is nothing to divide by.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    target = logits.gather(1, targets[:, None])[:, 0]
    classes = logits.shape[1]
    if classes == 2:
        return target - own
    order = logits.sort(dim=1, descending=True).values
    low = order[:, 2] if classes == 3 else 0.5 * (order[:, 2] + order[:, 3])
    return (target - own) / (order[:, 0] - low + 1e-12)


def ascend(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    epsilon: float,
    steps: int,
    loss: Loss,
    columns: tuple[Tensor, ...],
    seed: int,
    index: Tensor,
    offset: int = 0,
) -> Attacked:
    """One run of APGD, within ``with oracle``; an image is done when it fools the model.

    Args:
        loss: maximised, of (logits, *columns); ``columns``: [N] each. Where it is not finite the
            iterate counts as worse than any other.
    """
    adversarial = images.clone()
    dtype, images = images.dtype, _ball.wide(images)
    fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    if not len(images):
        return Attacked(adversarial, fooled)

    def project(delta: Tensor, x: Tensor) -> Tensor:
        return _ball.project(delta, x, norm, epsilon)

    if norm == "linf":
        delta = _ball.start(
            images,
            norm=norm,
            epsilon=epsilon,
            lower=0.0,
            upper=1.0,
            seed=seed,
            index=index,
            offset=offset,
        )
    else:
        draws = _draws.normal(seed, index, images[0].numel(), offset).to(images.dtype)
        delta = project(epsilon * _ball.direction(draws.view(images.shape), norm), images)

    # Everything that belongs to one image shrinks together as images fall.
    s: dict[str, Tensor] = {
        "row": torch.arange(len(images), device=images.device),
        "x": images,
        "y": labels,
        "id": index,
        "delta": delta,
        "previous": delta,
        **{f"column{i}": column for i, column in enumerate(columns)},
    }

    def ask(*, gradient: bool) -> bool:
        """Query the model at the iterate; drop who is done. False where nobody is left."""
        point = _ball.point(s["x"], s["delta"], dtype)
        columns_now = (s[f"column{i}"] for i in range(len(columns)))
        if gradient:
            logits, value, s["gradient"] = oracle.gradient(point, loss, *columns_now)
        else:
            logits = oracle.logits(point)
            value = loss(logits, *columns_now)
        s["loss"] = torch.where(value.isfinite(), value, -torch.inf)
        broken = oracle.fooled(point, logits, s["y"], s["id"])
        if bool(broken.any()):
            rows = s["row"][broken]
            adversarial[rows] = point[broken]
            fooled[rows] = True
            kept = (~broken).nonzero()[:, 0]
            for name in s:
                s[name] = s[name][kept]
        return len(s["row"]) > 0

    if not ask(gradient=True):
        return Attacked(adversarial, fooled)
    s["best"], s["best_loss"], s["best_gradient"] = s["delta"], s["loss"], s["gradient"]
    s["last_loss"] = s["checked_loss"] = s["loss"]
    s["step"] = torch.full_like(s["loss"], 2 * epsilon)
    s["increases"] = torch.zeros_like(s["row"])
    s["halved"] = torch.ones_like(s["row"], dtype=torch.bool)
    period, least = max(int(_FIRST * steps), 1), max(int(_LEAST * steps), 1)
    shrink = max(int(_SHRINK * steps), 1)
    since = 0
    for number in range(steps):
        x, delta = s["x"], s["delta"]
        move = _ball.per_image(s["step"], delta) * _ball.direction(s["gradient"], norm)
        target = project(delta + move, x)
        weight = _MOMENTUM if number else 1.0
        following = delta + weight * (target - delta) + (1 - weight) * (delta - s["previous"])
        s["previous"], s["delta"] = delta, project(following, x)
        if not ask(gradient=number + 1 < steps):
            return Attacked(adversarial, fooled)
        s["increases"] = s["increases"] + (s["loss"] > s["last_loss"])
        s["last_loss"] = s["loss"]
        better = s["loss"] > s["best_loss"]
        wide = better.view(-1, *[1] * (images.dim() - 1))
        s["best_loss"] = torch.where(better, s["loss"], s["best_loss"])
        s["best"] = torch.where(wide, s["delta"], s["best"])
        s["best_gradient"] = torch.where(wide, s["gradient"], s["best_gradient"])
        since += 1
        if since < period or number + 1 == steps:
            continue
        # A checkpoint: too few steps improved, or the same step size has gained nothing.
        idle = ~s["halved"] & (s["checked_loss"] >= s["best_loss"])
        halve = (s["increases"] < _RHO * period) | idle
        wide = halve.view(-1, *[1] * (images.dim() - 1))
        s["step"] = torch.where(halve, s["step"] / 2, s["step"])
        s["delta"] = torch.where(wide, s["best"], s["delta"])
        s["gradient"] = torch.where(wide, s["best_gradient"], s["gradient"])
        s["last_loss"] = torch.where(halve, s["best_loss"], s["last_loss"])
        s["halved"], s["checked_loss"] = halve, s["best_loss"]
        s["increases"] = torch.zeros_like(s["row"])
        period, since = max(period - shrink, least), 0
    adversarial[s["row"]] = _ball.point(s["x"], s["best"], dtype)
    return Attacked(adversarial, fooled)


def apgd(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    epsilon: float,
    steps: int,
    restarts: int,
    seed: int,
    index: Tensor,
    loss: Loss = cross_entropy,
) -> Attacked:
    """APGD with an untargeted loss from ``restarts`` starts."""
    found = Attacked(
        images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    )
    for offset in range(restarts):
        _again(found, oracle, images, labels, norm, epsilon, steps, loss, None, seed, index, offset)
    return found


def targeted(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    epsilon: float,
    steps: int,
    restarts: int,
    targets: int,
    seed: int,
    index: Tensor,
) -> Attacked:
    """APGD on the targeted DLR loss towards the most likely other classes, one after the other."""
    found = Attacked(
        images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    )
    if not len(images):
        return found
    clean = oracle.logits(images)
    wrong = clean.scatter(1, labels[:, None], -torch.inf)
    others = wrong.argsort(stable=True, dim=1, descending=True)
    for offset in range(restarts):
        for rank in range(min(targets, clean.shape[1] - 1)):
            _again(
                found,
                oracle,
                images,
                labels,
                norm,
                epsilon,
                steps,
                dlr_targeted,
                others[:, rank],
                seed,
                index,
                offset * targets + rank,
            )
    return found


def _again(
    found: Attacked,
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    norm: str,
    epsilon: float,
    steps: int,
    loss: Loss,
    target: Tensor | None,
    seed: int,
    index: Tensor,
    offset: int,
) -> None:
    """Attack those of ``found`` that still stand once more, and enter what comes of it."""
    rows = (~found.fooled).nonzero()[:, 0]
    if not len(rows):
        return
    y = labels[rows]
    again = ascend(
        oracle,
        images[rows],
        y,
        norm=norm,
        epsilon=epsilon,
        steps=steps,
        loss=loss,
        columns=(y,) if target is None else (y, target[rows]),
        seed=seed,
        index=index[rows],
        offset=offset,
    )
    found.adversarial[rows] = again.adversarial
    found.fooled[rows] = again.fooled


def check_radius(norm: str, epsilon: Fraction | str | float) -> float:
    """The radius as a float, after the checks of the threat model."""
    return ThreatModel(norm=norm, epsilon=epsilon).epsilon_value


@with_autograd
def apgd_ce(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Fraction | str | float = "8/255",
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """APGD (Croce and Hein, ICML 2020) on the cross-entropy; parameter-free but for its length.

    Args:
        steps: 100 in the standard evaluation. loss: ``"ce"``, or ``"dlr"`` for the difference of
            logits ratio (three classes or more).
        Others as :func:`fastbandit.attacks.pgd`.

    Returns:
        For an image that fell, the first iterate that fooled the model; else that of largest loss.

    Raises:
        As :func:`fastbandit.attacks.pgd`; ValueError for ``"dlr"`` with two classes.
    """
    radius = check_radius(norm, epsilon)
    steps, restarts = parse_whole(steps, "steps", 1), parse_whole(restarts, "restarts", 1)
    seed = parse_whole(seed, "seed", most=LARGEST_SEED)
    if loss not in ("ce", "dlr"):
        raise ValueError(f"loss: expected ce or dlr, got {loss!r}")
    images, labels, index = checked(images, labels, index)
    oracle = Oracle(model, batch_size=batch_size, labels=labels)
    if not radius:
        return images.clone()
    with oracle:
        return apgd(
            oracle,
            images,
            labels,
            norm=norm,
            epsilon=radius,
            steps=steps,
            restarts=restarts,
            seed=seed,
            index=index,
            loss=cross_entropy if loss == "ce" else dlr,
        ).adversarial


@with_autograd
def apgd_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Fraction | str | float = "8/255",
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Targeted APGD on the DLR loss (Croce and Hein, ICML 2020), as in the standard AutoAttack.

    Args:
        targets: most likely other classes to try; all of them where there are fewer.
        Others as :func:`apgd_ce`.
    """
    radius = check_radius(norm, epsilon)
    steps, restarts = parse_whole(steps, "steps", 1), parse_whole(restarts, "restarts", 1)
    targets, seed = parse_whole(targets, "targets", 1), parse_whole(seed, "seed", most=LARGEST_SEED)
    images, labels, index = checked(images, labels, index)
    oracle = Oracle(model, batch_size=batch_size, labels=labels)
    if not radius:
        return images.clone()
    with oracle:
        return targeted(
            oracle,
            images,
            labels,
            norm=norm,
            epsilon=radius,
            steps=steps,
            restarts=restarts,
            targets=targets,
            seed=seed,
            index=index,
        ).adversarial
