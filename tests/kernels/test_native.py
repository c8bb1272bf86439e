"""What only the kernels in C do: teams of threads, chunks of rows, odd ends, every order of weights, and compiling."""

import ctypes
import mmap
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from moesaic import BackendError, MoELayer, ShapeError
from moesaic.core.files import CACHE
from moesaic.core.living import Living
from moesaic.core.plan import Plan
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation
from moesaic.kernels.grouped_ffn import KERNELS, choose
from moesaic.kernels.grouped_ffn import native as native_kernel
from moesaic.kernels.grouped_ffn.layout import halves
from moesaic.kernels.grouped_ffn.native import grouped_ffn_native, native_cannot, native_misfits
from moesaic.kernels.native import build as native_build
from moesaic.routers import TopKRouter
from tests.kernels import case as cases
from tests.kernels.case import CPU, Case, E, choices, choices_of_loads, compare, leaves_of
from tests.scratch import poisoned_scratch
from tests.tolerances import assert_close

KERNEL = next(kernel for kernel in KERNELS if kernel.name == "native")
LOADS = [(0, 1, 7, 63, 16), (63, 0, 0, 0, 0), (17, 15, 1, 0, 33), (40, 40, 40, 40, 40), (130, 5, 97, 12, 13)]
LOOKED_FOR = native_build.compiled  # before a fixture replaces it
needs_products = pytest.mark.usefixtures("with_products")


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def with_products(compiled, request):
    """A processor that multiplies in the dtype of the test."""
    dtype = request.node.callspec.params.get("dtype", torch.bfloat16)
    if dtype not in compiled.products:
        pytest.skip(f"on this processor products in {dtype} are left to PyTorch")


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-threads")
def shared_out(request, monkeypatch, compiled):
    """Even the smallest layer is shared out over so many threads."""
    monkeypatch.setattr(native_kernel, "SMALL_LAYER", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("loads", LOADS, ids=str)
@every_dtype
@needs_products
@pytest.mark.usefixtures("shared_out")
def test_teams_of_threads_agree_with_plain_loops(dtype, loads, gated):
    compare(KERNEL, Case.of(choices_of_loads(*loads), dtype, gated=gated))


@pytest.mark.parametrize("together", [0, E], ids=["one-by-one", "together"])
@every_dtype
@needs_products
@pytest.mark.usefixtures("shared_out")
def test_who_works_on_what_changes_no_bit(dtype, monkeypatch, together):
    case = Case.of(choices_of_loads(*LOADS[4]), dtype)

    def bits():
        leaves = leaves_of(case.inputs)
        y_TD = case.run(KERNEL.run, leaves)
        y_TD.float().square().sum().backward()
        return [y_TD.detach(), *(leaf.grad for leaf in leaves.values())]

    first = bits()
    monkeypatch.setattr(
        native_kernel,
        "share_out",
        lambda sizes, _n: (list(range(len(sizes)))[:together], list(range(len(sizes)))[together:]),
    )
    for _ in range(3):
        assert all(torch.equal(one, again) for one, again in zip(first, bits(), strict=True))


@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (7, 5), (33, 17), (50, 63), (64, 96)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_dtype
@needs_products
def test_sizes_that_fill_no_panel_agree_with_plain_loops(dtype, monkeypatch, width, hidden, gated):
    monkeypatch.setattr(cases, "D", width)
    monkeypatch.setattr(cases, "F", hidden)
    compare(KERNEL, Case.of(choices_of_loads(*LOADS[2]), dtype, gated=gated))


@pytest.mark.parametrize("turned", [False, True], ids=["inputs-outputs", "outputs-inputs"])
@pytest.mark.parametrize(
    ("width", "hidden", "loads"),
    [(300, 523, (0, 1, 0)), (517, 290, (0, 3, 1)), (512, 1024, (2, 0)), (512, 1024, (4,) * 12)],
    ids=str,
)
@every_dtype
@pytest.mark.usefixtures("shared_out")
def test_a_few_wide_rows_agree_whatever_lines_and_parts_they_end_in(dtype, width, hidden, loads, turned):
    """Large matrices are shared out in parts, fewer where rows are more; a line of a cache holds 16 or 32 numbers."""
    torch.manual_seed(0)
    num_rows, num_experts = sum(loads), len(loads)
    x_TD = torch.randn(num_rows, width).to(dtype)
    expert_N = torch.arange(num_experts).repeat_interleave(torch.tensor(loads))
    every_N = torch.ones(num_rows, dtype=torch.bool)
    plan = Plan.from_rows(expert_N, torch.arange(num_rows), torch.rand(num_rows), num_experts, every_N)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    stacks = [torch.randn(num_experts, *shape).div_(16).to(dtype) for shape in shapes]
    given = [_turned(stack) if turned else stack for stack in stacks]
    with torch.no_grad():
        y_TD = grouped_ffn_native(x_TD, plan, *given, activation("silu"))
    truth_TD = torch.empty(num_rows, width, dtype=torch.float64)
    for expert in expert_N.unique().tolist():
        gate_DF, up_DF, down_FD = (stack[expert].double() for stack in stacks)
        rows_MD = x_TD[expert_N == expert].double()
        truth_TD[expert_N == expert] = (torch.nn.functional.silu(rows_MD @ gate_DF) * (rows_MD @ up_DF)) @ down_FD
    assert_close(y_TD, truth_TD * plan.weight_N[:, None], "outputs")


@pytest.mark.parametrize("turned", [False, True], ids=["inputs-outputs", "outputs-inputs"])
@every_dtype
@pytest.mark.usefixtures("compiled")
def test_a_few_rows_give_the_same_bits_on_any_number_of_threads(dtype, turned):
    x_TD = torch.randn(3, 512).to(dtype)
    plan = Plan.from_rows(torch.tensor([1, 0, 1]), torch.arange(3), torch.rand(3), 2, torch.ones(3, dtype=torch.bool))
    stacks = [torch.randn(2, *shape).to(dtype) for shape in ((512, 1024), (512, 1024), (1024, 512))]
    given = [_turned(stack) if turned else stack for stack in stacks]
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            with torch.no_grad():
                found.append(grouped_ffn_native(x_TD, plan, *given, activation("silu")))
    finally:
        torch.set_num_threads(before)
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], one) for one in found[1:])


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_dtype
@needs_products
def test_products_know_every_activation_and_its_derivative(dtype, gated, act):
    compare(KERNEL, Case.of(choices(29), dtype, gated=gated, act=act))


