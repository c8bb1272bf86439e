import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.balance import importance_cv2, load_cv2
from moesaic.core.init import normal
from moesaic.routers import NoisyTopKRouter
from moesaic.routers.noisy import kept_probability


def router_of(num_experts=6, top_k=2, width=5, std=0.7, **options) -> NoisyTopKRouter:
    return NoisyTopKRouter(width, num_experts, top_k=top_k, init=normal(std), noise_init=normal(std), **options)


def test_the_gates_of_the_worked_example():
    """Reference 3.7, example 1: H = (2, 1, 0), K = 2."""
    router = NoisyTopKRouter(1, 3, top_k=2).eval()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[2.0], [1.0], [0.0]]))
    routing = router(torch.ones(1, 1))
    assert routing.expert_N.tolist() == [0, 1]
    assert routing.weight_N.tolist() == pytest.approx([0.7311, 0.2689], abs=5e-5)


def test_the_load_of_the_worked_example():
    """Reference 3.7, example 2: clean (2, 1, 0), noise of ln 2, sampled H = (2.0, 1.2, 0.4), K = 2."""
    clean_TE, noisy_TE = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.2, 0.4]])
    kept_TE = kept_probability(clean_TE, noisy_TE, torch.full((1, 3), math.log(2)), 2)
    assert kept_TE[0].tolist() == pytest.approx([0.9895, 0.8066, 0.0417], abs=1e-4)


def test_both_matrices_start_at_zero_and_the_noise_at_ln_2():
    """Reference 3.1."""
    torch.manual_seed(1)
    router = NoisyTopKRouter(4, 8, top_k=2)
    assert router.weight.abs().sum() == router.noise_ED.abs().sum() == 0
    noisy_TE = router(torch.randn(20_000, 4)).scores_TE.detach().log()
    noisy_TE = noisy_TE - noisy_TE.mean(dim=-1, keepdim=True)  # a softmax forgets what is common to a token's logits
    assert float(noisy_TE.std()) == pytest.approx(math.log(2) * math.sqrt(7 / 8), rel=0.01)


def test_an_undecided_router_expects_k_t_over_n_rows_for_each_expert():
    """Reference 3.7, example 5."""
    torch.manual_seed(1)
    routing = NoisyTopKRouter(4, 8, top_k=2)(torch.randn(8000, 4))
    assert routing.extras["smooth_load_E"].tolist() == pytest.approx([2000] * 8, rel=0.03)
    assert routing.load_E.tolist() == pytest.approx([2000] * 8, rel=0.1)
    assert float(importance_cv2(routing).detach()) < 1e-3
    assert float(load_cv2(routing).detach()) < 1e-3


def test_the_smooth_load_is_how_often_an_expert_is_kept_if_its_own_noise_is_drawn_anew():
    """Reference 3.7, example 4, by Monte Carlo."""
    torch.manual_seed(2)
    draws = 40_000
    clean_TE, spread_TE = torch.randn(1, 6, dtype=torch.float64), 0.3 + torch.rand(1, 6, dtype=torch.float64)
    noisy_TE = clean_TE + spread_TE * torch.randn(1, 6, dtype=torch.float64)
    for top_k in (1, 2, 5):
        expected_E = kept_probability(clean_TE, noisy_TE, spread_TE, top_k)[0]
        for e in range(6):
            tried = noisy_TE.repeat(draws, 1)
            tried[:, e] = clean_TE[0, e] + spread_TE[0, e] * torch.randn(draws, dtype=torch.float64)
            kept = float((tried.topk(top_k, dim=-1).indices == e).any(dim=-1).double().mean())
            deviation = math.sqrt(kept * (1 - kept) / draws)
            assert abs(float(expected_E[e]) - kept) <= 4.5 * deviation + 1e-4, (top_k, e)


def test_the_smooth_load_has_a_gradient_to_gate_and_noise_where_a_count_has_none():
    torch.manual_seed(0)
    router = router_of()
    routing = router(torch.randn(30, 5))
    load_cv2(routing).backward()
    assert router.weight.grad.abs().max() > 1e-4
    assert router.noise_ED.grad.abs().max() > 1e-4
    assert not routing.load_E.requires_grad


@pytest.mark.parametrize(("top_k", "training"), [(2, False), (6, True), (6, False)])
def test_in_evaluation_and_where_all_are_kept_the_load_is_a_count_without_a_gradient(top_k, training):
    """Reference 3.6."""
    router = router_of(top_k=top_k).train(training)
    valid_T = torch.rand(30) > 0.3
    routing = router(torch.randn(30, 5), valid_T)
    assert routing.extras["smooth_load_E"].tolist() == routing.load_E.tolist()
    load_cv2(routing).backward()
    assert router.weight.grad.abs().sum() == 0


