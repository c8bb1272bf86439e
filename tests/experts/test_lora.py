import pytest
import torch

from moesaic import ConfigError, Plan, Routing, ShapeError
from moesaic.experts import LoRAExperts, SharedExpert
from tests.tolerances import assert_close


def _wide(weight: torch.Tensor, _fan_in: int) -> None:
    torch.nn.init.normal_(weight, std=0.5)


def _experts(num_experts: int = 3, **options) -> LoRAExperts:
    experts = LoRAExperts(num_experts, 5, 4, **({"rank": 2, "alpha": 3.0, "init": _wide} | options)).double()
    for low_rank in (experts.gate, experts.up, experts.down):
        torch.nn.init.normal_(low_rank.out_ERF, std=0.5)
    return experts


def _plan(expert_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> Plan:
    scores_TE = torch.zeros(expert_TK.shape[0], num_experts, dtype=torch.float64)
    routing = Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE)
    return Plan.from_kept(routing, routing.kept_N)


def test_fresh_experts_are_the_network_they_were_loaded_with():
    """Reference 12.4 and 12.5: at the start equal to the base model."""
    dense = SharedExpert(5, 4, init=_wide).double()
    experts = LoRAExperts(3, 5, 4, rank=2, alpha=3.0).double()
    experts.load_base(dense.gate_DF, dense.up_DF, dense.down_FD)
    x_TD = torch.randn(9, 5, dtype=torch.float64)
    half_TK = torch.full((9, 2), 0.5, dtype=torch.float64)
    y_TD = experts(x_TD, _plan(torch.tensor([[0, 2]]).expand(9, 2), half_TK, 3))
    assert_close(y_TD, dense(x_TD), "outputs")
    assert experts.alone(x_TD).abs().sum() == 0


def test_an_expert_is_the_network_with_changed_matrices():
    experts = _experts()
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    for e in range(3):
        changed = SharedExpert(5, 4).double()
        with torch.no_grad():
            for name, low_rank in (("gate_DF", experts.gate), ("up_DF", experts.up), ("down_FD", experts.down)):
                change = 3.0 / 2 * low_rank.into_EDR[e] @ low_rank.out_ERF[e]
                getattr(changed, name).copy_(getattr(experts.base, name) + change)
        ones_TK = torch.ones(6, 1, dtype=torch.float64)
        y_TD = experts(x_TD, _plan(torch.full((6, 1), e), ones_TK, 3))
        assert_close(y_TD, changed(x_TD), f"expert {e}")


def test_all_experts_of_equal_matrices_are_one():
    """Reference 12.5."""
    experts = _experts()
    with torch.no_grad():
        for low_rank in (experts.gate, experts.up, experts.down):
            low_rank.into_EDR.copy_(low_rank.into_EDR[:1].clone().expand_as(low_rank.into_EDR))
            low_rank.out_ERF.copy_(low_rank.out_ERF[:1].clone().expand_as(low_rank.out_ERF))
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    weight_TK = torch.rand(6, 3, dtype=torch.float64).softmax(dim=-1)
    together_TD = experts(x_TD, _plan(torch.arange(3).expand(6, 3), weight_TK, 3))
    alone_TD = experts(x_TD, _plan(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1).double(), 3))
    assert_close(together_TD, alone_TD, "outputs")


def test_the_network_is_frozen_unless_told_otherwise_and_idle_experts_get_zeros():
    x_TD = torch.randn(4, 5, dtype=torch.float64)
    plan = _plan(torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.float64), 3)
    for trains in (False, True):
        experts = _experts(train_base=trains)
        experts(x_TD, plan).sum().backward()
        assert all((p.grad is not None) == trains for p in experts.base.parameters())
        for low_rank in (experts.gate, experts.up, experts.down):
            for weight in (low_rank.into_EDR, low_rank.out_ERF):
                assert [float(weight.grad[e].abs().sum()) > 0 for e in range(3)] == [False, True, False]


