import math

import pytest
import torch

from moesaic import ConfigError, Context, MoELayer
from moesaic.experts import MLPExperts
from moesaic.routers import DepthRouter


def _layer(num_experts: int = 1, capacity: float = 0.125) -> MoELayer:
    torch.manual_seed(0)
    init = torch.nn.init.normal_
    router = DepthRouter(6, num_experts, capacity=capacity, init=lambda weight, _: init(weight))
    return MoELayer(router, MLPExperts(num_experts, 6, 5, init=lambda weight, _: init(weight))).double()


@pytest.mark.parametrize(("length", "capacity"), [(64, 0.125), (10, 0.25), (20, 0.15), (3, 0.125), (8, 1.0)])
def test_exactly_the_capacity_of_every_sequence_is_worked_on(length, capacity):
    layer = _layer(capacity=capacity)
    sequence_T = torch.arange(4 * length) // length
    _, routing = layer(torch.randn(4 * length, 6, dtype=torch.float64), None, Context(sequence_T=sequence_T))
    expected = max(1, math.floor(capacity * length + 1e-9))
    assert torch.bincount(sequence_T[routing.token_N]).tolist() == [expected] * 4
    for sequence in range(4):
        mine_T = (sequence_T == sequence).nonzero()[:, 0]
        best = mine_T[routing.logits_TE[mine_T, 0].argsort(descending=True)[:expected]]
        assert sorted(best.tolist()) == routing.token_N[sequence_T[routing.token_N] == sequence].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_is_skipped_comes_out_of_the_block_bit_by_bit(training):
    layer = _layer().train(training)
    x_TD = torch.randn(40, 6, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    skipped_T = torch.ones(40, dtype=torch.bool).index_fill(0, routing.token_N, False)
    assert 0 < int(skipped_T.sum()) < 40
    assert (y_TD[skipped_T] == 0).all()
    assert torch.equal((x_TD + y_TD)[skipped_T], x_TD[skipped_T])


def test_the_weight_is_the_output_as_it_is_and_trains_the_router():
    layer = _layer(capacity=1.0)
    x_TD = torch.randn(20, 6, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    plain_TD = (x_TD @ layer.experts.up_EDF[0]).relu() @ layer.experts.down_EFD[0]
    torch.testing.assert_close(y_TD, (x_TD @ layer.router.weight.T) * plain_TD)  # a plain gated network
    assert (routing.weight_N < 0).any()
    y_TD.sum().backward()
    torch.testing.assert_close(layer.router.weight.grad[0], (x_TD * plain_TD.sum(dim=1, keepdim=True)).sum(dim=0))


def test_evaluation_looks_at_one_token_alone():
    layer = _layer().eval()
    x_TD = torch.randn(40, 6, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    assert routing.token_N.tolist() == (layer.router.logits(x_TD)[:, 0] > 0).nonzero()[:, 0].tolist()
    torch.testing.assert_close(torch.cat([layer(x_TD[t : t + 1])[0] for t in range(40)]), y_TD)


def test_experts_choose_independently_of_each_other():
    layer = _layer(num_experts=3, capacity=0.5)
    _, routing = layer(torch.randn(20, 6, dtype=torch.float64))
    assert routing.load_E.tolist() == [10, 10, 10]
    assert len(set(torch.bincount(routing.token_N, minlength=20).tolist())) > 2
    assert layer.router.experts_per_token == 1.5


def test_padding_is_neither_taken_nor_counted():
    router = _layer(capacity=0.25).router
    x_TD, valid_T = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 5 < 3
    x_TD[~valid_T] *= 100
    sequence_T = torch.arange(40) // 20
    routing = router(x_TD, valid_T, Context(sequence_T=sequence_T))
    assert torch.bincount(sequence_T[routing.token_N]).tolist() == [3, 3]
    assert valid_T[routing.token_N].all()
    assert valid_T[router.eval()(x_TD, valid_T).token_N].all()


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_outputs_go_to_the_earliest_tokens(value):
    router = DepthRouter(2, capacity=0.3)
    with torch.no_grad():
        router.weight.fill_(value)
    x_TD = torch.tensor([[1.0, 0.0]] * 10)
    assert router(x_TD).token_N.tolist() == [0, 1, 2]
    assert router.eval()(x_TD).num_rows == (10 if value > 0 else 0)


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens(training):
    assert _layer().train(training)(torch.randn(0, 6, dtype=torch.float64))[1].num_rows == 0


@pytest.mark.parametrize("capacity", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(capacity):
    with pytest.raises(ConfigError) as error:
        DepthRouter(4, capacity=capacity)
    assert str(error.value) == (
        f"capacity must be above 0 and at most 1, the whole sequence, got {capacity}. The paper uses 0.125."
    )