def test_padding_adds_nothing_to_the_smooth_load():
    torch.manual_seed(0)
    router, x_TD, valid_T = router_of(), torch.randn(20, 5), torch.arange(20) % 3 > 0
    x_TD[~valid_T] = float("nan")
    torch.manual_seed(7)
    load_E = router(x_TD, valid_T).extras["smooth_load_E"]
    torch.manual_seed(7)
    assert torch.equal(router(x_TD.nan_to_num(0.3), valid_T).extras["smooth_load_E"], load_E)
    assert float(load_E.detach().sum()) < 2.5 * int(valid_T.sum())


def test_noise_is_for_training_alone_and_drawn_in_one_call():
    router, x_TD = router_of(), torch.randn(9, 5)
    torch.manual_seed(3)
    routing = router(x_TD)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    drawn_TE = torch.randn(9, 6)
    assert torch.equal(torch.get_rng_state(), after)
    spread_TE = torch.nn.functional.softplus(x_TD @ router.noise_ED.t())
    noisy_TE = routing.logits_TE + drawn_TE * spread_TE
    assert torch.allclose(routing.scores_TE, noisy_TE.softmax(dim=-1), atol=1e-6)
    evaluated = router.eval()(x_TD)
    assert torch.equal(evaluated.scores_TE, evaluated.logits_TE.softmax(dim=-1))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("noise_epsilon", [0.0, 0.01, 2.0])
def test_epsilon_is_the_least_width_of_the_noise(noise_epsilon):
    torch.manual_seed(0)
    router = NoisyTopKRouter(1, 4, top_k=2, noise_epsilon=noise_epsilon, noise_init=normal(0))
    with torch.no_grad():
        router.noise_ED.fill_(-200.0)  # softplus(-200) is 0 in float32
    logs_TE = router(torch.ones(5000, 1)).scores_TE.detach().log()
    assert float((logs_TE[:, 0] - logs_TE[:, 1]).std()) == pytest.approx(noise_epsilon * math.sqrt(2), rel=0.05)


def test_the_gate_of_llama_moe_has_a_hidden_layer_of_tanh():
    router = router_of(gate="mlp").eval()
    x_TD = torch.randn(7, 5)
    expected_TE = (x_TD @ router.weight.t()).tanh() @ router.mix_EE.t()
    assert torch.allclose(router(x_TD).logits_TE, expected_TE, atol=1e-6)
    assert router_of(gate="linear").mix_EE is None


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_token_s_weights_add_up_to_the_scale(scale):
    routing = router_of(scale=scale)(torch.randn(30, 5))
    assert routing.weight_N.view(30, 2).sum(dim=-1).tolist() == pytest.approx([scale] * 30)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("logit", [1e4, -1e4, 0.0, float("inf"), float("-inf")])
@pytest.mark.parametrize("spread", [-1e4, 0.0, 1e4])
def test_extreme_logits_and_noise_give_numbers_and_numbers_as_gradients(logit, spread, training, monkeypatch):
    router = router_of(width=2).train(training)
    leaf_TE = torch.randn(8, 6)
    if logit != float("inf"):
        leaf_TE[:, 1] = logit  # one expert far off, for all tokens
        leaf_TE[0] = logit if abs(logit) <= 1e4 else 0.0  # all alike
    leaf_TE.requires_grad_()
    with torch.no_grad():
        router.noise_ED.fill_(spread)
    monkeypatch.setattr(NoisyTopKRouter, "logits", lambda _router, _x_TD: leaf_TE * 1)
    routing = router(torch.ones(8, 2))
    loss = load_cv2(routing) + importance_cv2(routing) + routing.weight_N.square().sum()
    loss.backward()
    assert routing.weight_N.isfinite().all()
    assert routing.extras["smooth_load_E"].isfinite().all()
    assert loss.isfinite()
    assert leaf_TE.grad.isfinite().all()
    assert router.noise_ED.grad.isfinite().all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 6, 2), (5, 1, 1), (5, 4, 4)])
def test_no_tokens_one_expert_and_as_many_choices_as_experts(num_tokens, num_experts, top_k):
    router = router_of(num_experts, top_k)
    routing = router(torch.randn(num_tokens, 5))
    assert routing.num_rows == num_tokens * top_k
    (load_cv2(routing) + importance_cv2(routing) + routing.weight_N.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"top_k": 1},
            "top_k=1 needs weights that depend on the router, got a softmax over 1 of 6 experts, which is always 1. "
            "Use top_k=2.",
        ),
        ({"top_k": 7}, "top_k must be between 1 and num_experts=6, got 7. Lower top_k, or add experts."),
        ({"noise_epsilon": -0.5}, "noise_epsilon must be at least 0, got -0.5. tensor2tensor uses 0.01."),
        ({"gate": "deep"}, "gate must be 'linear' or 'mlp', got 'deep'. Shazeer 2017 uses 'linear'."),
        ({"scale": 0.0}, "scale must not be 0, got 0.0: every weight and gradient would be 0. LLaMA-MoE uses E / K."),
    ],
)
def test_a_router_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        NoisyTopKRouter(5, 6, **{"top_k": 2} | options)
    assert str(error.value) == message
