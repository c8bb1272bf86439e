"""A layer never waits for its device: no number is read from it, no shape depends on what it holds.

Fake tensors have shapes and no values, so whatever asks for a value fails. That shows without a GPU where a program
would wait for one, apart from what PyTorch's operations do inside, which ``test_on_gpu.py`` watches.
"""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from moesaic import recipes
from moesaic.balance import losses
from moesaic.balance.terms import LossTerm
from moesaic.core.context import Context
from moesaic.kernels.grouped_ffn.triton import HAS_TRITON

WIDTH, HIDDEN, TOKENS = 16, 16, 24
# The recipes whose tokens all have the same number of choices, and whose experts a kernel can run.
STATIC = (
    *("shazeer-2017", "switch", "residual-moe", "pr-moe", "reinforce", "cosine", "mixtral", "deepseek-moe", "openmoe"),
    *("grok-1", "dbrx", "qwen1.5-moe", "jamba", "arctic", "deepseek-v2", "attention", "skywork", "llama-moe", "olmoe"),
    *("deepseek-v3", "minimax-01", "llama4", "qwen3-moe"),
)


def _step(layer, terms, x_TD, valid_T, sequence_T):
    """One training step's worth of a layer, its balance losses with it."""
    y_TD, routing = layer(x_TD, valid_T, Context(sequence_T=sequence_T))
    loss = y_TD.float().square().sum()
    for term in terms:
        loss = loss + term(routing)
    return y_TD, loss


def _terms(recipe):
    return [term for term in recipe.balance if isinstance(term, LossTerm) and not term.rewarded]


def _given(seed: int = 0):
    torch.manual_seed(seed)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return x_TD, torch.arange(TOKENS) % 7 != 3, torch.arange(TOKENS) // 8


@pytest.mark.parametrize("kernel", ["grouped_mm", "triton"])
@pytest.mark.parametrize("name", STATIC)
def test_a_layer_and_its_losses_ask_the_device_for_nothing(monkeypatch, name, kernel):
    if kernel == "triton" and not HAS_TRITON:
        pytest.skip("NOT TESTED: Triton is not installed here")
    recipe = recipes.get(name)
    layer = recipe.layer(WIDTH, hidden=HIDDEN, kernel=kernel).bfloat16().train()
    # On a CPU the number of sequences may be read; off it, it may not.
    monkeypatch.setattr(losses, "_room_for_sequences", lambda sequence_T: sequence_T.shape[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, loss = _step(layer, _terms(recipe), *_given())
        loss.backward()


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_a_layer_on_the_kernel_for_cpus_does_ask(name):
    """The test above would find it."""
    layer = recipes.get(name).layer(WIDTH, hidden=HIDDEN, kernel="torch").bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        layer(*_given()[:2])


def test_a_router_that_gives_tokens_different_numbers_of_experts_does_ask():
    layer = recipes.get("top-p").layer(WIDTH, hidden=HIDDEN, kernel="grouped_mm").bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DynamicOutputShapeException):
        layer(*_given()[:2])


def _compare_compiled(name: str, backend: str, *, exact: bool) -> None:
    recipe = recipes.get(name)
    layer = recipe.layer(WIDTH, hidden=HIDDEN, kernel="grouped_mm").bfloat16().train()
    found = []
    torch._dynamo.reset()
    for step in (_step, torch.compile(_step, fullgraph=True, backend=backend)):
        x_TD, valid_T, sequence_T = _given()
        y_TD, loss = step(layer, _terms(recipe), x_TD, valid_T, sequence_T)
        loss.backward()
        found.append([y_TD.detach(), loss.detach(), x_TD.grad, *(parameter.grad for parameter in layer.parameters())])
        layer.zero_grad()
    for eager, compiled in zip(*found, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None and exact:
            assert torch.equal(eager, compiled)
        elif eager is not None:  # fused operations round less often
            assert float((eager - compiled).abs().max()) <= 0.02 * float(eager.abs().max())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["switch", "mixtral", "deepseek-v2", "deepseek-v3", "llama4"])
def test_a_layer_and_its_losses_are_one_graph(name):
    _compare_compiled(name, "aot_eager", exact=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: Inductor needs a C++ compiler")
def test_a_layer_and_its_losses_are_one_graph_for_inductor():
    _compare_compiled("mixtral", "inductor", exact=False)
