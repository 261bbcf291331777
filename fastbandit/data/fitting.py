"""Images brought to one size and to one number of channels, where that is asked for.

Resized so that the shorter side has the wanted length, by an antialiased bilinear filter, then cut
to the square in the middle: what torchvision calls Resize and CenterCrop. Grey is ITU-R 601-2 luma.
All of it is Pillow's, so that arrays and files give the same.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import torch

from fastbandit.data.sets import DataError, DataSource, ImageSet, digest_of

__all__ = ["AS_IS", "Fit", "fitted"]

_CHANNELS = {"grey": 1, "rgb": 3}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What images are brought to; None leaves it as it is.

    Args:
        size: pixels of both sides.
        color: ``"rgb"`` or ``"grey"``.

    Raises:
        DataError: neither; or Pillow, which does it, is not installed.
    """

    size: int | None = None
    color: str | None = None

    def __post_init__(self) -> None:
        size, color = self.size, self.color
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise DataError(f"image_size: expected an integer of at least 1, got {size!r}")
        if color is not None and color not in _CHANNELS:
            raise DataError(f"image_color: expected rgb or grey, got {color!r}")
        if self:
            try:
                importlib.import_module("PIL.Image")
            except ImportError:
                raise DataError(
                    "image_size, image_color: this needs Pillow: pip install 'fastbandit[data]'"
                ) from None

    def __bool__(self) -> bool:
        return self.size is not None or self.color is not None

    @property
    def mode(self) -> str | None:
        """Pillow's name of the colours."""
        return {None: None, "rgb": "RGB", "grey": "L"}[self.color]

    def resize(self, image: Any) -> Any:
        """A Pillow image of one or three channels in the wanted size."""
        if self.size is None or image.size == (self.size, self.size):
            return image
        from PIL import Image

        width, height = image.size
        scale = self.size / min(width, height)
        # The longer side is cut, as torchvision does.
        new = (
            (self.size, max(self.size, int(height * scale)))
            if width <= height
            else (max(self.size, int(width * scale)), self.size)
        )
        image = image.resize(new, Image.Resampling.BILINEAR)
        left, top = round((new[0] - self.size) / 2), round((new[1] - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))

    def array(self, chw: np.ndarray, where: str) -> np.ndarray:
        """One image as uint8 ``[C, H, W]``."""
        from PIL import Image

        channels = chw.shape[0]
        wanted = channels if self.color is None else _CHANNELS[self.color]
        if channels not in (1, 3) and wanted != channels:
            raise DataError(
                f"{where}: image_color: expected images of 1 or 3 channels, got {channels}"
            )
        if channels == 3 and wanted == 1:
            grey = Image.fromarray(np.ascontiguousarray(chw.transpose(1, 2, 0))).convert("L")
            chw = np.asarray(grey, np.uint8)[None]
        if chw.shape[1:] != (self.size, self.size) and self.size is not None:
            planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in chw]
            chw = np.stack([np.asarray(self.resize(plane), np.uint8) for plane in planes])
        return np.repeat(chw, 3, axis=0) if chw.shape[0] == 1 and wanted == 3 else chw

    def describe(self) -> str:
        parts = [] if self.size is None else [f"brought to {self.size} x {self.size} pixels"]
        parts += [] if self.color is None else [f"made {self.color}"]
        return f" Images are {' and '.join(parts)}." if parts else ""


#: Nothing is changed.
AS_IS = Fit()


def fitted(source: DataSource, fit: Fit) -> DataSource:
    """``source`` with all images as ``fit`` asks for; itself where they are so."""
    if not fit:
        return source

    def one(part: ImageSet | None, where: str) -> ImageSet | None:
        if part is None:
            return None
        channels, height, width = part.shape
        same = fit.size is None or (height, width) == (fit.size, fit.size)
        if same and (fit.color is None or channels == _CHANNELS[fit.color]):
            return part
        images = part.images.cpu().numpy()
        pixels = np.stack([fit.array(image, where) for image in images])
        return ImageSet(torch.from_numpy(pixels).to(part.device), part.labels)

    train, test = one(source.train, f"{source.name} (train)"), one(source.test, source.name)
    assert train is not None
    same = train is source.train and test is source.test
    return dataclasses.replace(
        source,
        train=train,
        test=test,
        description=source.description + fit.describe(),
        digest=source.digest if same else digest_of(train, test),
    )
