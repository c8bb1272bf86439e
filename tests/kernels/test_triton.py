"""The Triton kernel against the plain loops: on a GPU where there is one, else tiny sizes in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from moesaic import MoELayer
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation
from moesaic.kernels.grouped_ffn import KERNELS, grouped_ffn_reference, grouped_ffn_triton
from moesaic.kernels.grouped_ffn.by_token import TokenRows
from moesaic.kernels.grouped_ffn.row_work import IN_PYTORCH
from moesaic.kernels.grouped_ffn.triton import HAS_TRITON, row_work_in_triton
from moesaic.routers import TopKRouter
from tests.kernels.case import Case, D, E, F, K, choices, choices_of_loads, compare, inputs, leaves_of
from tests.oracle.experts import ACTIVATIONS
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="NOT TESTED: Triton is not installed here")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = next(kernel for kernel in KERNELS if kernel.name == "triton")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_dtype
def test_triton_agrees_with_plain_loops_in_outputs_and_all_gradients(dtype, gated, num_tokens):
    compare(TRITON, Case.of(choices(num_tokens), dtype, gated=gated), DEVICE)


@pytest.mark.parametrize("loads", [(0, 1, 7, 63, 16), (17, 0, 15, 1, 0)], ids=str)
@every_dtype
def test_triton_agrees_with_plain_loops_however_uneven_the_loads_are(dtype, loads):
    compare(TRITON, Case.of(choices_of_loads(*loads), dtype), DEVICE)


@pytest.mark.parametrize("act", ["gelu_tanh", "relu_squared"])
def test_triton_agrees_with_plain_loops_for_other_activations(act):
    compare(TRITON, Case.of(choices(5), torch.float32, gated=act == "gelu_tanh", act=act), DEVICE)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_work_between_products_is_the_same_in_triton_as_in_pytorch(act, gated):
    torch.manual_seed(1)
    up_NF = 3 * torch.randn(6, 40, device=DEVICE)
    gate_NF, grad_NF = 3 * torch.randn_like(up_NF), torch.randn_like(up_NF)
    if act != "silu":  # the corner of relu, where its derivative is 0
        up_NF[0], gate_NF[0] = 0, 0
    weight_N = torch.rand(6, device=DEVICE)
    gate = gate_NF if gated else None
    ours, truth = row_work_in_triton(), IN_PYTORCH
    wanted = truth.hidden(gate, up_NF, activation(act))
    assert_close(ours.hidden(gate, up_NF, activation(act)), wanted, "hidden")
    found = ours.gradients(grad_NF, weight_N, gate, up_NF, activation(act))
    expected = truth.gradients(grad_NF, weight_N, gate, up_NF, activation(act))
    assert (found.gate_NF is None) == (expected.gate_NF is None) == (not gated)
    for name in ("weight_N", "weighed_NF", "up_NF", *(("gate_NF",) if gated else ())):
        assert_close(getattr(found, name), getattr(expected, name), name)


@pytest.mark.parametrize("weighed", [True, False], ids=["weighed", "plain"])
@every_dtype
def test_the_sum_of_each_token_s_rows_reads_its_own_places_alone(dtype, weighed):
    case = Case(inputs(7, torch.float32), choices(7), torch.rand(7 * K) > 0.3)
    plan = case.plan(case.inputs["weight"].to(DEVICE))
    rows_ND = torch.randn(7 * K, 20, device=DEVICE).to(dtype)
    rows_ND[int(plan.offset_E[-1]) :] = float("nan")
    weight_N = plan.weight_N if weighed else None
    expected_TD = torch.zeros(7, 20)
    for place in range(int(plan.offset_E[-1])):
        expected_TD[plan.token_N[place]] += rows_ND[place].float().cpu() * (
            plan.weight_N[place].cpu() if weighed else 1
        )
    for work in (row_work_in_triton(), IN_PYTORCH):
        total_TD = work.total(rows_ND, TokenRows.of(plan, 7), weight_N)
        assert_close(total_TD.cpu(), expected_TD, "total", torch.float32)


@pytest.mark.parametrize("loads", [(0,), (1,), (16, 0, 17, 0, 0, 31, 1), (0, 0, 0), (5,) * 70], ids=str)
def test_tiles_cover_each_expert_s_rows_once_and_no_more(loads):
    from moesaic.kernels.grouped_ffn.triton.launch import Tiles

    num_rows = sum(loads) + 9  # some reach no expert
    tiles = Tiles.of(torch.tensor(loads, device=DEVICE).cumsum(0), num_rows)
    listed = tiles.list_ptr.tolist()
    total, most = listed[-1], tiles.most
    expected, start = [], 0
    for e, load in enumerate(loads):
        expected += [(e, first, start + load) for first in range(start, start + load, tiles.block)]
        start += load
    assert total == len(expected) <= most
    assert [tuple(listed[i * most + tile] for i in range(3)) for tile in range(total)] == expected


@pytest.mark.parametrize(("num_tiles", "num_columns"), [(1, 1), (3, 5), (8, 2), (19, 3)])
def test_the_work_list_has_each_block_of_each_tile_once(num_tiles, num_columns):
    from tests.kernels.places_kernel import write_places

    out = torch.full((num_tiles * num_columns, 2), -1, dtype=torch.int32, device=DEVICE)
    write_places[(num_tiles * num_columns,)](out, num_tiles, num_columns, GROUP=8)
    assert sorted(map(tuple, out.tolist())) == [(t, c) for t in range(num_tiles) for c in range(num_columns)]


def _wide(num_tokens: int) -> tuple[list[torch.Tensor], Case]:
    """Numbers of several whole blocks, experts as transformers keep them: halves of one weight, columns first."""
    case = Case(inputs(num_tokens, torch.float32), choices(num_tokens), torch.ones(num_tokens * K, dtype=torch.bool))
    gate_up = torch.randn(E, 96, 32, device=DEVICE).transpose(1, 2)
    down_EFD = torch.randn(E, 32, 48, device=DEVICE).transpose(1, 2)
    x_TD = torch.randn(32, num_tokens, device=DEVICE).t()
    return [
        one.requires_grad_() for one in (x_TD, *(half.detach() for half in gate_up.chunk(2, dim=-1)), down_EFD)
    ], case


def test_triton_takes_weights_and_tokens_in_any_strides():
    (x_TD, *stacks), case = _wide(9)
    plan = case.plan(case.inputs["weight"].to(DEVICE))
    assert not any(one.is_contiguous() for one in (x_TD, *stacks))
    found = []
    for run in (grouped_ffn_triton, grouped_ffn_reference):
        y_TD = run(x_TD, plan, *stacks, activation("silu"))
        y_TD.backward(torch.ones(1, device=DEVICE).expand(9, 32))
        found.append([y_TD, *(one.grad for one in (x_TD, *stacks))])
        for one in (x_TD, *stacks):
            one.grad = None
    for name, ours, truth in zip(("y", "x", "gate", "up", "down"), *found, strict=True):
        assert_close(ours, truth, name)


def test_triton_gives_the_same_bits_twice():
    case = Case.of(choices(7), torch.float32)
    runs = []
    for _ in range(2):
        leaves = leaves_of(case.inputs, device=DEVICE)
        y_TD = case.run(TRITON.run, leaves)
        y_TD.square().sum().backward()
        runs.append([y_TD, *(leaf.grad for leaf in leaves.values())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_triton_computes_only_the_gradients_that_are_asked_for():
    case = Case.of(choices(3), torch.float32)
    for wanted in ("x_TD", "weight", "up_EDF"):
        leaves = {name: one.to(DEVICE).clone().requires_grad_(name == wanted) for name, one in case.inputs.items()}
        case.run(TRITON.run, leaves).square().sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}
        assert leaves[wanted].grad.abs().sum() > 0


def test_what_padding_holds_reaches_nothing_in_triton():
    case = Case.of(choices(5), torch.float32)
    case.kept_N[4 * K :] = False
    case.inputs["x_TD"][4] = float("nan")
    leaves = leaves_of(case.inputs, device=DEVICE)
    y_TD = case.run(TRITON.run, leaves)
    y_TD.square().sum().backward()
    assert y_TD.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def test_no_index_of_the_triton_kernels_is_narrower_than_the_memory_that_it_reaches():
    """Trap 16. Memory that is never touched costs nothing: rows, and an expert, behind 2^31 numbers."""
    from moesaic.kernels.grouped_ffn.triton import launch
    from moesaic.kernels.grouped_ffn.triton.steps import totals

    width, row = 2**15, 2**16 + 3
    rows_ND = torch.empty(row + 1, width, dtype=torch.bfloat16, device=DEVICE)
    assert rows_ND.numel() > 2**31
    rows_ND[row] = 2
    place_N, bounds = torch.tensor([row], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    assert totals(rows_ND, place_N, bounds, None, rows_ND.new_empty(1, width, dtype=torch.float32)).eq(2).all()

    # One tile, of the last expert: 2^31 numbers stand before its matrix, and before the row that its product is for.
    inner, columns, expert, row = 16, 2**8, 2**19, 2**23 + 5
    experts = torch.empty(expert + 1, inner, columns, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(row + 1, columns, dtype=torch.bfloat16, device=DEVICE)
    assert min(experts[:-1].numel(), out[:-1].numel()) >= 2**31
    experts[-1] = 1
    a = torch.empty(row + 1, inner, dtype=torch.bfloat16, device=DEVICE)
    a[row] = 1
    tile = torch.tensor([expert, row, row + 1, 1], dtype=torch.int32, device=DEVICE)
    tiles = launch.Tiles(list_ptr=tile, most=1, block=16)
    launch.expert_rows.start(
        tiles.grid(columns),
        *(a, experts, a, experts, out, tile, 1, inner, columns, *experts.stride(), *experts.stride()),
        **{"SECOND": False, "PRECISION": "ieee", "EVEN_K": True, "BLOCK_M": 16, "GROUP": 8},
    )
    assert out[row].eq(inner).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_on_triton_is_one_graph():
    layer = MoELayer(TopKRouter(D, E, top_k=K), GatedExperts(E, D, F, kernel="triton")).to(DEVICE)
    x_TD, valid_T = torch.randn(6, D, device=DEVICE), torch.arange(6, device=DEVICE) != 2
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x_TD = x_TD.detach().requires_grad_()
        y_TD, _ = run(x_TD, valid_T)
        y_TD.square().sum().backward()
        found.append([y_TD, x_TD.grad, *(parameter.grad for parameter in layer.parameters())])
        layer.zero_grad()
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_the_operations_give_what_a_compiler_was_told_that_they_give():
    from moesaic.kernels.grouped_ffn.triton import between, operation

    case = Case.of(choices(3), torch.float32)
    leaves = {name: one.detach() for name, one in leaves_of(case.inputs, device=DEVICE).items()}
    plan = case.plan(leaves["weight"])
    rows = TokenRows.of(plan, 3)
    batch = [leaves["x_TD"], plan.weight_N, plan.token_N, plan.offset_E, rows.place_N, rows.bounds]
    batch += [leaves["up_EDF"], leaves["down_EFD"], leaves["gate_EDF"]]
    checks = ("test_schema", "test_faketensor")
    for saved in (True, False):
        torch.library.opcheck(operation.grouped_ffn, (batch, "silu", saved), test_utils=checks)
    _, gate_NF, up_NF = operation.grouped_ffn(batch, "silu", True)
    for needs in ([True] * 5, [False, True, False, False, True]):
        arguments = (leaves["x_TD"], batch, gate_NF, up_NF, "silu", needs)
        torch.library.opcheck(operation.grouped_ffn_backward, arguments, test_utils=checks)
    live_N = torch.ones(3 * K, device=DEVICE)
    torch.library.opcheck(between.hidden_rows, (gate_NF * 0, up_NF * 0, "silu"), test_utils=checks)
    arguments = (up_NF * 0, live_N, gate_NF * 0, up_NF * 0, "silu")
    torch.library.opcheck(between.hidden_gradients, arguments, test_utils=checks)
    torch.library.opcheck(between.sum_by_token, (up_NF, rows.place_N, rows.bounds, live_N), test_utils=checks)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moesaic.kernels.grouped_ffn.triton import launch

POINTERS = {"token_ptr": "*i64", "offset_ptr": "*i64", "tile_ptr": "*i32", "weight_ptr": "*fp32", "part_ptr": "*fp32"}
COMMON = {"PRECISION": "ieee", "EVEN_K": True, "BLOCK_M": 128, "GROUP": 8}
FORMULA = {"NAME": "silu", "GATED": True}
for name, constants, ones in (
    ("hidden_rows", {**COMMON, **FORMULA, "SAVED": True}, ("gate_column", "up_column")),
    ("expert_rows", {**COMMON, "SECOND": True}, ("b_column", "second_column")),
    ("hidden_gradients", {**COMMON, **FORMULA, "PART": launch.PART}, ("down_inner",)),
    ("weight_gradients", {"IN_BY_TOKEN": True, "SECOND": True, "PRECISION": "ieee"}, ("out_column", "second_column")),
):
    tuned = getattr(launch, name)
    config = tuned.configs[0]
    constants = {**constants, **config.kwargs, **dict.fromkeys(ones, 1)}
    signature, attributes = {}, {}
    for i, argument in enumerate(tuned.kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = POINTERS.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        if argument not in ("most", "num_parts"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(tuned.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(name, compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"), len(compiled.asm["cubin"]))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_without_one_at_hand():
    """To machine code, with its tensor cores' instructions and within its 227 KiB of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["hidden_rows", "expert_rows", "hidden_gradients", "weight_gradients"]
    for _, shared, products, size in lines:
        assert 0 < int(shared) <= 227 * 1024
        assert int(products) > 0
        assert int(size) > 0
