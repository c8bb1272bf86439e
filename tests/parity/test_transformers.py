"""The same weights in our layer and in transformers' block: the same outputs and gradients."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, SwitchTransformersConfig
from transformers.integrations import moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from moesaic import MoELayer, balance, recipes

D, F = 16, 12
IMPLEMENTATIONS = ("eager", "grouped_mm")
sizes = pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
DRAWS = range(8)


def _assert_within_1e_5(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if actual.numel():
        allowed = 1e-5 * max(1.0, float(expected.detach().abs().max()))
        assert float((actual - expected).detach().abs().max()) <= allowed, what


def _gate_up(experts: torch.nn.Module) -> Tensor:
    """Ours in transformers' layout: (E, 2 F, D), gate above up."""
    return torch.cat([experts.gate_EDF, experts.up_EDF], dim=-1).transpose(1, 2)


def _gate_up_gradient(experts: torch.nn.Module) -> Tensor:
    return torch.cat([experts.gate_EDF.grad, experts.up_EDF.grad], dim=-1).transpose(1, 2)


def _copy(ours: MoELayer, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(_gate_up(ours.experts))
        theirs.experts.down_proj.copy_(ours.experts.down_EFD.transpose(1, 2))
        if ours.shared is not None:
            theirs.shared_experts.gate_proj.weight.copy_(ours.shared.gate_DF.t())
            theirs.shared_experts.up_proj.weight.copy_(ours.shared.up_DF.t())
            theirs.shared_experts.down_proj.weight.copy_(ours.shared.down_FD.t())
            theirs.gate.e_score_correction_bias.copy_(ours.router.bias_E)


def _zero_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _compare(ours: MoELayer, theirs: torch.nn.Module, num_tokens: int) -> None:
    _copy(ours, theirs)
    x_TD = torch.randn(num_tokens, D, requires_grad=True)
    x_BPD = x_TD.detach().clone().unsqueeze(0).requires_grad_()
    y_TD, _ = ours(x_TD)
    y_BPD = theirs(x_BPD)
    assert num_tokens == 0 or float(y_BPD.detach().abs().mean()) > 0.05
    _assert_within_1e_5(y_TD, y_BPD[0], "outputs")
    probe_TD = torch.randn(num_tokens, D)
    y_TD.backward(probe_TD)
    if num_tokens == 0:
        # transformers gives no gradients at all here; ours must be zeros.
        assert all(float(p.grad.abs().sum()) == 0 for p in ours.parameters())
        return
    y_BPD.backward(probe_TD[None])
    _assert_within_1e_5(x_TD.grad, x_BPD.grad[0], "gradient of the input")
    _assert_within_1e_5(ours.router.weight.grad, theirs.gate.weight.grad, "gradient of the router")
    gate_up, down = theirs.experts.gate_up_proj, theirs.experts.down_proj
    _assert_within_1e_5(_gate_up_gradient(ours.experts), _zero_if_none(gate_up.grad, gate_up), "gate and up")
    down_grad = _zero_if_none(down.grad, down)
    _assert_within_1e_5(ours.experts.down_EFD.grad.transpose(1, 2), down_grad, "gradient of down")
    if ours.shared is not None:
        for mine, name in ((ours.shared.gate_DF, "gate"), (ours.shared.up_DF, "up"), (ours.shared.down_FD, "down")):
            linear = getattr(theirs.shared_experts, f"{name}_proj")
            _assert_within_1e_5(mine.grad.t(), linear.weight.grad, f"gradient of shared {name}")


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "nonsense"])
def test_the_implementation_asked_for_is_the_one_of_transformers_that_runs(implementation, monkeypatch):
    """Trap 24: the parameter of the tests below is not ignored."""
    calls = []
    real = moe.ALL_EXPERTS_FUNCTIONS._global_mapping["grouped_mm"]
    counted = {"grouped_mm": lambda *arguments: calls.append(1) or real(*arguments)}
    monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "_global_mapping", counted)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    if implementation == "nonsense":
        with pytest.raises(KeyError):
            block(torch.zeros(1, 3, D))
    else:
        block(torch.zeros(1, 3, D))
    assert len(calls) == (implementation == "grouped_mm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@sizes
def test_mixtral_agrees_with_transformers_in_outputs_and_every_gradient(num_tokens, implementation):
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours = recipes.get("mixtral").layer(D, hidden=F, num_experts=8, top_k=2, init_std=0.4)
        config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=8, num_experts_per_tok=2)
        config._experts_implementation = implementation
        _compare(ours, MixtralSparseMoeBlock(config), num_tokens)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "groups_kept", "num_shared"),
    [(8, 2, 1, 1, 1), (16, 4, 4, 2, 2)],
    ids=["one group", "two of four groups"],
)
@sizes
def test_deepseek_v3_agrees_with_transformers_in_outputs_and_every_gradient(
    num_tokens, num_experts, top_k, num_groups, groups_kept, num_shared, implementation
):
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours = recipes.get("deepseek-v3").layer(
            D,
            hidden=F,
            num_experts=num_experts,
            top_k=top_k,
            num_groups=num_groups,
            groups_kept=groups_kept,
            num_shared=num_shared,
            init_std=0.4,
        )
        ours.router.bias_E.copy_(0.5 * torch.randn(num_experts))  # scores lie in 0..1: this changes what is chosen
        config = DeepseekV3Config(
            hidden_size=D,
            moe_intermediate_size=F,
            n_routed_experts=num_experts,
            num_experts_per_tok=top_k,
            n_group=num_groups,
            topk_group=groups_kept,
            n_shared_experts=num_shared,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        _compare(ours, DeepseekV3MoE(config), num_tokens)


@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, False), (2, True), (4, True)])
def test_the_switch_loss_of_transformers_is_ours_times_top_k_by_convention(top_k, padded):
    """transformers counts rows per token, we count shares of rows: theirs is K at balance, ours 1."""
    router = recipes.get("switch").layer(D, hidden=F, num_experts=8, top_k=top_k, init_std=0.4, jitter=0.0).router
    for draw in DRAWS:
        torch.manual_seed(draw)
        valid_T = torch.rand(40) > 0.4 if padded else None
        routing = router(torch.randn(40, D), valid_T)
        mask_BP = None if valid_T is None else valid_T.long()[None]
        theirs = load_balancing_loss_func((routing.logits_TE,), 8, top_k, mask_BP)
        assert float((theirs / balance.switch_loss(routing)).detach()) == pytest.approx(top_k, rel=1e-5)


