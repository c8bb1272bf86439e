"""Each check alone, on measurements that are made up: what it says, and when it says nothing."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from moesaic.doctor import THRESHOLDS, Finding, Report
from moesaic.doctor.checks import living, load, loss, strength, weights
from moesaic.doctor.examination import Vitals, judge
from moesaic.doctor.finding import Unknown
from moesaic.doctor.history import History
from moesaic.doctor.vitals import Gradients, LayerBias, LayerGradients, LayerRouting, Repeat, TermGradient

NOTHING = Unknown("nothing was measured")
LINES = 40


def history(**changes) -> History:
    """A training of 400 steps in which all goes well."""
    step = np.arange(10.0, 10 * LINES + 1, 10)
    numbers = {
        "path": "history.jsonl",
        "step": step,
        "tokens": step * 1000,
        "loss": np.linspace(5, 2, LINES),
        "grad_norm": np.ones(LINES),
        "aux": {},
        "load": {"a": np.full((LINES, 8), 1 / 8)},
        "max_over_mean": {"a": np.linspace(2.0, 1.2, LINES)},
        "drop_rate": {"a": np.zeros(LINES)},
        "entropy": {"a": np.linspace(2.0, 1.5, LINES)},
        "router_logit": {"a": np.linspace(2.0, 4.0, LINES)},
        "bias": {},
        "eval_step": np.zeros(0),
        "bits_per_byte": np.zeros(0),
    }
    return History(**{**numbers, **changes})


def routing(load_E, **changes) -> LayerRouting:
    """One layer in which each token has one expert."""
    load_E = np.asarray(load_E)
    numbers = {
        "layer": "a",
        "load_E": load_E,
        "kept_E": load_E,
        "num_tokens": int(load_E.sum()),
        "unserved": 0,
        "entropy": 1.5,
        "largest_logit": 3.0,
        "spread_E": np.ones(len(load_E)),
        "is_soft": False,
        "is_fixed": False,
    }
    return LayerRouting(**{**numbers, **changes})


def gradients(*, coefficient=0.01, balance=0.01, task=1.0, **changes) -> Gradients:
    """One router that a Switch loss and the task pull."""
    term = TermGradient(name="switch", coefficient=coefficient, in_loss=1.0, on_router=balance)
    layer = LayerGradients(
        layer="a", is_frozen=False, task=task, beside=1.0, choices=2.0, terms=(term,), is_rewarded=False
    )
    numbers = {"layers": (layer,), "loss": 2.5, "task": 2.0, "controllers": (), "own_balance": False, "why_none": ""}
    return Gradients(**{**numbers, **changes})


EVEN = [routing([100] * 8)]


# --- what is not known is never called healthy ------------------------------------------------------------------------


def test_every_check_says_not_checked_and_why_where_nothing_was_measured():
    found = (
        weights.weights_finite(NOTHING, NOTHING, ""),
        loss.balance_attached(NOTHING),
        loss.router_learns(NOTHING),
        load.dead_experts(NOTHING, NOTHING),
        load.overfull_experts(NOTHING, NOTHING),
        load.dropped_rows(NOTHING, NOTHING),
        strength.not_too_strong(NOTHING, NOTHING, NOTHING),
        strength.not_too_weak(NOTHING, NOTHING, NOTHING),
        living.selection_bias(NOTHING, NOTHING),
        living.router_logits(NOTHING, NOTHING),
        living.router_precision(NOTHING),
        living.evaluation_repeats(NOTHING),
        living.padding_ignored(NOTHING),
        weights.experts_differ(NOTHING),
        weights.router_rows(NOTHING, NOTHING),
    )
    assert {finding.verdict for finding in found} == {"not checked"}
    assert all(finding.words.lower().startswith("nothing was measured") for finding in found)


def test_a_history_without_a_series_leaves_its_check_out():
    bare = history(load={}, drop_rate={}, router_logit={}, max_over_mean={}, entropy={})
    assert load.dead_experts(NOTHING, bare).verdict == "not checked"
    assert load.dropped_rows(NOTHING, bare).verdict == "not checked"
    finding = living.router_logits(NOTHING, bare)
    assert finding.verdict == "not checked"
    assert finding.words == "Nothing was measured, and the history does not have router_logit."


# --- load -------------------------------------------------------------------------------------------------------------


def test_an_expert_without_rows_is_dead_only_where_it_should_have_had_some():
    finding = load.dead_experts([routing([100, 0, 100, 100])], NOTHING)
    assert finding.verdict == "sick"
    assert finding.words == "1 expert of 4 got no row of held-out text: a expert 1."
    few = load.dead_experts([routing([20, 0, 20, 20])], NOTHING)
    assert few.verdict == "not checked"
    assert few.words == "Held-out text gave fewer than 20 rows to an expert on average; read more."


def test_an_expert_that_worked_in_training_is_starved_on_the_text_and_not_dead():
    assert load.dead_experts([routing([100, 0, 100, 100, 100, 100, 100, 100])], history()).verdict == "warning"


def test_a_starved_expert_is_a_warning():
    finding = load.dead_experts([routing([100, 5, 100, 100])], NOTHING)
    assert finding.verdict == "warning"
    assert finding.words == (
        "1 expert of 4 got less than a tenth of a fair share of held-out text: a expert 1 (1.6 %)."
    )


def test_dead_experts_are_found_in_a_history_alone():
    shares = np.full((LINES, 8), 1 / 7)
    shares[:, 3] = 0
    finding = load.dead_experts(NOTHING, history(load={"a": shares}))
    assert finding.verdict == "sick"
    assert finding.words == "1 expert of 8 got no row of the last training steps: a expert 3."


@pytest.mark.parametrize(
    ("load_E", "verdict"),
    [([100] * 8, "healthy"), ([300, *[71] * 7], "healthy"), ([450, *[50] * 7], "warning"), ([760, *[6] * 7], "sick")],
)
def test_an_overfull_expert_is_judged_by_how_much_beyond_its_share_it_takes(load_E, verdict):
    assert load.overfull_experts([routing(load_E)], NOTHING).verdict == verdict


def test_with_few_experts_the_way_to_all_tokens_counts():
    # Of 4 experts with 2 choices, the busiest cannot have more than twice its share.
    finding = load.overfull_experts([routing([400, 390, 5, 5], num_tokens=400)], NOTHING)
    assert finding.verdict == "sick"
    assert finding.words == (
        "The busiest expert of held-out text is expert 0 of a, with 2.00 times a fair share (1 is even, 2 is "
        "every token)."
    )


def test_drops_in_training_count_as_those_on_text_do():
    dropping = history(drop_rate={"a": np.full(LINES, 0.3)})
    finding = load.dropped_rows(EVEN, dropping)
    assert finding.verdict == "warning"
    assert finding.words == "Capacity drops 30.0 % of the rows of a on the last training steps."
    assert load.dropped_rows(EVEN, history()).words == "No row is dropped."


# --- strength ---------------------------------------------------------------------------------------------------------


def test_balance_that_drowns_the_task_is_sick_and_that_is_only_strong_a_warning():
    undecided = [routing([100] * 8, entropy=0.995 * np.log(8))]
    finding = strength.not_too_strong(gradients(balance=8.0, loss=20.0), undecided, NOTHING)
    assert finding.verdict == "sick"
    assert finding.words == (
        "Balance drowns the task: it pulls the router of a 8 times as hard, and the entropy of a is 99.5 % of that of "
        "chance. 90.0 % of the training loss is balance."
    )
    assert strength.not_too_strong(gradients(balance=8.0), EVEN, NOTHING).verdict == "warning"
    assert strength.not_too_strong(gradients(balance=0.1), undecided, NOTHING).verdict == "healthy"


def test_routers_that_stay_undecided_through_a_training_are_a_warning():
    undecided = [routing([100] * 8, entropy=0.995 * np.log(8))]
    stuck = history(entropy={"a": np.full(LINES, 0.995 * np.log(8))})
    assert strength.not_too_strong(gradients(balance=0.1), undecided, stuck).verdict == "warning"
    short = replace(stuck, step=np.arange(1.0, LINES + 1))
    assert strength.not_too_strong(gradients(balance=0.1), undecided, short).verdict == "healthy"


def test_load_that_runs_away_is_sick():
    rising = history(max_over_mean={"a": np.linspace(1.2, 7.0, LINES)})
    finding = strength.not_too_weak(gradients(), EVEN, rising)
    assert finding.verdict == "sick"
    assert "half way through training it was 4.10" in finding.words
    assert strength.not_too_weak(gradients(), EVEN, history()).verdict == "healthy"


def test_a_coefficient_of_zero_is_a_warning_while_the_load_is_even_and_sick_when_it_is_not():
    idle = gradients(coefficient=0.0, balance=None)
    finding = strength.not_too_weak(idle, EVEN, NOTHING)
    assert finding.verdict == "warning"
    assert finding.words.startswith(
        "Nothing keeps the load even: its coefficient is 0 (switch), and there is no controller."
    )
    assert strength.not_too_weak(idle, [routing([700, *[15] * 7])], NOTHING).verdict == "sick"
    assert strength.not_too_weak(replace(idle, controllers=("BiasController",)), EVEN, NOTHING).verdict == "healthy"


# --- routers ----------------------------------------------------------------------------------------------------------


def test_logits_that_grow_are_found_in_a_history():
    growing = history(router_logit={"a": np.geomspace(2.0, 30.0, LINES)})
    finding = living.router_logits(NOTHING, growing)
    assert finding.verdict == "warning"
    assert "grew from" in finding.words
    assert living.router_logits(NOTHING, history()).verdict == "healthy"
    assert living.router_logits([routing([1], largest_logit=200.0)], NOTHING).verdict == "sick"


def bias(values, **changes) -> LayerBias:
    numbers = {"layer": "a", "bias_E": np.asarray(values), "decided": 0.2, "spread": 0.1, "on_softmax": False}
    return LayerBias(**{**numbers, **changes})


def test_a_bias_that_no_controller_stepped_is_sick_after_a_training_and_not_judged_before():
    assert living.selection_bias([bias([0.0, 0.0])], NOTHING).verdict == "not checked"
    finding = living.selection_bias([bias([0.0, 0.0])], history())
    assert finding.verdict == "sick"
    assert finding.words == "Every bias is still 0 after 400 steps: its controller was never stepped."


def test_a_bias_that_runs_away_is_a_warning_and_one_that_settles_is_not():
    away = np.linspace(0, 2, LINES)[:, None] * np.array([1.0, -1.0])
    finding = living.selection_bias([bias([2.0, -2.0])], history(bias={"a": away}))
    assert finding.verdict == "warning"
    assert "runs away: 2 experts were pushed one way" in finding.words
    settled = np.stack([0.3 + 0.01 * (-1) ** np.arange(LINES), -0.3 - 0.01 * (-1) ** np.arange(LINES)], axis=1)
    assert living.selection_bias([bias([0.3, -0.3])], history(bias={"a": settled})).verdict == "healthy"


def test_a_bias_on_a_softmax_over_many_experts_is_a_warning():
    many = bias(np.linspace(-0.01, 0.01, 256), on_softmax=True)
    assert living.selection_bias([many], NOTHING).verdict == "warning"
    assert living.selection_bias([replace(many, on_softmax=False)], NOTHING).verdict == "healthy"


def test_a_forward_that_moves_tensors_is_sick():
    repeat = Repeat(rerouted={"a": 0.0}, largest_difference=0.0, moved=("router.bias_E",), num_tokens=100)
    assert living.evaluation_repeats(repeat).words == "An evaluation changed 1 tensors of the model: router.bias_E."
    assert living.evaluation_repeats(replace(repeat, moved=())).verdict == "healthy"


def test_a_loss_that_was_no_number_is_found_and_a_figure_that_was_never_written_is_not():
    broken = np.linspace(5, 2, LINES)
    broken[7] = np.nan
    finding = weights.weights_finite(NOTHING, history(loss=broken), "")
    assert finding.verdict == "sick"
    assert finding.words == "The loss of step 80 is nan."
    assert weights.weights_finite(NOTHING, history(grad_norm=np.full(LINES, np.nan)), "").verdict == "healthy"


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_report_is_as_sick_as_its_worst_finding():
    def report(*given):
        findings = tuple(Finding(name=str(index), verdict=one, words="") for index, one in enumerate(given))
        return Report(subject="a", read="", findings=findings)

    assert report("healthy", "warning", "not checked").verdict == "warning"
    assert report("sick", "healthy").verdict == "sick"
    assert report("not checked", "healthy").verdict == "healthy"
    assert report("not checked").verdict == "not checked"
    with pytest.raises(KeyError, match="no check is called 'b'; there are 0"):
        report("healthy")["b"]


def test_evidence_is_json_whatever_the_numbers_are():
    finding = Finding(name="a", verdict="sick", words="", evidence={"x": float("inf"), "pairs": ((1, 2),)})
    assert finding.to_dict()["evidence"] == {"x": "inf", "pairs": [[1, 2]]}


def test_every_threshold_has_a_reason():
    assert all(one.reason and one.means for one in THRESHOLDS.values())
    assert not any("MEASURE" in one.reason for one in THRESHOLDS.values())


def test_the_page_has_every_threshold_as_the_code_has_it():
    page = (Path(__file__).parent.parent.parent / "docs" / "doctor.md").read_text("utf-8")
    for name, one in THRESHOLDS.items():
        assert f"| {name} | {one.means} | {one.value:g} | {one.reason} |" in page
    checks = re.findall(r"^\| ([a-z ]+) \| ", page.partition("## The checks")[2].partition("## Where")[0], re.MULTILINE)
    vitals = Vitals(**dict.fromkeys((field.name for field in fields(Vitals) if field.name != "damaged"), NOTHING))
    assert checks[1:] == [finding.name for finding in judge(vitals)]
