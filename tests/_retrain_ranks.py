"""What the processes of test_retrain.py run under torchrun: ``python _retrain_ranks.py FOLDER``."""

import sys
from pathlib import Path

from fastbandit.config import merge
from fastbandit.data import Loader
from fastbandit.distributed import Group
from fastbandit.retrain import RetrainConfig, retrain
from fastbandit.retrain import loop as module

# 24 images to train on: batches of 21 and of 3, which is too few for two processes.
CONFIG = {
    "genotype": "ABANDIT_MNIST_NORMAL_1",
    "name": "tiny",
    "device": "cpu",
    "init_channels": 2,
    "layers": 3,
    "epochs": 2,
    "train_limit": 48,
    "train_portion": 0.5,
    "test_limit": 33,
    "batch_size": 21,
    "evaluation_batch_size": 21,
    "threads": 1,
    "ema_decay": 0.9,
    "auxiliary": True,
    "sync_batchnorm": True,
    "selection": {"steps": 2},
    "final": {"steps": 2, "step_size": "0.1"},
}


def retrain_double(out: Path, group: Group | None = None, **changes) -> tuple[Path, dict]:
    """A retraining in float64.

    In float32 these tiny networks have channels whose variance is next to nothing, and batch norm
    makes whole numbers of their rounding errors.
    """
    build, batches = module.build, Loader.epoch

    def build_double(*arguments):
        setup = build(*arguments)
        setup.network.double()
        return setup

    def batches_double(self, number):
        return ((x.double(), y, ids) for x, y, ids in batches(self, number))

    def test(self):
        return None  # a network built from the file would be float32 again

    original = module.Retraining.test
    module.build, Loader.epoch, module.Retraining.test = build_double, batches_double, test
    try:
        config = merge(merge(RetrainConfig(), CONFIG, "tiny"), changes, "test")
        return retrain(config, out, group=group)
    finally:
        module.build, Loader.epoch, module.Retraining.test = build, batches, original


if __name__ == "__main__":
    with Group.join("cpu", timeout=120) as group:
        folder = Path(sys.argv[1])
        _, summary = retrain_double(folder / "data", group)
        assert summary["cost"]["processes"] == 2
        # With free training and statistics of each process's own images.
        config = merge(RetrainConfig(), {**CONFIG, "sync_batchnorm": False}, "tiny")
        config = merge(config, {"method": "free", "replays": 2, "drop_path_prob": 0.2}, "tiny")
        retrain(config, folder / "free", group=group)
