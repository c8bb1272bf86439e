import math

import pytest
import torch

from moesaic import ConfigError, Context, MoELayer
from moesaic.experts import MLPExperts
from moesaic.routers import RandomRouter


def test_all_tokens_of_a_sequence_go_to_one_expert():
    torch.manual_seed(0)
    sequence_T = torch.arange(60) // 5
    expert_TP = RandomRouter(4)(torch.randn(60, 3), None, Context(sequence_T=sequence_T)).expert_N.view(12, 5)
    assert (expert_TP == expert_TP[:, :1]).all()
    assert len(set(expert_TP[:, 0].tolist())) > 1


def test_every_expert_gets_its_share_of_the_sequences_in_the_long_run():
    """Reference 10.4, invariants."""
    torch.manual_seed(0)
    routing = RandomRouter(8)(torch.randn(8000, 3), None, Context(sequence_T=torch.arange(8000)))
    assert (routing.load_E - 1000).abs().max() < 4 * math.sqrt(8000 * (1 / 8) * (7 / 8))


def test_two_passes_draw_anew_and_the_same_seed_draws_the_same():
    router, context = RandomRouter(4), Context(sequence_T=torch.arange(30))
    x_TD = torch.randn(30, 3)
    torch.manual_seed(1)
    first, second = router(x_TD, None, context), router(x_TD, None, context)
    assert not torch.equal(first.expert_N, second.expert_N)
    torch.manual_seed(1)
    assert torch.equal(router(x_TD, None, context).expert_N, first.expert_N)


def test_a_batch_that_names_no_sequences_is_one():
    assert len(set(RandomRouter(4)(torch.randn(30, 3)).expert_N.tolist())) == 1


def test_evaluation_is_the_mean_of_all_experts_and_draws_nothing():
    torch.manual_seed(0)
    layer = MoELayer(RandomRouter(3), MLPExperts(3, 4, 5)).double().eval()
    x_TD = torch.randn(7, 4, dtype=torch.float64)
    before = torch.get_rng_state()
    y_TD, routing = layer(x_TD)
    assert torch.equal(torch.get_rng_state(), before)
    up, down = layer.experts.up_EDF, layer.experts.down_EFD
    every_ETD = [(x_TD @ up[e]).relu() @ down[e] for e in range(3)]
    torch.testing.assert_close(y_TD, sum(every_ETD) / 3)
    assert routing.weight_N.tolist() == [1 / 3] * 21
    assert layer.router.experts_per_token == 1


def test_training_weighs_by_one_and_carries_no_gradient():
    routing = RandomRouter(3)(torch.randn(7, 4, dtype=torch.bfloat16))
    assert routing.weight_N.tolist() == [1.0] * 7
    assert routing.weight_N.dtype == torch.float32
    assert not routing.weight_N.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_and_one_expert(training):
    router = RandomRouter(1).train(training)
    assert router(torch.randn(0, 3), None, Context(sequence_T=torch.zeros(0, dtype=torch.int64))).num_rows == 0
    assert router(torch.randn(2, 3)).expert_N.tolist() == [0, 0]


def test_no_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        RandomRouter(0)
    assert str(error.value) == "num_experts must be at least 1, got 0. THOR uses 2."
