"""Philox4x32-10 in PyTorch: the twin of the native kernels' generator, equal bit for bit.

A counter-based generator has no state: the numbers are a function of a key (64 bits) and a counter
(128 bits), so each element of a tensor draws its own, in any order and on any device.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

_MASK = 0xFFFFFFFF

Word = Tensor | int


def split64(value: Word) -> tuple[Word, Word]:
    """Low and high 32 bits of a non-negative 64-bit integer or int64 tensor."""
    return value & _MASK, (value >> 32) & _MASK


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four words of 32 bits, each an int or an int64 tensor with values in [0, 2^32);
            their shapes broadcast. At least one of the first and the third is a tensor.
        key: two words, the same.

    Returns:
        Four int64 tensors with values in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + KEY_INCREMENTS[1]) & _MASK
    # The low words lack the shape of what was only mixed into the high ones.
    w0, w1, w2, w3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return w0, w1, w2, w3


def _multiply(word: Word, multiplier: int) -> tuple[Word, Word]:
    """High and low 32 bits of the 64-bit product of two unsigned 32-bit words.

    The product itself does not fit int64. Both multipliers are above 2^31, so the product with
    ``multiplier - 2^32`` does (it is negative and above -2^63); it has the same low word, and its
    high word, floored, lacks ``word``. No step overflows.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _MASK
