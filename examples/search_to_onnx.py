"""From images to a network that runs without this package: search, retrain, export.

    python examples/search_to_onnx.py

Everything is as small as it can be and lies in a temporary folder. For a search in earnest leave
the sizes to a preset, such as SearchConfig.preset("digits"). The export needs the extra `export`.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from fastbandit.data import load
from fastbandit.export import export_model
from fastbandit.genotype import Genotype
from fastbandit.models import load_model
from fastbandit.retrain import RetrainConfig, retrain
from fastbandit.search import SearchConfig, search

SMALL = {"train_limit": 128, "test_limit": 64, "threads": 1, "device": "cpu"}

with tempfile.TemporaryDirectory() as folder:
    config = SearchConfig.preset(
        "smoke",
        name="tiny",
        space="general7-light",
        layers=2,
        init_channels=2,
        bandit={"rounds": 1},
        final={"tune_epochs": 0, "network_epochs": 0},
        **SMALL,
    )
    found, _ = search(config, root=folder)
    genotype = Genotype.load(found / "genotype.json")
    print("found:", genotype.hash[:12])

    settings = RetrainConfig.preset("smoke", name="tiny", init_channels=4, layers=2, **SMALL)
    trained, _ = retrain(settings, root=folder, genotype=genotype)

    model = load_model(trained)
    file = Path(folder, "network.onnx")
    about = export_model(model, file)
    print(f"{about['format']}: input {about['input']}, {file.stat().st_size:,} bytes")

    images = load("digits").test.images[:100].float() / 255
    (logits,) = onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})

with torch.no_grad():
    expected = model.network(images).numpy()
assert np.allclose(logits, expected, atol=1e-4)
print(f"the logits of {len(images)} images are those of the network")
