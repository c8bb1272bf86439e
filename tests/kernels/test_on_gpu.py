"""What only a GPU can show: that nothing waits for it, that a CUDA graph holds a layer, rows behind 2^31 numbers."""

import pytest
import torch

from moesaic import Plan, Routing, recipes
from moesaic.balance.terms import LossTerm
from moesaic.core.context import Context
from moesaic.kernels.activations import activation
from moesaic.kernels.grouped_ffn import KERNELS, grouped_ffn_reference
from tests.kernels.test_nothing_is_asked import STATIC
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: needs a CUDA device"),
]
CUDA = torch.device("cuda")
FAST = [kernel for kernel in KERNELS if kernel.name in ("grouped_mm", "triton")]
every_kernel = pytest.mark.parametrize("kernel", FAST, ids=lambda kernel: kernel.name)


def _skip_unless_runs(kernel, dtype=torch.bfloat16) -> None:
    why_not = kernel.cannot(CUDA, dtype)
    if why_not is not None:
        pytest.skip(f"NOT TESTED: kernel {kernel.name} cannot run on this GPU in {dtype}: {why_not}")


def _plan(num_tokens: int, num_experts: int, top_k: int, weight: torch.Tensor) -> Plan:
    """Rows of random experts; the last expert gets none, and one row in eight is dropped."""
    scores_TE = torch.rand(num_tokens, num_experts, device=CUDA)
    scores_TE[:, -1] = -1
    expert_TK = scores_TE.topk(top_k, dim=-1).indices
    routing = Routing.from_choices(expert_TK, weight.view(num_tokens, top_k), scores_TE, scores_TE)
    return Plan.from_kept(routing, torch.rand(num_tokens * top_k, device=CUDA) > 0.125)


def _leaves(num_tokens, num_experts, top_k, width, hidden, dtype):
    made = (
        torch.randn(num_tokens, width, device=CUDA),
        torch.rand(num_tokens * top_k, device=CUDA) + 0.1,
        torch.randn(num_experts, width, hidden, device=CUDA) / width**0.5,
        torch.randn(num_experts, width, hidden, device=CUDA) / width**0.5,
        torch.randn(num_experts, hidden, width, device=CUDA) / hidden**0.5,
    )
    return [one.to(torch.float32 if i == 1 else dtype).requires_grad_() for i, one in enumerate(made)]


# float16 carries 11 bits where bfloat16 carries 8.
TOLERANCE_OF = {torch.float16: torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "hidden"),
    [(2048, 8, 2, 512, 384), (700, 64, 8, 136, 72), (3, 16, 4, 256, 128), (1000, 5, 1, 264, 1032)],
    ids=["coarse", "fine", "few", "odd"],
)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_kernel
def test_a_kernel_agrees_with_the_reference_in_float64(kernel, gated, tokens, experts, top_k, width, hidden, dtype):
    _skip_unless_runs(kernel, dtype)
    torch.manual_seed(0)
    leaves = _leaves(tokens, experts, top_k, width, hidden, dtype)
    plan = _plan(tokens, experts, top_k, leaves[1])
    probe_TD = torch.randn(tokens, width, device=CUDA).to(dtype)
    truth = [one.detach().double().requires_grad_() for one in leaves]
    true_plan = Plan(
        row_N=plan.row_N,
        token_N=plan.token_N,
        weight_N=truth[1][plan.row_N],
        load_E=plan.load_E,
        offset_E=plan.offset_E,
        kept_N=plan.kept_N,
    )
    found = []
    for run, given, rows in ((kernel.run, leaves, plan), (grouped_ffn_reference, truth, true_plan)):
        x_TD, _, gate_EDF, up_EDF, down_EFD = given
        y_TD = run(x_TD, rows, gate_EDF if gated else None, up_EDF, down_EFD, activation("silu"))
        y_TD.backward(probe_TD.to(y_TD.dtype))
        found.append([y_TD, *(one.grad for one in given)])
    for name, ours, expected in zip(("y", "x", "weight", "gate", "up", "down"), *found, strict=True):
        if ours is None and expected is None:
            assert name == "gate"
            assert not gated
            continue
        assert_close(ours, expected, f"{name} of {kernel.name}", TOLERANCE_OF.get(dtype, dtype))
    for grad in found[0][4:]:  # up and down
        assert not grad[-1].any(), "an expert without rows has exact zeros"


