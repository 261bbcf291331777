"""Attacks on any model that returns logits for images in [0, 1], as functions and as classes.

An attack takes an ``nn.Module`` whose first layer, if it has any, is the normalisation. It computes
gradients with respect to the input only, leaves ``.grad`` of every parameter alone, and hands the
model back in the mode it came in. Every random number is a function of the seed and of the image's
id (``index``), so an image meets the same attack in any batch, order and number of processes.

Functions: :func:`fgsm` (and ``norm="l2"``, the fast gradient method), :func:`mifgsm`, :func:`pgd`,
:func:`apgd_ce`, :func:`apgd_t`, :func:`square`, :func:`ensemble`, and :func:`autoattack`, which
is the reference's. Without labels they leave what the model predicts; with ``target`` they aim at
a class. The classes of
:mod:`fastbandit.attacks.classes` have torchattacks' call form.
"""

from fastbandit.attacks._apgd import apgd_ce, apgd_t
from fastbandit.attacks._ensemble import ensemble
from fastbandit.attacks._mifgsm import mifgsm
from fastbandit.attacks._model import attack_mode, check_images
from fastbandit.attacks._pgd import fgsm, perturb, perturb_from, pgd
from fastbandit.attacks._reference import autoattack
from fastbandit.attacks._square import square
from fastbandit.attacks.classes import (
    APGD,
    APGDT,
    FGSM,
    MIFGSM,
    PGD,
    PGDL2,
    AutoAttack,
    Ensemble,
    Square,
)

__all__ = [
    "APGD",
    "APGDT",
    "FGSM",
    "MIFGSM",
    "PGD",
    "PGDL2",
    "AutoAttack",
    "Ensemble",
    "Square",
    "apgd_ce",
    "apgd_t",
    "attack_mode",
    "autoattack",
    "check_images",
    "ensemble",
    "fgsm",
    "mifgsm",
    "perturb",
    "perturb_from",
    "pgd",
    "square",
]
