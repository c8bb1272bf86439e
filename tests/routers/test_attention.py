import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import AttentionRouter


def _router(num_experts: int, query: list[float], key: list[float], value: list[float]) -> AttentionRouter:
    router = AttentionRouter(1, num_experts).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor(query + key + value)[:, None])
    return router


def test_the_worked_example():
    """Reference 20.4."""
    router = _router(2, [1.0, 0.0], [1.0, -1.0], [2.0, 0.0])
    routing = router(torch.ones(1, 1, dtype=torch.float64))
    assert routing.logits_TE.tolist() == [pytest.approx([1.7616, 1.0], abs=1e-4)]
    weight = torch.tensor([1.7616, 1.0]).softmax(dim=0).tolist()
    assert routing.expert_N.tolist() == [0, 1]
    assert routing.weight_N.tolist() == pytest.approx(weight, abs=1e-4)


def test_a_value_common_to_all_experts_is_every_expert_s_score():
    """Reference 20.4: the router cannot tell them apart, and the lowest are taken."""
    router = _router(4, [1.0, -2.0, 3.0, 0.5], [0.3, 0.1, -2.0, 1.0], [0.7] * 4)
    routing = router(torch.ones(1, 1, dtype=torch.float64))
    assert routing.logits_TE.tolist() == [pytest.approx([0.7] * 4)]


def test_scores_agree_with_attention_as_pytorch_computes_it():
    """Each token is a sequence of E positions with one channel; the scale is 1."""
    router, x_TD = AttentionRouter(16, 12, top_k=3).double(), torch.randn(40, 16, dtype=torch.float64)
    torch.nn.init.normal_(router.weight, std=0.4)
    query, key, value = (part[..., None] for part in (x_TD @ router.weight.t()).chunk(3, dim=-1))
    expected_TE1 = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    routing = router(x_TD)
    assert torch.allclose(routing.logits_TE, expected_TE1[..., 0], atol=1e-12)
    top = expected_TE1[..., 0].topk(3)
    assert routing.expert_N.view(40, 3).tolist() == top.indices.tolist()
    assert torch.allclose(routing.weight_N.view(40, 3), top.values.softmax(dim=-1), atol=1e-12)


def test_weights_of_a_token_add_up_to_1():
    """Reference 24."""
    routing = AttentionRouter(8, 6, top_k=4)(torch.randn(30, 8))
    assert routing.weight_N.detach().view(30, 4).sum(dim=-1).tolist() == pytest.approx([1] * 30, abs=1e-6)


def test_queries_keys_and_values_all_learn():
    router = AttentionRouter(8, 6)
    torch.nn.init.normal_(router.weight, std=0.5)
    router(torch.randn(30, 8)).weight_N.square().sum().backward()
    for part in router.weight.grad.chunk(3):
        assert part.abs().max() > 1e-3


def test_autocast_rounds_nothing():
    router, x_TD = AttentionRouter(8, 6), torch.randn(64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD)
    assert torch.equal(cast.logits_TE, router(x_TD).logits_TE)
    assert cast.weight_N.dtype == torch.float32


def test_one_choice_is_refused_because_its_weight_would_be_constant():
    with pytest.raises(ConfigError) as error:
        AttentionRouter(8, 6, top_k=1)
    assert str(error.value) == (
        "top_k=1 needs weights that depend on the router, got a softmax over the one chosen expert, which is 1 and "
        "cuts the router's gradient. Use top_k=2."
    )


def test_a_single_expert_weighs_1():
    assert AttentionRouter(8, 1, top_k=1)(torch.randn(3, 8)).weight_N.tolist() == [1.0, 1.0, 1.0]
