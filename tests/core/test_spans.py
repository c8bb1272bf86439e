import torch

from moesaic.core.spans import Spans
from tests.tolerances import assert_close

SEQUENCE_T = torch.tensor([7, 7, 3, 7, 3, 7, 7, 9])
VALID_T = torch.tensor([True, True, True, False, True, True, True, False])


def test_whole_sequences_stand_by_rising_id_with_their_tokens_in_order_and_no_padding():
    spans = Spans.of(SEQUENCE_T, VALID_T)
    assert spans.token_N.tolist() == [2, 4, 0, 1, 5, 6]
    assert spans.span_N.tolist() == [0, 0, 1, 1, 1, 1]
    assert spans.place_N.tolist() == [0, 1, 0, 1, 2, 3]
    assert spans.count_S.tolist() == [2, 4]
    assert spans.first_S.tolist() == [True, True]


def test_segments_count_no_padding_and_know_the_first_of_their_sequence():
    spans = Spans.of(SEQUENCE_T, VALID_T, 3)
    assert spans.span_N.tolist() == [0, 0, 1, 1, 1, 2]
    assert spans.place_N.tolist() == [0, 1, 0, 1, 2, 0]
    assert spans.count_S.tolist() == [2, 3, 1]
    assert spans.first_S.tolist() == [True, True, False]


def test_stack_and_unstack_are_there_and_back_and_padding_gets_zeros():
    x_TD = torch.randn(8, 2)
    spans = Spans.of(SEQUENCE_T, VALID_T, 3)
    x_SPD = spans.stack(x_TD)
    assert x_SPD.shape == (3, 3, 2)
    assert torch.equal(x_SPD[1], x_TD[[0, 1, 5]])
    assert x_SPD[2, 1:].abs().sum() == 0
    assert torch.equal(spans.unstack(x_SPD, 8), x_TD * VALID_T[:, None])


def test_means_are_spread_over_the_tokens_that_they_were_taken_over():
    x_TD = torch.randn(8, 2)
    spans = Spans.of(SEQUENCE_T, VALID_T)
    mean_SD = spans.mean(x_TD)
    assert_close(mean_SD, torch.stack([x_TD[[2, 4]].mean(dim=0), x_TD[[0, 1, 5, 6]].mean(dim=0)]), "means")
    back_TD = spans.spread(mean_SD, 8)
    assert torch.equal(back_TD[5], mean_SD[1])
    assert back_TD[~VALID_T].abs().sum() == 0


def test_a_batch_without_a_token_has_one_empty_span_whose_mean_is_zero():
    for num_tokens in (0, 4):
        spans = Spans.of(torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(num_tokens, dtype=torch.bool), 2)
        assert (spans.num_spans, spans.count_S.tolist()) == (1, [0])
        x_TD = torch.randn(num_tokens, 3, requires_grad=True)
        assert spans.mean(x_TD).tolist() == [[0.0, 0.0, 0.0]]
        spans.unstack(spans.stack(x_TD), num_tokens).sum().backward()
        assert x_TD.grad.abs().sum() == 0


def test_a_nan_in_padding_reaches_no_span():
    x_TD = torch.randn(8, 2)
    x_TD[~VALID_T] = float("nan")
    spans = Spans.of(SEQUENCE_T, VALID_T)
    assert spans.mean(x_TD).isfinite().all()
    assert spans.stack(x_TD).isfinite().all()


def test_the_plan_of_spans_makes_each_span_an_expert():
    plan = Spans.of(SEQUENCE_T, VALID_T).plan(torch.ones(6))
    assert plan.load_E.tolist() == [2, 4]
    assert plan.offset_E.tolist() == [2, 6]
    assert plan.token_N.tolist() == [2, 4, 0, 1, 5, 6]