def _switch_pair(capacity: int) -> tuple[MoELayer, SwitchTransformersSparseMLP]:
    ours = recipes.get("switch").layer(D, hidden=F, num_experts=4, top_k=1, init_std=0.4, jitter=0.0, min_capacity=0)
    config = SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0, dense_act_fn="relu"
    )
    config.hidden_size = D
    theirs = SwitchTransformersSparseMLP(config).eval()
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(ours.router.weight)
        for e in range(4):
            theirs.experts[f"expert_{e}"].wi.weight.copy_(ours.experts.up_EDF[e].t())
            theirs.experts[f"expert_{e}"].wo.weight.copy_(ours.experts.down_EFD[e].t())
    return ours, theirs


@pytest.mark.parametrize(("num_tokens", "capacity"), [(1, 1), (7, 2), (63, 16), (63, 12)])
def test_switch_agrees_with_transformers_in_probabilities_dropped_tokens_and_outputs(num_tokens, capacity):
    """On one sequence: transformers counts its capacity per sequence, we count ours per batch."""
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours, theirs = _switch_pair(capacity)
        # A factor that comes to the same number of slots.
        ours.dispatch.factor = capacity * 4 / num_tokens
        x_TD = torch.randn(num_tokens, D)
        y_TD, routing = ours(x_TD)
        router: SwitchTransformersTop1Router = theirs.router
        # Which of its answers comes first, and whether one of them is logits at all, depends on the version.
        answers = router(x_TD[None])
        kept_BPE = next(answer for answer in answers if not answer.is_floating_point())
        if kept_BPE.ndim == 4:
            pytest.skip("this transformers (such as 5.17) counts a capacity over an axis of 1, and so drops nothing")
        weight_BP1 = next(answer for answer in answers if answer.is_floating_point() and answer.shape[-1] == 1)
        _assert_within_1e_5(routing.logits_TE, router.classifier(x_TD), "logits")
        _assert_within_1e_5(routing.weight_N, weight_BP1.flatten(), "weights")
        assert routing.kept_N.tolist() == kept_BPE.sum(dim=-1).bool().flatten().tolist()
        _assert_within_1e_5(y_TD, theirs(x_TD[None])[0], "outputs")
        if num_tokens == 63:
            assert int((~routing.kept_N).sum()) > 0
