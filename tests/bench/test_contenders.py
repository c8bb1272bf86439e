"""Everybody computes the same function on the same weights, and who does not is out before the clock starts."""

from dataclasses import replace

import pytest
import torch

from moesaic.bench import ours as ours_module
from moesaic.bench import peers
from moesaic.bench.contender import Absent, Contender
from moesaic.bench.draw import draw
from moesaic.bench.layer import contenders
from moesaic.bench.ours import DENSE, WITH_ROUTER, dense, ours, with_router
from moesaic.bench.parity import TOLERANCES, checked, compare, truth_of
from moesaic.bench.peers import transformers_block, transformers_blocks, transformers_weights
from moesaic.kernels.grouped_ffn import KERNELS, Kernel, grouped_ffn_reference

from .conftest import CPU, TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_every_contender_agrees_with_the_truth_in_outputs_and_all_gradients(dtype, shared):
    case = TINY.with_shared() if shared else TINY
    one = draw(case, dtype=dtype, device=CPU)
    truth = truth_of(one)
    compared = [rival for rival in contenders(one, training=True) if isinstance(rival, Contender)]
    assert {"moesaic torch", "transformers eager", "transformers grouped_mm", "transformers batched_mm"} <= {
        rival.name for rival in compared
    }
    for rival in compared:
        if rival.gradients is not None:
            verdict = compare(rival, one, truth)
            assert verdict.passed, f"{rival.name}: {verdict}"
            assert all(leaf.grad is None for leaf in rival.leaves)
    names = {name.removeprefix("gradient of ") for name in truth} - {"y_TD"}
    wanted = {"x_TD", "weight_TK", "gate_EDF", "up_EDF", "down_EFD"}
    if shared:
        wanted |= {"shared.gate_DF", "shared.up_DF", "shared.down_FD", "shared.token_gate_D"}
    assert names == wanted


def test_the_layer_with_its_router_computes_the_same_outputs(drawn):
    torch.testing.assert_close(with_router(drawn).forward(), truth_of(drawn)["y_TD"].float(), rtol=1e-4, atol=1e-5)


def test_each_kernel_that_there_is_takes_part_and_one_of_them_is_what_users_get(drawn):
    found = ours(drawn)
    assert [one.name for one in found] == [f"moesaic {kernel.name}" for kernel in KERNELS]
    assert sum(isinstance(one, Contender) and one.is_default for one in found) == 1


def test_all_blocks_of_transformers_share_one_copy_of_the_weights_and_run_what_their_name_says(drawn, monkeypatch):
    blocks = transformers_blocks(drawn, training=True)
    first, *others = [one for one in blocks if isinstance(one, Contender)]
    assert all(one.leaves[2] is first.leaves[2] for one in others)

    called = []
    interface = peers.ALL_EXPERTS_FUNCTIONS
    real = type(interface).get_interface

    def spy(self, name, default):
        called.append(name)
        return real(self, name, default)

    monkeypatch.setattr(type(interface), "get_interface", spy)
    for one in blocks:
        one.forward()
    assert called == ["moesaic", "eager", "grouped_mm", "batched_mm"]


def test_a_block_is_transformers_own_with_a_shared_expert_where_the_case_has_one(drawn, drawn_shared):
    weights = transformers_weights(drawn)
    assert type(transformers_block(drawn, weights, "eager")).__name__ == "OlmoeSparseMoeBlock"
    shared = transformers_block(drawn_shared, transformers_weights(drawn_shared), "eager")
    assert type(shared).__name__ == "Qwen2MoeSparseMoeBlock"


def test_an_implementation_that_copies_weights_for_each_row_is_left_out_where_they_do_not_fit(drawn, monkeypatch):
    monkeypatch.setattr(peers, "free_bytes", lambda _device: 2**17)
    *_, last = transformers_blocks(drawn, training=True)
    assert last == Absent(name="transformers batched_mm", why="copies each row's weights: 0 GiB, of which 0 are free")
    needed = peers.batched_bytes(drawn, training=True)
    assert needed == 2 * 3 * 80 * 16 * 16 * 4
    monkeypatch.setattr(peers, "free_bytes", lambda _device: needed)
    assert isinstance(transformers_blocks(drawn, training=True)[-1], Contender)


