"""Chosen logits have a sparse gradient; every number stays that of plain autograd."""

import pytest
import torch
import torch.nn.functional as F

from moesaic.balance.losses import switch_loss, z_loss
from moesaic.core.context import Context
from moesaic.routers import TopKRouter, sparse_gradient
from tests.tolerances import assert_close

NUM_TOKENS, WIDTH, NUM_EXPERTS, TOP_K = 70, 6, 48, 3
PLAIN = 1 << 40


@pytest.fixture(autouse=True)
def _few_logits_are_enough(monkeypatch):
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", 1)


def _router(**options) -> TopKRouter:
    torch.manual_seed(1)
    router = TopKRouter(WIDTH, NUM_EXPERTS, top_k=TOP_K, normalize="logits", logit_bias=True, **options).train()
    torch.nn.init.normal_(router.weight)
    return router


def _gradients(router, loss_of, dtype=torch.float64, num_tokens=NUM_TOKENS, context=None):
    """Of tokens and parameters, and that of the logits."""
    torch.manual_seed(2)
    router = router.to(dtype)
    x_TD = torch.randn(num_tokens, WIDTH, dtype=dtype, requires_grad=True)
    routing = router(x_TD, torch.arange(num_tokens) % 5 != 1, context or Context())
    routing.logits_TE.retain_grad()
    loss_of(routing).backward()
    return {"tokens": x_TD.grad, **{name: each.grad for name, each in router.named_parameters()}}, routing


def _of_weights(routing):
    torch.manual_seed(3)
    return (routing.weight_N * torch.randn_like(routing.weight_N)).sum()


LOSSES = {
    "weights": _of_weights,
    "weights and all logits": lambda routing: _of_weights(routing) + z_loss(routing) + switch_loss(routing),
    "all logits": lambda routing: z_loss(routing) + 0 * routing.weight_N.detach().sum(),
    "weights twice": lambda routing: (
        _of_weights(routing)
        + sparse_gradient.gather(routing.logits_TE, torch.ones_like(routing.expert_N[:, None])[:70]).square().sum()
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"jitter": 0.1, "scale": 2.5}], ids=["plain", "jitter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_plain_autograd(monkeypatch, loss, options, dtype):
    found, routing = _gradients(_router(**options), LOSSES[loss], dtype)
    assert routing.logits_TE.grad.is_sparse == (loss in ("weights", "weights twice"))
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", PLAIN)
    expected, plain = _gradients(_router(**options), LOSSES[loss], dtype)
    assert not plain.logits_TE.grad.is_sparse
    assert torch.equal(routing.weight_N, plain.weight_N)
    assert_close(routing.logits_TE.grad.to_dense(), plain.logits_TE.grad, "gradient of logits")
    for name, gradient in expected.items():
        assert_close(found[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
def test_any_number_of_tokens_has_its_gradients(monkeypatch, num_tokens):
    found, _ = _gradients(_router(), _of_weights, num_tokens=num_tokens)
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", PLAIN)
    expected, _ = _gradients(_router(), _of_weights, num_tokens=num_tokens)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, f"gradient of {name}")


def test_an_expert_that_was_handed_twice_to_a_token_has_both_gradients(monkeypatch):
    context = Context(choice_TK=torch.tensor([[4, 4, 0]]).expand(NUM_TOKENS, -1))
    found, _ = _gradients(_router(), _of_weights, context=context)
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", PLAIN)
    expected, _ = _gradients(_router(), _of_weights, context=context)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, f"gradient of {name}")


def test_a_gradient_can_be_differentiated_again(monkeypatch):
    def second():
        router = _router().double()
        x_TD = torch.randn(9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
        (first_TD,) = torch.autograd.grad(_of_weights(router(x_TD)), x_TD, create_graph=True)
        return torch.autograd.grad(first_TD.square().sum(), [x_TD, router.weight])

    found = second()
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", PLAIN)
    for gradient, expected in zip(found, second(), strict=True):
        assert_close(gradient, expected, "second gradient")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch.func.jvp itself
def test_functional_transforms_give_the_same(monkeypatch):
    router, x_TD = _router().double(), torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64)
    weight_ED = router.weight.detach()

    def loss(weight_ED, x_TD):
        return _of_weights_of(torch.func.functional_call(router, {"weight": weight_ED}, (x_TD,)))

    def found():
        stacked = torch.stack([weight_ED, 2 * weight_ED]), torch.stack([x_TD, -x_TD])
        return (
            torch.func.jvp(loss, (weight_ED, x_TD), (x_TD[:NUM_EXPERTS], x_TD))[1],
            torch.func.jvp(lambda x_TD: loss(weight_ED, x_TD), (x_TD,), (x_TD,))[1],
            torch.func.vmap(torch.func.grad(loss))(*stacked),
        )

    ours = found()
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", PLAIN)
    for derivative, expected in zip(ours, found(), strict=True):
        assert_close(derivative, expected, "derivative")


@pytest.mark.parametrize("frozen", ["tokens", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    router = _router()
    router.weight.requires_grad_(frozen != "weight")
    x_TD = torch.randn(NUM_TOKENS, WIDTH, requires_grad=frozen != "tokens")
    _of_weights(router(x_TD)).backward()
    assert (x_TD.grad is None) == (frozen == "tokens")
    assert (router.weight.grad is None) == (frozen == "weight")


def test_gradients_of_logits_that_came_another_way_are_dense():
    logits_TE = (2 * torch.randn(NUM_TOKENS, NUM_EXPERTS, requires_grad=True)).requires_grad_()
    logits_TE.retain_grad()
    sparse_gradient.gather(logits_TE, torch.zeros(NUM_TOKENS, TOP_K, dtype=torch.int64)).sum().backward()
    assert not logits_TE.grad.is_sparse


@pytest.mark.parametrize(("num_tokens", "top_k"), [(4, 3), (NUM_TOKENS, 4)])
def test_few_logits_or_many_choices_keep_the_dense_product(monkeypatch, num_tokens, top_k):
    monkeypatch.setattr(sparse_gradient, "LEAST_LOGITS", 5 * NUM_EXPERTS)
    x_TD, weight_ED = torch.randn(num_tokens, WIDTH), torch.randn(NUM_EXPERTS, WIDTH, requires_grad=True)
    logits_TE = sparse_gradient.linear(x_TD, weight_ED, None, top_k)
    logits_TE.retain_grad()
    sparse_gradient.gather(logits_TE, torch.zeros(num_tokens, top_k, dtype=torch.int64)).sum().backward()
    assert not logits_TE.grad.is_sparse
    torch.testing.assert_close(weight_ED.grad, F.pad(top_k * x_TD.sum(0, keepdim=True), (0, 0, 0, NUM_EXPERTS - 1)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_router_is_one_graph_with_dense_products():
    def step(router, x_TD):
        return _of_weights_of(router(x_TD))

    torch._dynamo.reset()
    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        router = _router()
        x_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)).requires_grad_()
        run(router, x_TD).backward()
        found.append([x_TD.grad, router.weight.grad, router.logit_bias_E.grad])
    for eager, compiled in zip(*found, strict=True):
        assert_close(compiled, eager, "gradient")


def _of_weights_of(routing):
    return (routing.weight_N * torch.arange(routing.num_rows)).sum()
