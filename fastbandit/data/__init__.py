"""Images: readers, splits and a loader that keeps everything on the device as uint8.

:func:`load` reads a data set (the embedded digits, a path, or Python objects) into a
:class:`DataSource`; :func:`split` divides its training images; :class:`Loader` yields batches as
float32 in [0, 1]. Images are never normalised here: that is the first layer of every model.
"""

from fastbandit.data.loader import Augment, Loader
from fastbandit.data.published import download
from fastbandit.data.readers import load, load_data
from fastbandit.data.sets import DataError, DataSource, ImageSet, split, statistics

__all__ = [
    "Augment",
    "DataError",
    "DataSource",
    "ImageSet",
    "Loader",
    "download",
    "load",
    "load_data",
    "split",
    "statistics",
]
