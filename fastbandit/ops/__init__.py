"""Kernels that anyone can use without the search.

Each op is declared once with ``torch.library`` and a plain-PyTorch reference; native kernels are
used where they are built (see :func:`fastbandit._native.status`). Importing this loads torch and
no other third-party package.

Kernels have one derivative: that of ``backward``. In forward mode (``torch.func.jvp``, dual
tensors) and under the other transforms of ``torch.func`` a differentiable op is computed by torch's
own operations, which have them all; ops that say nothing of a gradient refuse tangents as they
refuse tensors that require grad. All tensors of a call lie on one device.
"""

import fastbandit.ops.binary_sep  # noqa: F401  (declares an op that layers call)
from fastbandit import _native
from fastbandit.ops.augment_images import augment_images
from fastbandit.ops.augment_start_normalize import augment_start_normalize
from fastbandit.ops.avg_pool2d import avg_pool2d
from fastbandit.ops.bandit import (
    bandit_bounds,
    bandit_probabilities,
    bandit_prune_,
    bandit_sample,
    bandit_step_,
    bandit_update_,
)
from fastbandit.ops.batch_norm import batch_norm
from fastbandit.ops.binary_conv2d import binary_conv2d, sign_threshold
from fastbandit.ops.binary_pack import pack_sign, unpack_sign
from fastbandit.ops.binary_ste import binary_conv2d_ste
from fastbandit.ops.conv_block import conv_block
from fastbandit.ops.depthwise_conv2d import depthwise_conv2d
from fastbandit.ops.dilated_conv2d import dilated_conv2d
from fastbandit.ops.factorized_reduce import factorized_reduce
from fastbandit.ops.gabor import gabor_conv2d, gabor_filters
from fastbandit.ops.gabor_parameters import gabor_parameters
from fastbandit.ops.max_pool2d import max_pool2d
from fastbandit.ops.norm_sum import Normalized, norm_sum
from fastbandit.ops.pgd_step import pgd_step_, pgd_step_normalize_
from fastbandit.ops.random_start import random_start
from fastbandit.ops.sign_ste import sign_ste

__all__ = [
    "Normalized",
    "augment_images",
    "augment_start_normalize",
    "avg_pool2d",
    "bandit_bounds",
    "bandit_probabilities",
    "bandit_prune_",
    "bandit_sample",
    "bandit_step_",
    "bandit_update_",
    "batch_norm",
    "binary_conv2d",
    "binary_conv2d_ste",
    "conv_block",
    "depthwise_conv2d",
    "dilated_conv2d",
    "factorized_reduce",
    "gabor_conv2d",
    "gabor_filters",
    "gabor_parameters",
    "max_pool2d",
    "norm_sum",
    "pack_sign",
    "pgd_step_",
    "pgd_step_normalize_",
    "random_start",
    "sign_ste",
    "sign_threshold",
    "unpack_sign",
]

_native.load()