@every_dtype
@needs_products
def test_gradients_of_more_rows_than_a_chunk_are_added_up_in_float32(dtype):
    """4,096 rows at a time: whatever was summed before would drown a sum in bfloat16."""
    compare(KERNEL, Case.of(choices_of_loads(9000, 5, 0, 0, 4100), dtype))


def _turned(stack):
    """The same numbers, column by column."""
    return stack.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("turned", [("down_EFD",), ("gate_EDF", "up_EDF"), ("gate_EDF", "up_EDF", "down_EFD")], ids=str)
@every_dtype
@needs_products
def test_weights_may_lie_in_either_order_and_gradients_lie_as_they_do(dtype, turned):
    case = Case.of(choices(63), dtype)
    straight, leaves = leaves_of(case.inputs), leaves_of(case.inputs)
    for name in turned:
        leaves[name] = _turned(leaves[name].detach()).requires_grad_()
    for one in (straight, leaves):
        case.run(KERNEL.run, one).float().square().sum().backward()
    for name, leaf in leaves.items():
        # A matrix written the other way round is summed in the same order.
        assert torch.equal(leaf.grad, straight[name].grad), name
        assert leaf.grad.stride() == leaf.stride()


@pytest.mark.parametrize("turned", [False, True])
@every_dtype
@needs_products
def test_gate_and_up_may_be_halves_of_one_tensor(dtype, turned):
    case = Case.of(choices(63), dtype)
    apart = leaves_of(case.inputs)
    case.run(KERNEL.run, apart).float().square().sum().backward()
    both = torch.cat([case.inputs["gate_EDF"], case.inputs["up_EDF"]], dim=-1)
    both = (_turned(both) if turned else both).requires_grad_()
    leaves = leaves_of(case.inputs)
    leaves["gate_EDF"], leaves["up_EDF"] = halves(both)
    case.run(KERNEL.run, leaves).float().square().sum().backward()
    assert torch.equal(both.grad, torch.cat([apart["gate_EDF"].grad, apart["up_EDF"].grad], dim=-1))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("order", ["straight", "turned"])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 9])
