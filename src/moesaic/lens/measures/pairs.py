"""The same tokens as two layers, or two recordings, saw them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesaic.lens.measures.measured import IntArray
from moesaic.lens.measures.reading import Reading


def pairs(one: Reading, other: Reading) -> tuple[Reading, Reading]:
    """The tokens that both have, line by line; places where they read different tokens are left out.

    The layers of an encoder and of its decoder read different texts at the same positions.
    """
    _, first, second = np.intersect1d(one.place_T, other.place_T, assume_unique=True, return_indices=True)
    same = one.token_T[first] == other.token_T[second]
    return one.take(first[same]), other.take(second[same])


def first_choices(read: Reading) -> IntArray:
    """Each token's best expert."""
    return read.expert_TK[:, 0]


def experts_as_bits(expert_TK: IntArray, num_experts: int) -> npt.NDArray[np.uint64]:
    """Each token's experts as a set: a bit for each expert, 64 to a number; what two have in common is one ``&``."""
    words = np.zeros((len(expert_TK), -(-num_experts // 64)), dtype=np.uint64)
    token_T = np.arange(len(expert_TK))
    for expert_T in expert_TK.T:
        has = expert_T >= 0
        bit_T = np.left_shift(np.uint64(1), (expert_T[has] % 64).astype(np.uint64))
        words[token_T[has], expert_T[has] // 64] |= bit_T
    return words


def overlap(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> IntArray:
    """How many experts each line of the one has in common with the same line of the other."""
    shared: IntArray = np.bitwise_count(one & other).sum(axis=1, dtype=np.int64)
    return shared
