"""From a model and images to a number, in one call: ``fastbandit.evaluate(...)``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastbandit._suggest import did_you_mean
from fastbandit.attacks._model import with_autograd
from fastbandit.config import ConfigError, merge
from fastbandit.data import DataSource, ImageSet
from fastbandit.data.fitting import Fit
from fastbandit.data.objects import images_of, labels_of
from fastbandit.data.sets import digest_of
from fastbandit.evaluate.config import PRESETS, EvaluateConfig
from fastbandit.evaluate.result import outcome_of
from fastbandit.evaluate.robustness import CUSTOM, Robustness, RobustnessWarning
from fastbandit.evaluate.run import begun, evaluate_model, measure
from fastbandit.model_code import ModelCode, names_code, with_weights
from fastbandit.runs.progress import Progress
from fastbandit.runs.tensors import load_tensors
from fastbandit.threat import plain_number

__all__ = ["evaluate"]

# From a warning in `evaluate` to who called it: the decorator and the callable module lie between.
_CALLER = 4
# These presets name data and radius.
_WITH_DATA = ("digits", "mnist", "cifar10")


@with_autograd
def evaluate(
    model: nn.Module | str | Path,
    images: Any = None,
    labels: Any = None,
    *,
    source: Any = None,
    weights: str | Path | None = None,
    epsilon: str | float | Fraction = "auto",
    preset: str | None = "standard",
    out: str | Path | None = None,
    progress: bool | Progress = True,
    **settings: Any,
) -> Robustness:
    """Measure how robust a model is; the result prints as a table.

    Args:
        model: any module that returns logits [N, classes] for images in [0, 1] (normalisation is a
            layer of the model), in any mode; it is evaluated as a copy, in evaluation mode. Or a
            model file, the folder of a retraining run, or ``"my_package.my_module:make_model"``.
        images, labels: tensors [N, C, H, W] or arrays (also [N, H, W, C]), float in [0, 1] or
            uint8, or a list of images (also Pillow's); and [N] integers from 0.
        source: in place of them: a map-style Dataset or a DataLoader of (image, label), an
            :class:`~fastbandit.data.ImageSet`, a :class:`~fastbandit.data.DataSource`, or what
            ``--data`` takes, of which the test images are taken (``split="train"``: the others).
            It may also be passed in place of the images, without labels.
        weights: a file of the state dict for ``model``, ``.safetensors`` or ``.pt``.
        epsilon: radius, for images in [0, 1]: ``"8/255"``; ``"auto"``: the one that a model file
            says it was trained for.
        preset: settings to start from: ``"quick"`` (seconds), ``"standard"``, ``"binary"`` (1-bit
            networks), ``"digits"``, ``"mnist"``, ``"cifar10"``, or None. Standard: the
            attacks of the standard AutoAttack without FAB-T on all images, and on 128 of those
            classified correctly the reference AutoAttack itself where pyautoattack is installed.
        out: a folder for the result, in which an evaluation that was interrupted goes on; None:
            nothing is written.
        progress: whether to show progress on standard error.
        settings: those of :class:`EvaluateConfig` by name: ``norm="l2"``, ``limit=1000``,
            ``attacks="pgd-20"``, ``apgd={"restarts": 3}``, ``device="cuda"``, ``seed=1``, ...

    Returns:
        A :class:`Robustness`: ``clean``, ``robust`` (the worst case of all attacks, image by
        image), their intervals, a table for each attack, the verdict of the checks.

    Raises:
        ValueError, TypeError: model, images, labels or settings cannot be used; the message says
            which, what was expected and what it is.

    Warns:
        RobustnessWarning: a check says that the figures are not to be trusted.
        UserWarning: float images that are not of 8 bits are rounded to 1/255.
    """
    data = _source(images, labels, source, settings)
    if data is not None:
        settings = {**settings, "data": data if isinstance(data, str) else data.name}
    elif "data" not in settings and preset not in _WITH_DATA:
        raise ConfigError(
            "images: expected images and labels, or source=: a Dataset, a DataLoader or a path "
            "(source='digits': the embedded digits), got none"
        )
    config = _configuration(model, epsilon, preset, settings)
    subject: nn.Module | ModelCode | str | Path = model
    if weights is not None:
        subject = _with_weights(model, weights)
    shown = progress if isinstance(progress, Progress) else Progress()
    if not progress:
        shown = Progress.silent()
    path: Path | None = None
    given = data if isinstance(data, DataSource) else None
    if out is None:
        with begun(subject, config, given) as current:
            result = measure(current, shown)
            outcome, facts = outcome_of(current)
    else:
        path, result = evaluate_model(subject, config, out, progress=shown, source=given)
        outcome, facts = load_tensors(path / "images.safetensors", "images")
    robustness = Robustness(result, outcome, list(facts["attacks"]), path)
    if robustness.verdict != "ok":
        reasons = "; ".join(robustness.reasons)
        warnings.warn(
            f"the robust accuracy is not to be trusted: {reasons}",
            RobustnessWarning,
            stacklevel=_CALLER,
        )
    return robustness


def _configuration(
    model: object, epsilon: Any, preset: str | None, settings: dict[str, Any]
) -> EvaluateConfig:
    config = EvaluateConfig()
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(
                f"preset: expected one of {', '.join(PRESETS)} or None, got {preset!r}"
                + did_you_mean(str(preset), PRESETS)
            )
        config = merge(config, PRESETS[preset], f"preset {preset}")
    if "device" not in settings and isinstance(model, nn.Module):
        # Where the model is, if that is a GPU; a computer may have several.
        first = next(iter(model.parameters()), None)
        if first is not None and first.is_cuda:
            settings = {**settings, "device": str(first.device)}
    number = plain_number(epsilon)
    if number is not None:
        epsilon = str(number)
    if epsilon != "auto" or preset not in _WITH_DATA:
        settings = {**settings, "epsilon": epsilon}
    return merge(config, settings, "evaluate")


def _with_weights(model: Any, weights: str | Path) -> nn.Module | ModelCode:
    if isinstance(model, nn.Module):
        return with_weights(model, weights)
    if isinstance(model, str) and names_code(model):
        return ModelCode(model, Path(weights))
    raise ConfigError(
        "weights: expected beside a torch.nn.Module or code such as "
        f"my_package.my_module:make_model, got the model {model!r}"
    )


def _source(
    images: Any, labels: Any, source: Any, settings: Mapping[str, Any]
) -> DataSource | str | None:
    """The images, what ``--data`` would name them by, or None: those that the settings name."""
    if images is None and labels is not None:
        raise ConfigError("labels: expected beside images, got no images")
    if images is not None and source is not None:
        raise ConfigError("source: expected in place of images and labels, got both")
    if images is not None and labels is None:
        if isinstance(images, Tensor | np.ndarray):
            raise ConfigError(
                "labels: expected integers [N] beside the images, got None; a Dataset or "
                "DataLoader of (image, label) is passed alone"
            )
        images, source = None, images
    if source is None and images is None:
        return None
    if "data" in settings:
        raise ConfigError(
            f"data: expected in place of images and source, got {settings['data']!r} beside them"
        )
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, DataSource):
        return source
    if source is not None:
        fit = Fit(settings.get("image_size"), settings.get("image_color"))
        return _of_images(images_of(source, "images", fit))
    if isinstance(images, str | Path):
        raise ConfigError(
            f"images: expected tensors or arrays beside labels, got the path {str(images)!r}, "
            "which is passed alone: its labels are read with it"
        )
    labels = labels_of(labels, "images")
    fit = Fit(settings.get("image_size"), settings.get("image_color"))
    return _of_images(images_of((images, labels), "images", fit))


def _of_images(images: ImageSet) -> DataSource:
    """A data set of these images alone: they are what is evaluated, under either split."""
    classes = max(int(images.labels.max()) + 1, 2)
    return DataSource(
        name=CUSTOM,
        train=images,
        test=images,
        classes=classes,
        description="Passed from Python; float images are rounded to 1/255.",
        digest=digest_of(images, None),
    )