@every_dtype
@pytest.mark.usefixtures("shared_out")
def test_few_rows_agree_with_plain_loops(dtype, num_tokens, order, gated):
    case = Case.of(choices(num_tokens), dtype, gated=gated, act="gelu_tanh")
    leaves = leaves_of(case.inputs)
    if order == "turned":
        leaves = {name: _turned(value) if value.ndim == 3 else value for name, value in leaves.items()}
    with torch.no_grad(), poisoned_scratch():
        y_TD = case.run(grouped_ffn_native, leaves)
    assert y_TD.dtype == dtype
    assert_close(y_TD, case.expected(leaves_of(case.inputs, torch.float64)), "y_TD")


@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (7, 5), (600, 300), (129, 515), (256, 250)])
@every_dtype
@pytest.mark.usefixtures("shared_out")
def test_few_rows_of_any_size_agree_with_plain_loops(monkeypatch, dtype, width, hidden):
    """The larger ones are split by columns, since two experts are not work enough for three threads."""
    monkeypatch.setattr(cases, "D", width)
    monkeypatch.setattr(cases, "F", hidden)
    case = Case.of(choices_of_loads(2, 3, 0, 0, 0), dtype)
    with torch.no_grad():
        y_TD = case.run(grouped_ffn_native, leaves_of(case.inputs))
    assert_close(y_TD, case.expected(leaves_of(case.inputs, torch.float64)), "y_TD")


def test_generation_takes_few_rows_and_training_does_not(compiled, monkeypatch):
    seen = []

    def spy(job):
        seen.append(compiled.few_rows(job))
        return seen[-1]

    spied = {field.name: getattr(compiled, field.name) for field in fields(compiled)} | {"few_rows": spy}
    monkeypatch.setattr(native_build, "compiled", lambda: native_build.Compiled(**spied))
    few, many = (Case.of(choices_of_loads(*loads), torch.float32) for loads in ((4, 3, 0, 0, 0), (30, 30, 30, 30, 30)))
    few.run(KERNEL.run, leaves_of(few.inputs))
    assert seen == []
    with torch.no_grad():
        few.run(KERNEL.run, leaves_of(few.inputs))
        assert seen == [0]
        many.run(KERNEL.run, leaves_of(many.inputs))
        assert seen == [0, 1]


@pytest.mark.usefixtures("compiled")
def test_tokens_and_gradients_need_not_lie_row_by_row():
    for dtype in (torch.float32, torch.bfloat16):
        case = Case.of(choices(9), dtype)
        leaves, turned = leaves_of(case.inputs), leaves_of(case.inputs)
        turned["x_TD"] = leaves["x_TD"].detach().t().contiguous().t().requires_grad_()
        grad_TD = torch.randn(case.inputs["x_TD"].shape).to(dtype)
        case.run(KERNEL.run, leaves).backward(grad_TD)
        case.run(KERNEL.run, turned).backward(grad_TD.t().contiguous().t())
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, turned[name].grad), name


