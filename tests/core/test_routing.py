import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from moesaic import ConfigError, Routing, ShapeError


def _routing(expert_TK, num_experts: int, valid_T=None) -> Routing:
    expert_TK = torch.tensor(expert_TK)
    scores_TE = torch.full((expert_TK.shape[0], num_experts), 1 / num_experts)
    return Routing.from_choices(expert_TK, torch.rand(expert_TK.shape), scores_TE.log(), scores_TE, valid_T)


def test_row_t_times_k_plus_k_is_token_t_s_kth_choice():
    routing = _routing([[2, 0], [1, 2], [0, 1]], 3)
    assert routing.expert_N.tolist() == [2, 0, 1, 2, 0, 1]
    assert routing.token_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert routing.choice_N.tolist() == [0, 1, 0, 1, 0, 1]
    assert (routing.num_tokens, routing.num_rows, routing.num_experts) == (3, 6, 3)
    assert routing.valid_T.tolist() == [True, True, True]
    assert routing.kept_N.tolist() == [True] * 6
    assert routing.sequence_T is None


def test_rows_of_padding_stay_in_the_table_and_leave_the_load():
    routing = _routing([[2, 0], [1, 2], [0, 1]], 4, torch.tensor([1, 0, 1]))
    assert routing.valid_T.dtype == torch.bool
    assert routing.valid_N.tolist() == routing.kept_N.tolist() == [True, True, False, False, True, True]
    assert routing.load_E.tolist() == [2, 1, 1, 0]
    assert routing.load_E.dtype == torch.int64


def test_load_counts_rows_that_were_dropped():
    routing = _routing([[0], [0]], 2)
    assert replace(routing, kept_N=torch.tensor([True, False])).load_E.tolist() == [2, 0]


def test_a_routing_cannot_be_changed():
    routing = _routing([[0]], 2)
    with pytest.raises(FrozenInstanceError):
        routing.expert_N = torch.zeros(1)


def test_probabilities_are_scores_over_their_sum_and_the_softmax_of_logits_where_all_are_zero():
    logits_TE = torch.tensor([[math.log(1), math.log(3)], [-500.0, -500.0 + math.log(4)]])
    scores_TE = torch.tensor([[0.2, 0.6], [0.0, 0.0]])
    routing = Routing.from_choices(torch.tensor([[1], [1]]), torch.ones(2, 1), logits_TE, scores_TE)
    assert torch.allclose(routing.probability_TE, torch.tensor([[0.25, 0.75], [0.2, 0.8]]), atol=1e-6)


@pytest.mark.parametrize(
    ("expert_shape", "weight_shape"), [((3, 2), (3, 4)), ((3, 2), (5, 2)), ((6,), (6,)), ((3, 2), (6,))]
)
def test_choices_and_weights_of_different_shapes_are_refused(expert_shape, weight_shape):
    scores_TE = torch.ones(3, 7)
    with pytest.raises(ShapeError) as error:
        Routing.from_choices(
            torch.zeros(expert_shape, dtype=torch.int64), torch.ones(weight_shape), scores_TE, scores_TE
        )
    assert str(error.value) == (
        f"expert_TK and weight_TK must both be (tokens, choices), got {expert_shape} and {weight_shape}. "
        "Pass one weight for each chosen expert."
    )


@pytest.mark.parametrize(("logits_shape", "scores_shape"), [((3, 7), (3, 8)), ((4, 7), (4, 7)), ((7,), (7,))])
def test_scores_of_other_tokens_are_refused(logits_shape, scores_shape):
    with pytest.raises(ShapeError) as error:
        Routing.from_choices(
            torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), torch.ones(logits_shape), torch.ones(scores_shape)
        )
    assert str(error.value) == (
        f"logits_TE and scores_TE must both be (3 tokens, experts), got {logits_shape} and {scores_shape}. "
        "Pass the outputs for the same tokens as the choices."
    )


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ShapeError) as error:
        _routing([[0], [1], [0]], 2, torch.ones(1, 3))
    assert str(error.value) == (
        "valid_T must be (3,), one entry for each token, got (1, 3). "
        "Flatten the attention mask as the tokens were flattened."
    )


def test_scores_in_place_of_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        Routing.from_choices(torch.rand(3, 2), torch.rand(3, 2), torch.rand(3, 4), torch.rand(3, 4))
    assert str(error.value) == (
        "expert_TK must hold whole numbers, the chosen experts, got torch.float32. "
        "Pass the indices that topk gives, not the scores."
    )


def test_a_mask_of_floats_is_refused_because_an_additive_one_means_the_opposite():
    with pytest.raises(ConfigError) as error:
        _routing([[0], [1]], 2, torch.tensor([0.0, -math.inf], dtype=torch.bfloat16))
    assert str(error.value) == (
        "valid_T must be bool or integer, True where a token counts, got torch.bfloat16. "
        "A float mask may be additive, where 0 means the opposite: pass mask == 0, or mask.bool()."
    )


def test_rows_of_a_mask_stand_by_token_falling_weight_and_rising_expert():
    chosen_TE = torch.tensor([[True, True, False, True], [False] * 4, [False, True, True, True]])
    weight_TE = torch.tensor([[0.2, 0.5, 9.0, 0.3], [1.0] * 4, [7.0, 0.1, 0.4, 0.4]])
    routing = Routing.from_mask(chosen_TE, weight_TE, weight_TE, weight_TE, torch.tensor([True, True, False]))
    assert routing.token_N.tolist() == [0, 0, 0, 2, 2, 2]
    assert routing.expert_N.tolist() == [1, 3, 0, 2, 3, 1]
    assert routing.choice_N.tolist() == [0, 1, 2, 0, 1, 2]
    assert routing.weight_N.tolist() == pytest.approx([0.5, 0.3, 0.2, 0.4, 0.4, 0.1])
    assert routing.load_E.tolist() == [1, 1, 0, 1]
    assert routing.kept_N.tolist() == [True] * 3 + [False] * 3


def test_a_mixture_has_a_row_for_each_token_and_expert_that_weighs_nothing_for_padding():
    weight_TE = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    extras = {"linear_GTE": torch.zeros(3, 2, 2)}
    routing = Routing.from_mixture(weight_TE, weight_TE.log(), weight_TE, torch.tensor([True, False]), extras=extras)
    assert routing.expert_N.tolist() == [1, 0, 0, 1]
    assert routing.weight_N.tolist() == pytest.approx([0.7, 0.3, 0.0, 0.0])
    assert routing.load_E.tolist() == [1, 1]
    assert torch.equal(routing.scores_TE, weight_TE)
    assert routing.extras == extras


def test_a_mask_for_other_experts_than_the_weights_is_refused():
    with pytest.raises(ShapeError) as error:
        Routing.from_mask(torch.ones(2, 3).bool(), torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4))
    assert str(error.value) == (
        "chosen_TE, weight_TE, logits_TE and scores_TE must all be (tokens, experts), got [(2, 3), (2, 4)]. "
        "Pass all four for the same tokens and experts."
    )
