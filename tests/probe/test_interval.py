"""Intervals hold what they promise, and many tests at once do not find what is not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moesaic.probe.interval import adjusted, mean_per_unit


def test_texts_of_one_length_give_students_t():
    rng = np.random.default_rng(0)
    sums = rng.normal(0.3, 1.0, 20)
    found = mean_per_unit(sums * 7, np.full(20, 7))
    wanted = stats.ttest_1samp(sums, 0)
    low, high = wanted.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((sums.mean(), low, high))
    assert found.p_value == pytest.approx(wanted.pvalue)


@pytest.mark.parametrize(
    ("drawn", "least"),
    [
        (lambda rng: rng.normal(0, 1, 30), 0.92),
        # Long tails to one side cost some: the mean is pulled by texts that are not there yet.
        (lambda rng: rng.lognormal(0, 0.7, 30) - math.exp(0.245), 0.85),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(drawn, least):
    # Texts of very different lengths, effects that differ by text: 400 draws, 95 % nominal.
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        units = rng.integers(20, 400, 30)
        own = drawn(rng)
        sums = units * (0.1 + own) + rng.normal(0, 1, 30) * np.sqrt(units)
        found = mean_per_unit(sums, units)
        held += found.low <= 0.1 <= found.high
    assert least <= held / 400 <= 0.98


def test_what_does_not_move_is_certain_and_one_text_is_not():
    assert mean_per_unit(np.zeros(4), np.arange(1, 5)) == mean_per_unit(np.zeros(4), np.arange(1, 5))
    none = mean_per_unit(np.zeros(4), np.arange(1, 5))
    assert (none.value, none.low, none.high, none.p_value) == (0.0, 0.0, 0.0, 1.0)
    one = mean_per_unit(np.array([2.0]), np.array([4]))
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.p_value)
    assert math.isnan(mean_per_unit(np.zeros(0), np.zeros(0)).value)


def test_texts_without_units_count_for_nothing():
    assert mean_per_unit(np.array([1.0, 2.0, 0.0]), np.array([2, 3, 0])) == mean_per_unit(
        np.array([1.0, 2.0]), np.array([2, 3])
    )


def test_adjusting_is_benjamini_and_hochberg_step_by_step():
    p = np.array([[0.01, math.nan, 0.04], [0.03, 0.5, 0.005]])
    known = sorted(value for value in p.ravel() if not math.isnan(value))
    wanted = {}
    running = 1.0
    for rank in range(len(known), 0, -1):
        running = min(running, known[rank - 1] * len(known) / rank)
        wanted[known[rank - 1]] = running
    found = adjusted(p)
    assert math.isnan(found[0, 1])
    for at, value in np.ndenumerate(p):
        if not math.isnan(value):
            assert found[at] == pytest.approx(wanted[value])


def test_where_nothing_is_true_little_is_found():
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        p = np.array([mean_per_unit(rng.normal(0, 1, 12), rng.integers(5, 50, 12)).p_value for _ in range(24)])
        found += bool((adjusted(p) <= 0.05).any())
    assert found / 100 <= 0.1
