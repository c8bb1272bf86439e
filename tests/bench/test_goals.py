"""What is judged, by which number, and what is not."""

from dataclasses import replace

from moesaic.bench import goals
from moesaic.bench.case import BIG_COARSE, BIG_FINE, COARSE, FINE, VERY_FINE


def test_a_training_step_of_the_fine_case_is_judged_against_the_limit_and_two_peers():
    others = {
        "transformers eager": (3.0, 4.0, 8.0),
        "transformers grouped_mm": (1.0, 1.4, 1.2),
        "transformers batched_mm": (1.0, 1.0, 1.0),
    }
    found = goals.of_layer(FINE, "train", (1.1, 1.3, 1.15), (1.0, 1.0, 2.0), others)
    assert list(map(str, found)) == [
        "of dense ≤ 1.20: 1.15 met",
        "eager over ours ≥ 3.50: 4.00 met",
        "grouped_mm over ours ≥ 1.50: 1.00 missed",
    ]


def test_other_cases_and_forwards_have_their_own_bounds():
    def bounds(case, mode):
        return [goal.bound for goal in goals.of_layer(case, mode, (1.0,), (1.0,), {})]

    assert [bounds(case, "train") for case in (COARSE, FINE, VERY_FINE)] == [[1.05], [1.2], [1.35]]
    assert [bounds(case, "forward") for case in (COARSE, FINE, VERY_FINE)] == [[1.05], [1.2], []]


def test_other_sizes_shared_experts_and_skew_are_not_judged():
    for case in (replace(FINE, num_tokens=64), FINE.with_shared(), replace(FINE, zipf=1.0), replace(FINE, name="x")):
        assert goals.of_layer(case, "train", (1.0,), (1.0,), {}) == ()


def test_decoding_is_judged_with_one_token_by_bandwidth_and_by_their_best():
    one = replace(FINE, num_tokens=1)
    found = goals.of_decoding(one, (1.0, 1.0), (0.7, 0.9), [(9.0, 9.0), (2.5, 2.5)])
    assert list(map(str, found)) == ["of bandwidth ≥ 0.80: 0.80 met", "their best over ours ≥ 2.00: 2.50 met"]
    assert goals.of_decoding(replace(FINE, num_tokens=4), (1.0,), (1.0,), []) == ()
    assert goals.of_decoding(replace(one, hidden=8), (1.0,), (1.0,), []) == ()


def test_growth_is_judged_from_the_fastest_to_the_slowest_and_from_fewest_to_most():
    times = {"T=1": (1.2, 1.2), "T=2": (1.0, 1.0), "T=3": (1.1, 1.1)}
    assert {label: str(goal) for label, goal in goals.of_tokens(times).items()} == {"T=1": "of T=2 ≤ 1.15: 1.20 missed"}
    by_experts = {"E=8": (1.0,), "E=64": (3.0,), "E=256": (1.2,)}
    assert {label: str(goal) for label, goal in goals.of_experts(by_experts).items()} == {
        "E=256": "of E=8 ≤ 1.25: 1.20 met"
    }
    by_skew = {"balanced": (1.0,), "Zipf 0.5": (1.0,), "Zipf 1": (1.2,), "Zipf 1.5": (9.0,)}
    assert {label: goal.met for label, goal in goals.of_skew(by_skew).items()} == {"Zipf 0.5": True, "Zipf 1": False}


def test_a_gpu_is_judged_by_its_own_matrix_rate_and_by_the_best_peer():
    others = {"ScatterMoE": (2.0,), "transformers grouped_mm": (0.9,), "dense": (0.1,)}
    assert list(map(str, goals.on_gpu(BIG_FINE, "train", (0.6,), (1.0,), others))) == [
        "of the matrix rate ≥ 0.55: 0.60 met",
        "best peer over ours ≥ 1.00: 0.90 missed",
    ]
    assert [goal.bound for goal in goals.on_gpu(BIG_COARSE, "train", (0.6,), (1.0,), others)] == [0.7]
    assert goals.on_gpu(BIG_FINE, "forward", (0.6,), (1.0,), others) == ()


def test_memory_is_judged_against_grouped_mm():
    assert str(goals.of_memory(FINE, 30, 100)[0]) == "of grouped_mm ≤ 0.60: 0.30 met"
    assert goals.of_memory(replace(FINE, num_tokens=8), 30, 100) == ()
