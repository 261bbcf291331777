"""Adversarial training and evaluation: what search and retraining share.

``epoch`` trains one epoch and evaluates, ``paths`` trains another path with each batch, ``steps``
says how a step is computed, ``recorded`` and ``cuda_graphs`` replay it, ``batches`` make its
images, ``objectives`` say what is minimised, ``overfitting`` watches over it, ``averaging`` averages the
weights, ``cost`` counts.
"""

from fastbandit.training.batches import Batches
from fastbandit.training.cost import Cost, is_out_of_memory
from fastbandit.training.cuda_graphs import Graphs
from fastbandit.training.epoch import (
    DivergenceError,
    Evaluation,
    TrainingResult,
    cosine,
    evaluate,
    reestimate_batchnorm,
    reset_batchnorm,
    train_epoch,
)
from fastbandit.training.objectives import Objective
from fastbandit.training.paths import train_paths
from fastbandit.training.steps import Engine, Precision, Step

__all__ = [
    "Batches",
    "Cost",
    "DivergenceError",
    "Engine",
    "Evaluation",
    "Graphs",
    "Objective",
    "Precision",
    "Step",
    "TrainingResult",
    "cosine",
    "evaluate",
    "is_out_of_memory",
    "reestimate_batchnorm",
    "reset_batchnorm",
    "train_epoch",
    "train_paths",
]