def test_an_idle_expert_whose_weights_are_nan_harms_nobody():
    experts = _experts()
    with torch.no_grad():
        experts.gate.into_EDR[2] = float("nan")
    plan = _plan(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.float64), 3)
    y_TD = experts(torch.randn(4, 5, dtype=torch.float64), plan)
    y_TD.sum().backward()
    assert y_TD.isfinite().all()
    assert all(p.grad.isfinite().all() for p in experts.parameters() if p.grad is not None)


def test_dropout_drops_only_what_enters_the_changes_and_only_in_training():
    plan = _plan(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.float64), 3)
    experts = _experts(dropout=0.5)
    x_TD = torch.randn(4, 5, dtype=torch.float64)
    assert not torch.equal(experts(x_TD, plan), experts(x_TD, plan))
    assert torch.equal(experts.eval()(x_TD, plan), experts(x_TD, plan))
    fresh = LoRAExperts(3, 5, 4, rank=2, alpha=3.0, dropout=0.5).double()
    assert torch.equal(fresh(x_TD, plan), fresh(x_TD, plan))


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_each_number_is_dropped_at_the_given_rate_and_the_others_are_scaled_up(rate):
    low_rank = _experts(dropout=rate).gate
    drawn_ND = low_rank.drawn(4000, torch.empty(0, 5, dtype=torch.float64))
    assert drawn_ND.shape == (4000, 5)
    assert (drawn_ND == 0).double().mean().item() == pytest.approx(rate, abs=0.02)
    assert drawn_ND[drawn_ND != 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
    assert low_rank.eval().drawn(4000, drawn_ND) is None


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    experts = _experts(dropout=0.3)
    x_TD = torch.randn(1, 5, dtype=torch.float64)
    weight_TE = torch.full((4000, 3), 1 / 3, dtype=torch.float64)
    mean_TD = experts.gate.mixed(x_TD.expand(4000, 5), weight_TE).mean(dim=0, keepdim=True)
    exact_TD = experts.eval().gate.mixed(x_TD, weight_TE[:1])
    assert (mean_TD - exact_TD).abs().max() < 0.1 * exact_TD.abs().max()


def test_all_experts_at_once_agree_with_one_at_a_time():
    experts = _experts()
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    weight_TE = torch.rand(6, 3, dtype=torch.float64)
    one = torch.stack([experts.up.one(x_TD, e) for e in range(3)], dim=1)
    assert_close(experts.up.every(x_TD), one, "every")
    assert_close(experts.up.mixed(x_TD, weight_TE), (one * weight_TE[:, :, None]).sum(dim=1), "mixed")
    own_TEF = torch.randn(6, 3, 4, dtype=torch.float64)
    each = torch.stack([experts.down.one(own_TEF[:, e], e) for e in range(3)], dim=1)
    assert_close(experts.down.each(own_TEF), each, "each")


def test_trained_maps_are_loaded_one_expert_at_a_time():
    experts = _experts()
    into_DR, out_RF = torch.randn(5, 2).double(), torch.randn(2, 4).double()
    before = experts.gate.into_EDR[0].clone()
    experts.gate.load(1, into_DR, out_RF)
    x_TD = torch.randn(3, 5, dtype=torch.float64)
    assert_close(experts.gate.one(x_TD, 1), 1.5 * x_TD @ into_DR @ out_RF, "loaded")
    assert torch.equal(experts.gate.into_EDR[0], before)


def test_weights_of_another_shape_and_impossible_numbers_are_refused():
    experts = _experts()
    with pytest.raises(ShapeError) as error:
        experts.load_base(torch.zeros(4, 5), torch.zeros(5, 4), torch.zeros(4, 5))
    assert str(error.value) == (
        "gate_DF must be (5, 4), got (4, 5). Weights here are (inputs, outputs): transpose those of torch.nn.Linear, "
        "or build the layer with the model's hidden size."
    )
    with pytest.raises(ConfigError) as error:
        _experts(rank=0)
    assert str(error.value) == "rank must be at least 1, got 0. MixLoRA uses 16."
    with pytest.raises(ConfigError) as error:
        _experts(dropout=1.0)
    assert str(error.value) == "dropout must be at least 0 and below 1, got 1.0. LoRA uses 0.05."
    with pytest.raises(ShapeError, match="must be for 3 experts, got one for 2"):
        experts(torch.zeros(1, 5).double(), _plan(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 2))