@every_kernel
def test_a_kernel_gives_the_same_bits_twice_on_a_gpu(kernel):
    _skip_unless_runs(kernel)
    leaves = _leaves(4096, 16, 4, 256, 256, torch.bfloat16)
    plan = _plan(4096, 16, 4, leaves[1])
    runs = []
    for _ in range(2):
        x_TD, _, *stacks = leaves
        y_TD = kernel.run(x_TD, plan, *stacks, activation("silu"))
        grads = torch.autograd.grad(y_TD.float().square().sum(), leaves, retain_graph=True)
        runs.append([y_TD.detach(), *grads])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def _layer_step(name: str, kernel_name: str):
    recipe = recipes.get(name)
    layer = recipe.layer(64, hidden=64, kernel=kernel_name).to(CUDA, torch.bfloat16).train()
    terms = [term for term in recipe.balance if isinstance(term, LossTerm) and not term.rewarded]
    x_TD = torch.randn(256, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    valid_T = torch.arange(256, device=CUDA) % 7 != 3
    context = Context(sequence_T=torch.arange(256, device=CUDA) // 64)

    def step():
        y_TD, routing = layer(x_TD, valid_T, context)
        loss = y_TD.float().square().sum()
        for term in terms:
            loss = loss + term(routing)
        loss.backward()
        return y_TD

    return layer, x_TD, step


@pytest.fixture
def forbid_waiting():
    """Call it, and from then on whatever has the host wait for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STATIC)
@every_kernel
def test_a_training_step_of_a_layer_never_waits_for_the_gpu(forbid_waiting, kernel, name):
    _skip_unless_runs(kernel)
    _, _, step = _layer_step(name, kernel.name)
    step()  # blocks are tuned, and libraries make their workspaces
    torch.cuda.synchronize()
    forbid_waiting()
    step()


@pytest.mark.parametrize("name", ["mixtral", "switch", "deepseek-v3"])
@every_kernel
def test_a_cuda_graph_holds_a_training_step_of_a_layer(kernel, name):
    _skip_unless_runs(kernel)
    layer, x_TD, step = _layer_step(name, kernel.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    leaves = [x_TD, *layer.parameters()]
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_TD = step()
    for _ in range(2):  # other tokens, other loads, the same graph
        with torch.no_grad():
            x_TD.copy_(torch.randn_like(x_TD))
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.grad.zero_()
        graph.replay()
        replayed = [
            captured_TD.detach().clone(),
            *(None if leaf.grad is None else leaf.grad.clone() for leaf in leaves),
        ]
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad.zero_()
        eager = [step().detach(), *(leaf.grad for leaf in leaves)]
        for ours, expected in zip(replayed, eager, strict=True):
            assert (ours is None) == (expected is None)
            assert ours is None or torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_kernel
def test_a_layer_is_one_compiled_graph_on_a_gpu(kernel):
    _skip_unless_runs(kernel)
    layer = recipes.get("mixtral").layer(64, hidden=64, kernel=kernel.name).to(CUDA, torch.bfloat16)
    x_TD = torch.randn(256, 64, device=CUDA, dtype=torch.bfloat16)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        given_TD = x_TD.clone().requires_grad_()
        y_TD, _ = run(given_TD)
        y_TD.float().square().sum().backward()
        found.append([y_TD, given_TD.grad, *(parameter.grad for parameter in layer.parameters())])
        layer.zero_grad()
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "compiled", torch.bfloat16)


@every_kernel
def test_rows_behind_two_to_the_31_numbers_are_worked_on_like_the_others(kernel):
    """Trap 16."""
    _skip_unless_runs(kernel)
    tokens, width, hidden = 2**17 + 64, 64, 2**14 + 64
    assert tokens * hidden > 2**31
    if torch.cuda.get_device_properties(CUDA).total_memory < 60 * 2**30:
        pytest.skip("NOT TESTED: needs 60 GiB of GPU memory")
    x_TD, weight, *stacks = _leaves(tokens, 2, 1, width, hidden, torch.bfloat16)
    plan = _plan(tokens, 2, 1, weight)
    y_TD = kernel.run(x_TD, plan, *stacks, activation("silu"))
    y_TD.sum().backward()
    last = slice(int(plan.offset_E[0]) - 32, int(plan.offset_E[0]))
    token_M = plan.token_N[last]
    x_MD = x_TD.detach()[token_M].requires_grad_()
    gate_DF, up_DF, down_FD = (one.detach()[0] for one in stacks)
    expected_MD = (torch.nn.functional.silu(x_MD @ gate_DF) * (x_MD @ up_DF)) @ down_FD * plan.weight_N[last, None]
    expected_MD.sum().backward()
    assert_close(y_TD[token_M], expected_MD, "y", torch.bfloat16)
    assert_close(x_TD.grad[token_M], x_MD.grad, "x", torch.bfloat16)