@every_dtype
@needs_products
def test_elements_beyond_two_to_the_31_are_reached(dtype):
    """The second expert's weights lie 2^31 numbers behind the first one's, in memory that is only promised."""
    width, hidden, apart = 4, 3, 2**31
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python has no name for
    promised = mmap.mmap(-1, dtype.itemsize * (apart + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    far = torch.frombuffer(promised, dtype=dtype)
    stacks = []
    for place, (rows, columns) in enumerate([(width, hidden), (width, hidden), (hidden, width)]):
        stack = far.as_strided((2, rows, columns), (apart, columns, 1), place * 16)
        stack.copy_(torch.randn(stack.shape))
        stacks.append(stack)
    near = [stack.clone() for stack in stacks]
    case = Case.of(choices_of_loads(0, 9, 0, 0, 0), dtype)
    x_TD = torch.randn(9, width).to(dtype)
    plan = case.plan(case.inputs["weight"]).only(0, 2)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            far_TD, near_TD = (
                grouped_ffn_native(x_TD.clone().requires_grad_(grad), plan, *one, activation("silu"))
                for one in (stacks, near)
            )
        assert torch.equal(far_TD, near_TD)
        assert far_TD.abs().sum() > 0


@pytest.mark.usefixtures("compiled")
def test_auto_takes_them_once_they_are_compiled():
    for dtype in (torch.float32, torch.bfloat16):
        assert choose("auto", CPU, dtype).kernel is KERNEL
    assert choose("auto", CPU, torch.float64).kernel.name == "torch"
    layer = MoELayer(TopKRouter(8, 4, top_k=2), GatedExperts(4, 8, 6)).bfloat16()
    assert layer.kernel_report().startswith("native: C, ")
    y_TD, _ = layer(torch.randn(3, 8).bfloat16())
    assert y_TD.isfinite().all()


@pytest.mark.usefixtures("compiled")
def test_who_counts_operations_counts_those_of_pytorch():
    from torch.utils.flop_counter import FlopCounterMode

    case = Case.of(choices(63), torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.run(KERNEL.run, leaves_of(case.inputs))
    # Filler rows count; the three products of as many rows as there are come to at least this.
    assert counter.get_total_flops() >= 6 * int(case.kept_N.sum()) * cases.D * cases.F


def test_who_asks_what_is_alive_sees_our_memory(compiled, monkeypatch):
    case = Case.of(choices(63), torch.float32)
    if torch.float32 not in compiled.products:
        pytest.skip("on this processor products in float32 are left to PyTorch")
    monkeypatch.setattr(native_kernel, "grouped_ffn_torch", None)  # not called
    leaves = leaves_of(case.inputs)
    plan = case.plan(leaves["weight"])
    living = Living([*leaves.values(), plan.token_N, plan.weight_N, plan.offset_E, plan.load_E, plan.row_N])
    with living:
        stacks = (leaves["gate_EDF"], leaves["up_EDF"], leaves["down_EFD"])
        y_TD = grouped_ffn_native(leaves["x_TD"], plan, *stacks, activation("silu"))
    # Both pre-activations of every place, and the output.
    kept_bytes = 2 * len(plan.token_N) * cases.F * 4
    assert living.live_bytes == kept_bytes + y_TD.untyped_storage().nbytes()
    # Beside these, rows of outputs and what weights are packed into.
    assert living.peak_bytes >= living.live_bytes + int(case.kept_N.sum()) * cases.D * 4


def test_what_cannot_run_says_why(compiled, monkeypatch):
    assert native_cannot(torch.device("cuda"), torch.float32) == "it is C for CPUs"
    assert native_cannot(CPU, torch.float64) == "it takes float32 and bfloat16"
    stack = torch.empty(4, 6, 8)
    assert native_misfits(stack, stack, stack) is None
    every_second = torch.empty(4, 6, 16)[:, :, ::2]
    assert native_misfits(None, every_second, stack) == (
        "native needs each expert's matrix row by row or column by column, and up has strides (96, 16, 2)"
    )
    assert native_misfits(_turned(stack), stack, stack) == "native needs gate and up in the same order in memory"
    case = Case.of(choices(3), torch.float32)
    monkeypatch.setattr(native_build, "compiled", lambda: None)
    with pytest.raises(BackendError) as error:
        case.run(KERNEL.run, leaves_of(case.inputs))
    assert str(error.value) == (
        "the kernels in C must be able to run here, but it is not compiled on this machine: run `moesaic native`. "
        "Use kernel='auto'."
    )


def test_what_c_would_misread_is_refused(compiled):
    """PyTorch's operations look for themselves; C reads what it is told to."""
    case = Case.of(choices(3), torch.float32)
    leaves = leaves_of(case.inputs)
    plan = case.plan(leaves["weight"])
    x_TD, gate, up, down = (leaves[name] for name in ("x_TD", "gate_EDF", "up_EDF", "down_EFD"))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            with pytest.raises(ShapeError) as error:
                grouped_ffn_native(x_TD, plan, gate, up, down.bfloat16(), activation("silu"))
            assert str(error.value) == (
                "tokens and weights must be of one dtype and device, got torch.float32 on cpu and "
                "torch.float32 on cpu, torch.float32 on cpu, torch.bfloat16 on cpu. Convert the tokens, or the experts."
            )
            with pytest.raises(ShapeError) as error:
                grouped_ffn_native(x_TD, plan, gate[:, :, :20], up, down, activation("silu"))
            assert str(error.value) == (
                "gate and up must be (experts, width, hidden) and down (experts, hidden, width), got (5, 8, 20), "
                "(5, 8, 24), (5, 24, 8). Give the three weights of the same experts."
            )
            with pytest.raises(ShapeError) as error:
                grouped_ffn_native(x_TD[:, :7], plan.only(0, 4), gate, up, down, activation("silu"))
            assert str(error.value) == (
                "tokens must be 8 wide and the plan for 5 experts, got 7 and 4. Build router and experts of the "
                "tokens' width, with the same num_experts."
            )


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, compiled):
    """A cache of our own, and looking there."""
    monkeypatch.setenv(CACHE, str(tmp_path / "kept"))
    monkeypatch.setattr(native_build, "compiled", LOOKED_FOR)
    LOOKED_FOR.cache_clear()
    yield tmp_path / "kept"
    LOOKED_FOR.cache_clear()


def test_what_is_compiled_is_found_by_processes_to_come(elsewhere, compiled):
    assert native_build.compiled() is None
    path = native_build.compiled_path()
    assert path.parent == elsewhere
    built = native_build.build()
    assert built.path == path
    assert native_build.compiled().path == path
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    found = subprocess.run(
        [sys.executable, "-c", "from moesaic.kernels.native.build import compiled; print(compiled().path)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(path)


def test_a_library_that_is_damaged_is_named_and_replaced(elsewhere, compiled):
    path = native_build.compiled_path()
    path.parent.mkdir()
    path.write_bytes(b"half a libr")
    with pytest.raises(BackendError) as error:
        native_build.compiled()
    said = str(error.value)
    assert said.startswith(f"{path} must be a library that `moesaic native` has made, and cannot be opened: ")
    assert said.endswith(". Run `moesaic native` to make it anew, or with --remove to do without.")
    assert native_build.build().products == native_build.compiled().products == compiled.products


def test_without_a_compiler_it_says_what_to_do_and_writes_nothing(elsewhere, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(BackendError) as error:
        native_build.build()
    assert str(error.value) == (
        "a C compiler (cc, gcc, clang) must be there to build the native kernels, and none was found. Install gcc or "
        "clang, or go on without: kernel='auto' takes another kernel."
    )
    assert not elsewhere.exists()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(elsewhere, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho the disk is full >&2\nexit 7\n")
    broken.chmod(0o755)
    with pytest.raises(BackendError) as error:
        native_build.build(str(broken))
    assert str(error.value) == (
        f"{broken} must compile the native kernels, but stopped with 7. Try another compiler. It said: the disk is full"
    )
    assert not list(elsewhere.iterdir())


def test_python_and_c_agree_on_what_a_job_is(compiled):
    dll = ctypes.CDLL(str(compiled.path))
    dll.moesaic_job_bytes.restype = ctypes.c_int64
    assert dll.moesaic_job_bytes() == ctypes.sizeof(native_build.Job)
