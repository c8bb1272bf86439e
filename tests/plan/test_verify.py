"""Predicted memory against real training steps, and bounds against published runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moesaic.plan import published, tables, verify

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


@pytest.mark.parametrize("case", verify.cases(layers=2, width=64), ids=lambda case: case.name)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_memory_of_a_real_step_is_predicted_within_a_tenth(case, recompute):
    states, kept = verify.predict(case, sequences=4, context=128, recompute=recompute)
    states_measured, kept_measured = verify.measure(case, sequences=4, context=128, recompute=recompute)
    # AdamW keeps a step number for each tensor, in 4 bytes.
    assert states == pytest.approx(states_measured, rel=1e-3)
    assert kept == pytest.approx(kept_measured, rel=0.1)
    assert states + kept == pytest.approx(states_measured + kept_measured, rel=0.1)


def test_more_tokens_and_more_layers_are_predicted_too():
    """What is predicted is not one size: the same formulas at four times the tokens and twice the layers."""
    (case,) = (case for case in verify.cases(layers=4, width=64) if case.name == "qwen3_moe")
    _, kept = verify.predict(case, sequences=8, context=256, recompute=False)
    _, measured = verify.measure(case, sequences=8, context=256, recompute=False)
    assert kept == pytest.approx(measured, rel=0.1)


def test_no_published_run_has_beaten_its_bound():
    """Nor is a bound so far off that it says nothing: each run reached a twentieth at least."""
    shares = {run.name: run.share for run in published.standings()}
    assert len(shares) == len(published.RUNS) == 17
    assert {name: share for name, share in shares.items() if not 1 / 20 < share < 1} == {}


def test_the_dense_equal_of_a_mixture_costs_five_times_as_much():
    bounds = {run.name: run.bound for run in published.standings()}
    mixture, dense = bounds["DeepSpeed 1.3B+MoE-128, 128 A100"], bounds["its dense equal in quality, 6.7B, 128 A100"]
    assert mixture / dense == pytest.approx(372 / 70, rel=0.15)


@pytest.mark.parametrize(
    ("name", "printed", "rel"),
    [
        ("switch-base-128", 124e9, 0.005),
        ("switch-xxl-128", 6.3e12, 0.01),
        # Its table and its public weights disagree on the width of its networks.
        ("switch-large-128", 425e9, 0.04),
        # Printed 890B; counted 973B, and the source does not say what it leaves out.
        ("switch-c-2048", 890e9, 0.1),
    ],
)
def test_flops_of_a_sequence_are_those_that_switch_prints(name, printed, rel):
    assert published.sequence_flops(name) == pytest.approx(printed, rel=rel)
    assert dict(published.SEQUENCE_FLOPS)[name] == printed


def test_the_page_shows_the_bounds_as_they_are():
    rows = list(tables.published_table(published.standings()).rows)
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+?) \| (.+?) \| ([\d.,]+) \| ([\d.,]+) \| (\d+%) \|$", page, re.MULTILINE)
    assert shown == rows
