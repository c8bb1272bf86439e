"""What the library sets itself to reach, as literal numbers; everything else only reads them.

Ratios are medians over rounds of one run, each round's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from moesaic.bench.case import CASES, Case
from moesaic.bench.result import Goal

TRAIN_TO_DENSE = {"coarse": 1.05, "fine": 1.20, "very-fine": 1.35}
FORWARD_TO_DENSE = {"coarse": 1.05, "fine": 1.20}
TRAIN_FASTER = {"transformers eager": 3.5, "transformers grouped_mm": 1.5}
"""How many times as fast on the fine case."""
OVERHEAD = 0.08
"""Share of router and dispatch in a training step of the very fine case."""
OF_MATRIX_RATE = {"big-coarse": 0.70, "big-fine": 0.55}
GPU_PEERS = ("ScatterMoE", "MegaBlocks", "SonicMoE")
OF_BANDWIDTH = 0.80
DECODES_FASTER = 2.0
TOKENS_GROWTH, EXPERTS_GROWTH, SKEW_GROWTH = 1.15, 1.25, 1.15
SPARSE_MODEL, ADOPTED_MODEL = 0.85, 1.5
HELD_TO_GROUPED = 0.60
"""Bytes kept for the backward, of those that transformers' ``grouped_mm`` keeps."""


def of_layer(
    case: Case,
    mode: str,
    ratios: tuple[float, ...],
    samples: tuple[float, ...],
    others: Mapping[str, tuple[float, ...]],
) -> tuple[Goal, ...]:
    """Goals of our layer in one group; none where sizes are not those that goals were set for.

    Args:
        case: that was measured.
        mode: "train" or "forward".
        ratios: to the dense limit.
        samples: our times.
        others: the other contenders' times.
    """
    if not has_goals(case) or not samples:
        return ()
    bounds = TRAIN_TO_DENSE if mode == "train" else FORWARD_TO_DENSE
    goals = []
    if case.name in bounds and ratios:
        goals.append(Goal(what="of dense", bound=bounds[case.name], at_most=True, value=median(ratios)))
    if mode == "train" and case.name == "fine":
        for name, bound in TRAIN_FASTER.items():
            if name in others:
                faster = median(other / mine for other, mine in zip(others[name], samples, strict=True))
                what = f"{name.removeprefix('transformers ')} over ours"
                goals.append(Goal(what=what, bound=bound, at_most=False, value=faster))
    return tuple(goals)


def on_gpu(
    case: Case, mode: str, share: tuple[float, ...], samples: tuple[float, ...], others: Mapping[str, tuple[float, ...]]
) -> tuple[Goal, ...]:
    """Goals of a training step of our experts on a GPU.

    Args:
        case: that was measured.
        mode: "train" or "forward".
        share: of the matrix rate, in each round.
        samples: our times.
        others: the other contenders' times.
    """
    if mode != "train" or not has_goals(case) or case.name not in OF_MATRIX_RATE:
        return ()
    goals = [Goal(what="of the matrix rate", bound=OF_MATRIX_RATE[case.name], at_most=False, value=median(share))]
    peers = [times for name, times in others.items() if name in GPU_PEERS or name.startswith("transformers ")]
    if case.name == "big-fine" and peers:
        best = min(peers, key=median)
        faster = median(other / mine for other, mine in zip(best, samples, strict=True))
        goals.append(Goal(what="best peer over ours", bound=1.0, at_most=False, value=faster))
    return tuple(goals)


def of_decoding(
    case: Case, samples: tuple[float, ...], limit: tuple[float, ...], theirs: Sequence[tuple[float, ...]]
) -> tuple[Goal, ...]:
    """Goals of decoding a single token.

    Args:
        case: that was measured, with its number of tokens.
        samples: our times.
        limit: times in which the active weights can be read.
        theirs: times of each of transformers' implementations.
    """
    if case.num_tokens != 1 or not has_goals(case, any_tokens=True):
        return ()
    share = median(least / mine for least, mine in zip(limit, samples, strict=True))
    goals = [Goal(what="of bandwidth", bound=OF_BANDWIDTH, at_most=False, value=share)]
    if theirs:
        best = min(theirs, key=median)
        faster = median(other / mine for other, mine in zip(best, samples, strict=True))
        goals.append(Goal(what="their best over ours", bound=DECODES_FASTER, at_most=False, value=faster))
    return tuple(goals)


def of_memory(case: Case, held: float, grouped: float) -> tuple[Goal, ...]:
    """The goal of what a training step keeps for its backward.

    Args:
        case: that was measured.
        held: our bytes.
        grouped: those of transformers' ``grouped_mm``.
    """
    if not has_goals(case):
        return ()
    return (Goal(what="of grouped_mm", bound=HELD_TO_GROUPED, at_most=True, value=held / grouped),)


def of_tokens(times: Mapping[str, tuple[float, ...]]) -> dict[str, Goal]:
    """The goal of the slowest number of tokens: how far its time of a token is above the fastest's.

    Args:
        times: of a token, by number of tokens in words.
    """
    slow, fast = max(times, key=lambda label: median(times[label])), min(times, key=lambda label: median(times[label]))
    return _against(times, slow, fast, TOKENS_GROWTH)


def of_experts(times: Mapping[str, tuple[float, ...]]) -> dict[str, Goal]:
    """The goal of the most experts, against the fewest.

    Args:
        times: of a token, by number of experts in words, fewest first.
    """
    labels = list(times)
    return _against(times, labels[-1], labels[0], EXPERTS_GROWTH)


def of_skew(times: Mapping[str, tuple[float, ...]]) -> dict[str, Goal]:
    """The goals of skewed loads up to Zipf's law, against the balanced one.

    Args:
        times: of a token, by load in words, the balanced one first.
    """
    balanced, *skewed = times
    found: dict[str, Goal] = {}
    for label in skewed:
        if float(label.split()[-1]) <= 1:
            found |= _against(times, label, balanced, SKEW_GROWTH)
    return found


def of_sparse_model(share: float) -> tuple[Goal, ...]:
    """The goal of a sparsified model's tokens per second, as a share of its dense twin's."""
    return (Goal(what="of the dense twin", bound=SPARSE_MODEL, at_most=False, value=share),)


def of_adopted_model(faster: float) -> tuple[Goal, ...]:
    """The goal of an adopted model's tokens per second, over transformers' own best."""
    return (Goal(what="of their best", bound=ADOPTED_MODEL, at_most=False, value=faster),)


def _against(times: Mapping[str, tuple[float, ...]], label: str, other: str, bound: float) -> dict[str, Goal]:
    value = median(mine / theirs for mine, theirs in zip(times[label], times[other], strict=True))
    return {label: Goal(what=f"of {other}", bound=bound, at_most=True, value=value)}


def has_goals(case: Case, *, any_tokens: bool = False) -> bool:
    """Whether the sizes are published ones, the load balanced and no expert shared.

    Args:
        case: to judge.
        any_tokens: whether the number of tokens is the verb's own affair.
    """
    published = CASES.get(case.name)
    if published is not None and any_tokens:
        published = replace(published, num_tokens=case.num_tokens)
    return published == case