def test_the_limit_has_as_many_active_flops(drawn, drawn_shared):
    sizes = [leaf.shape for leaf in dense(drawn).leaves[1:]]
    assert sizes == [(32, 16), (32, 16), (16, 32)]
    assert dense(drawn_shared).leaves[1].shape == (64, 16)
    assert dense(drawn).gradients is None


def _kernels(monkeypatch, *extra):
    monkeypatch.setattr(ours_module, "KERNELS", (*KERNELS, *extra))


def _doubled(x_TD, plan, *weights):
    return 2 * grouped_ffn_reference(x_TD, plan, *weights)


def _forgetful(x_TD, plan, *weights):
    """Right outputs; the router learns nothing."""
    return grouped_ffn_reference(x_TD, replace(plan, weight_N=plan.weight_N.detach()), *weights)


def _broken(*_arguments):
    raise RuntimeError("no such\n tile")


def test_a_kernel_with_wrong_outputs_or_one_wrong_gradient_is_not_timed(drawn, monkeypatch):
    _kernels(
        monkeypatch,
        Kernel(name="doubled", run=_doubled, what=""),
        Kernel(name="forgetful", run=_forgetful, what=""),
        Kernel(name="broken", run=_broken, what=""),
        Kernel(name="elsewhere", run=_broken, what="", cannot=lambda device, _dtype: f"needs more than a {device}"),
    )
    entrants, verdicts = checked(drawn, ours, training=True)
    found = {one.name: one for one in entrants}
    assert isinstance(found["moesaic torch"], Contender)
    assert isinstance(found["moesaic reference"], Contender)
    told = found["moesaic doubled"].why
    assert told.startswith("not timed, since it computes something else: ")
    assert told.endswith(" is off by 1.0e+00 of its largest entry, allowed 2e-05")
    assert found["moesaic forgetful"].why.endswith(": gradient of weight_TK is missing or not finite")
    assert found["moesaic broken"].why == "broke: RuntimeError: no such tile"
    assert found["moesaic elsewhere"].why == "needs more than a cpu"
    assert verdicts["moesaic torch"].worst < 1e-6


def test_a_forward_is_judged_by_its_outputs_alone(drawn, monkeypatch):
    _kernels(monkeypatch, Kernel(name="forgetful", run=_forgetful, what=""))
    found = {one.name: one for one in checked(drawn, ours, training=False)[0]}
    assert isinstance(found["moesaic forgetful"], Contender)


def test_a_result_that_is_not_a_number_does_not_pass(drawn, monkeypatch):
    _kernels(monkeypatch, Kernel(name="nan", run=lambda x, *_rest: x * float("nan"), what=""))
    found = {one.name: one for one in checked(drawn, ours, training=False)[0]}
    assert found["moesaic nan"].why.endswith("y_TD is missing or not finite")


def test_who_stands_in_a_table():
    one = draw(TINY, dtype=torch.float32, device=CPU)
    names = [entrant.name for entrant in contenders(one, training=True)]
    assert names == [
        *(f"moesaic {kernel.name}" for kernel in KERNELS),
        WITH_ROUTER,
        "moesaic in transformers' block",
        "transformers eager",
        "transformers grouped_mm",
        "transformers batched_mm",
        DENSE,
    ]


def test_what_runs_in_tritons_interpreter_is_not_timed(drawn):
    triton = next(one for one in ours(drawn) if one.name == "moesaic triton")
    assert isinstance(triton, Absent)
    assert "nterpreter" in triton.why or "Triton is not installed" in triton.why


def test_tolerances_grow_with_the_precision_lost():
    assert TOLERANCES[torch.float64] < TOLERANCES[torch.float32] < TOLERANCES[torch.bfloat16]
