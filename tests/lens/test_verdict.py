import json
from dataclasses import replace

import numpy as np
import pytest

from moesaic.lens.runs import read_run
from moesaic.lens.study import study
from moesaic.lens.verdict import verdict


def sentences(trace, *runs):
    return verdict(study(trace), runs)


@pytest.fixture
def twin_runs(tmp_path, random_trace, write_run):
    def make(offset, **changes):
        trace = random_trace()
        sparse, dense = tmp_path / "moe", tmp_path / "dense"
        write_run(sparse, trace)
        write_run(dense, trace, dense=True, offset=offset)
        summary = json.loads((dense / "summary.json").read_text())
        summary["dense"] |= changes
        (dense / "summary.json").write_text(json.dumps(summary))
        return read_run("moe", sparse), read_run("dense", dense)

    return make


def test_the_better_model_is_named_with_both_figures_and_the_terms(random_trace, twin_runs):
    assert sentences(random_trace(), *twin_runs(0.2))[0] == (
        "The mixture of experts predicts held-out text better than its dense twin: 1.775 against 1.975 bits per byte, "
        "10.1 % fewer, with equal active parameters and equal training tokens. It is ahead in every domain."
    )


def test_a_mixture_that_is_behind_is_said_to_be_behind(random_trace, twin_runs):
    assert sentences(random_trace(), *twin_runs(-0.1, active_params=800))[0] == (
        "The mixture of experts predicts held-out text worse than its dense twin: 1.775 against 1.675 bits per byte, "
        "6.0 % more, with equal training tokens, with 1.25 times its active parameters. It is behind in every domain."
    )


def test_a_win_by_some_domains_only_says_which(random_trace, twin_runs):
    bits = {"code": 1.4, "literature": 2.0, "mathematics": 2.6, "mean": 2.0}
    assert sentences(random_trace(), *twin_runs(0.0, bits_per_byte=bits))[0].endswith(
        "It is ahead in literature and mathematics but not in the other domains."
    )


def test_a_difference_below_a_tenth_of_a_per_cent_is_none(random_trace, twin_runs):
    assert sentences(random_trace(), *twin_runs(0.001))[0].startswith(
        "The mixture of experts and its dense twin predict held-out text equally well: 1.775 against 1.776"
    )


def test_one_run_is_compared_with_guessing(random_trace, twin_runs):
    assert sentences(random_trace(), twin_runs(0.0)[0])[0] == (
        "moe: 1.775 bits for a byte of held-out text; guessing needs 8."
    )


def test_a_twin_that_has_not_finished_is_not_compared(random_trace, twin_runs):
    sparse, dense = twin_runs(0.2)
    assert sentences(random_trace(), sparse, replace(dense, summary={}))[0] == (
        "moe: 1.775 bits for a byte of held-out text; guessing needs 8."
    )


def test_balance_counts_idle_experts(make_trace):
    trace = make_trace([(0, n, 0, 0, 65, n % 2, 0) for n in range(8)])
    assert sentences(trace)[0] == (
        "The work is spread unevenly: the busiest expert of the most uneven layer takes 2.00 times the average load "
        "(1 is perfect), and 2 of the 4 experts got nothing at all."
    )


def test_experts_that_follow_the_domain_are_named_with_chance(make_trace):
    trace = make_trace([(s, n, 0, 0, 65, s % 2, s % 2) for s in range(40) for n in range(4)], num_experts=(2,))
    told = sentences(trace)[1]
    assert told.startswith(
        "Experts split almost entirely by domain: of the 1.00 bits that name a token's domain, its expert in layer 0 "
        "tells 1.000 (chance 0.0"
    )
    assert told.endswith(
        "There code leans to expert 0 (100 % of its choices, where the average domain has 50 %) and literature leans "
        "to expert 1 (100 % of its choices, where the average domain has 50 %)."
    )


def test_random_routing_is_not_called_a_split(random_trace):
    told = sentences(random_trace(num_sequences=30))[1]
    assert told.startswith("Experts do not split by domain as far as this trace can tell: of the 1.58 bits")


def test_one_domain_gets_no_sentence_on_domains(make_trace):
    (balance, staying) = sentences(make_trace([(0, n, 0, 0, 65, n % 4, 0) for n in range(8)]))
    assert balance.startswith("The work is spread evenly: ")
    assert staying == (
        "A token keeps the first-choice expert of the token before it less often than chance would have it: 0 % of the "
        "time against 25 % in layer 0, where it differs most."
    )


def test_dropped_choices_are_told_with_the_worst_layer(random_trace):
    trace = random_trace(num_experts=(4, 4))
    kept = np.ones(trace.num_rows, dtype=bool)
    kept[np.flatnonzero(trace.layer == 1)[:77]] = False
    assert sentences(replace(trace, kept=kept))[-1] == (
        "Experts had no room for 5 % of the choices, 10 % in layer 1, where it was worst."
    )
