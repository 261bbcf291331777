"""Philox4x32-10 against its published known answers, and its words as integers."""

from __future__ import annotations

import pytest
import torch

from fastbandit.ops.philox import KEY_INCREMENTS, MULTIPLIERS, philox4x32, split64

# The known-answer vectors published with Random123 for philox4x32 at 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The generator in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0 = (k0 + KEY_INCREMENTS[0]) & 0xFFFFFFFF
        k1 = (k1 + KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(device, counter, key, expected):
    words = philox4x32(
        tuple(torch.tensor(word, device=device) for word in counter),
        tuple(torch.tensor(word, device=device) for word in key),
    )
    assert tuple(int(word) for word in words) == expected


def test_words_of_many_counters_are_those_of_unbounded_integers(device):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (6, 200), generator=generator)
    # The words for which a product is nearest to the limits of int64.
    words[:, :4] = torch.tensor([0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
    result = philox4x32(tuple(words[:4].to(device)), tuple(words[4:].to(device)))
    for i in range(words.shape[1]):
        column = [int(word) for word in words[:, i]]
        expected = python_philox(tuple(column[:4]), tuple(column[4:]))
        assert tuple(int(word[i]) for word in result) == expected


def test_words_of_different_shape_broadcast():
    rows = torch.arange(3)[:, None]
    columns = torch.arange(5)[None, :]
    words = philox4x32((columns, 7, rows, 0), (11, 13))
    for word in words:
        assert word.shape == (3, 5)
    single = philox4x32((torch.tensor(4), 7, torch.tensor(2), 0), (11, 13))
    assert [int(word[2, 4]) for word in words] == [int(word) for word in single]


def test_split64():
    assert split64((5 << 32) + 9) == (9, 5)
    low, high = split64(torch.tensor([(1 << 63) - 1, 3]))
    assert low.tolist() == [0xFFFFFFFF, 3]
    assert high.tolist() == [0x7FFFFFFF, 0]
