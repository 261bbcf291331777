"""Images of my own: arrays, text labels, several sizes; the same words work for a search.

    python examples/my_data.py

From a terminal a folder with one folder for each class does: fastbandit search --data FOLDER
"""

import numpy as np

from fastbandit.data import load
from fastbandit.search import SearchConfig

random = np.random.default_rng(0)


def photo(kind: str, height: int, width: int) -> np.ndarray:
    """Bright above for day, dark above for night; uint8 [H, W, 3]."""
    image = random.integers(0, 60, (height, width, 3), np.uint8)
    image[: height // 2] += np.uint8(150 if kind == "day" else 0)
    return image


def rows(n: int) -> list[dict[str, object]]:
    """Items as a Dataset of Hugging Face or a list of dicts has them."""
    kinds = [("day", "night")[i % 2] for i in range(n)]
    return [{"image": photo(kind, 20 + i % 5, 30), "label": kind} for i, kind in enumerate(kinds)]


data = load(rows(40), rows(10), image_size=16)
print(data)
print("classes:", ", ".join(data.class_names))

# fastbandit.search.search(config, source=data) searches on them.
config = SearchConfig.preset("smoke", name="photos", attack={"epsilon": "8/255"})
print("space of a search:", config.space)
