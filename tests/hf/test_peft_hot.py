"""Experts chosen by a trace: per layer, by weight or by how often, ties to the lowest."""

import numpy as np
import pytest
import torch

from moesaic import ConfigError, RoutingTrace
from moesaic.hf import hot_experts, record
from moesaic.telemetry import TraceMetadata
from tests.hf.test_peft import sparse


def trace_of(rows, *, num_experts=(4, 4)):
    """A trace of rows (sequence, position, layer, expert, weight, kept)."""
    columns = list(zip(*rows, strict=True))
    length = len(rows)
    names = tuple(f"layer{index}" for index in range(len(num_experts)))
    return RoutingTrace(
        metadata=TraceMetadata(model="tiny", layer_names=names, num_experts=num_experts, top_k=None),
        sequence=np.array(columns[0]),
        position=np.array(columns[1]),
        layer=np.array(columns[2]),
        choice=np.zeros(length),
        token_id=np.zeros(length),
        expert=np.array(columns[3]),
        weight=np.array(columns[4]),
        score=np.array(columns[4]),
        kept=np.array(columns[5]),
        domain=np.full(length, -1),
    )


TWO_LAYERS = [
    # layer 0: expert 3 most by weight, expert 1 most often
    *[(0, position, 0, 1, 0.2, True) for position in range(3)],
    (0, 3, 0, 3, 0.9, True),
    # layer 1: all weights a tenth of layer 0's
    *[(0, position, 1, 0, 0.03, True) for position in range(3)],
    (0, 3, 1, 2, 0.05, True),
]


def test_each_layer_is_measured_by_its_own_sum():
    # Divided by sums over layers, as in the published script, layer 1 would reach no threshold that layer 0 does.
    assert hot_experts(trace_of(TWO_LAYERS), top_p=0.59) == {0: [3], 1: [0]}
    assert hot_experts(trace_of(TWO_LAYERS), top_p=0.65) == {0: [1, 3], 1: [0, 2]}


def test_frequency_counts_choices():
    assert hot_experts(trace_of(TWO_LAYERS), top_p=0.5, score="frequency") == {0: [1], 1: [0]}
    assert hot_experts(trace_of(TWO_LAYERS), top_p=0.75, score="frequency") == {0: [1], 1: [0]}
    assert hot_experts(trace_of(TWO_LAYERS), top_p=0.76, score="frequency") == {0: [1, 3], 1: [0, 2]}


def test_every_sequence_counts_alike_however_long():
    rows = [(0, position, 0, 0, 0.5, True) for position in range(9)] + [(1, 0, 0, 1, 0.6, True)]
    assert hot_experts(trace_of(rows, num_experts=(4,)), top_p=0.5) == {0: [1]}
    assert hot_experts(trace_of(rows, num_experts=(4,)), share=0.25, score="frequency") == {0: [0]}  # a tie: the lowest


def test_weights_are_divided_by_tokens_not_by_rows():
    # Sequence 0 has two tokens of two experts each, sequence 1 one token of one.
    rows = [(0, 0, 0, 0, 0.4, True), (0, 0, 0, 1, 0.4, True), (0, 1, 0, 0, 0.4, True), (0, 1, 0, 1, 0.4, True)]
    rows += [(1, 0, 0, 2, 0.3, True)]
    assert hot_experts(trace_of(rows, num_experts=(4,)), share=0.5) == {0: [0, 1]}


def test_a_share_is_rounded_up():
    rows = [(0, 0, 0, expert, weight, True) for expert, weight in enumerate([0.1, 0.4, 0.3, 0.2, 0.0])]
    trace = trace_of(rows, num_experts=(5,))
    assert hot_experts(trace, share=0.2) == {0: [1]}
    assert hot_experts(trace, share=0.21) == {0: [1, 2]}
    assert hot_experts(trace, share=0.6) == {0: [1, 2, 3]}  # 0.6 * 5 is 3.0000000000000004 for a computer
    assert hot_experts(trace, share=1.0) == {0: [0, 1, 2, 3, 4]}


def test_all_of_the_score_are_all_experts_that_have_any():
    assert hot_experts(trace_of(TWO_LAYERS), top_p=1.0) == {0: [1, 3], 1: [0, 2]}


def test_dropped_rows_do_not_count():
    rows = [(0, 0, 0, 1, 0.9, False), (0, 0, 0, 2, 0.1, True)]
    assert hot_experts(trace_of(rows, num_experts=(4,)), top_p=1.0) == {0: [2]}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.2, "share": 0.2}, {"top_p": 0.0}, {"share": 1.2}], ids=str)
def test_one_threshold_is_needed(options):
    with pytest.raises(ConfigError) as error:
        hot_experts(trace_of(TWO_LAYERS), **options)
    assert str(error.value) == (
        f"hot_experts needs one of top_p and share, above 0 and at most 1, got top_p={options.get('top_p')} and "
        f"share={options.get('share')}. Start with top_p=0.2."
    )


def test_a_layer_without_rows_is_refused():
    with pytest.raises(ConfigError, match="The trace has no kept rows of layer 1, layer1, so none of its 4 experts"):
        hot_experts(trace_of(TWO_LAYERS[:4]), top_p=0.2)


def test_an_unknown_score_is_refused():
    with pytest.raises(ConfigError, match="score must be 'weight' or 'frequency', got 'logit'"):
        hot_experts(trace_of(TWO_LAYERS), top_p=0.2, score="logit")


def test_it_takes_what_record_gives():
    model, inputs = sparse("mixtral")
    with torch.no_grad(), record(model) as trace:
        model(**inputs)
    chosen = hot_experts(trace, share=0.5)
    weight = np.zeros((2, 4))
    np.add.at(weight, (trace.layer, trace.expert), trace.weight)
    assert chosen == {layer: sorted(np.argsort(-weight[layer])[:2].tolist()) for layer in (0, 1)}
