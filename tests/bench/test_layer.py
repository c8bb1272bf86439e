"""``bench layer`` on the smallest of layers."""

from dataclasses import replace

import pytest
import torch

from moesaic.bench import ours as ours_module
from moesaic.bench.contender import Absent
from moesaic.bench.draw import draw
from moesaic.bench.layer import Plan, layer, modes_of, wanted
from moesaic.bench.ours import DENSE, WITH_ROUTER
from moesaic.core.errors import ConfigError
from moesaic.kernels.grouped_ffn import KERNELS, Kernel, grouped_ffn_torch

from .conftest import CPU, TINY


def _plan(**changes):
    given = {"cases": (TINY,), "dtypes": (torch.float32,), "device": CPU} | changes
    return Plan(**given)


def test_a_table_for_each_mode_with_a_row_for_everybody_and_its_parts():
    told, done = [], []
    result = layer(_plan(), say=told.append, done=done.append)
    assert [group.title for group in result.groups] == [
        "tiny, balanced, float32, training step",
        "tiny, balanced, float32, training step, in parts",
        "tiny, balanced, float32, forward",
        "tiny, balanced, float32, forward, in parts",
    ]
    assert done == list(result.groups)
    train = result.groups[0]
    assert {line.name for line in train.lines} >= {"moesaic torch", WITH_ROUTER, "transformers eager", DENSE}
    for line in train.lines:
        assert len(line.samples) == len(line.ratios) == 5 or line.note, line
        assert line.goals == ()
    assert train.line(DENSE).ratios == (1.0,) * 5
    assert (train.facts["E"], train.facts["mode"], train.facts["dtype"]) == (6, "train", "float32")
    assert "tiny: parity of moesaic torch, T=40" in told
    assert any("training step: dense, round 5 of 5" in line for line in told)


def test_the_parts_of_a_step_are_timed_beside_the_whole():
    parts = layer(_plan(cases=(TINY.with_shared(),), modes=("train",))).groups[1]
    assert [line.name for line in parts.lines] == [
        "whole layer",
        "router",
        "dispatch",
        "experts",
        "shared expert",
        "router and dispatch",
    ]
    both = parts.line("router and dispatch")
    for sum_ms, router, dispatch in zip(
        both.samples, parts.line("router").samples, parts.line("dispatch").samples, strict=True
    ):
        assert sum_ms == pytest.approx(router + dispatch)
    assert parts.line("whole layer").ratio == 1


def test_contenders_can_be_picked_and_the_limit_always_takes_part():
    result = layer(_plan(only=("torch",), parts=False, modes=("forward",)))
    assert [[line.name for line in group.lines] for group in result.groups] == [["moesaic torch", DENSE]]
    assert wanted((), ("x",)) == []


def test_a_kernel_that_computes_something_else_stands_in_the_table_without_a_time(monkeypatch):
    liar = Kernel(name="liar", run=lambda x_TD, *_rest: x_TD, what="")
    monkeypatch.setattr(ours_module, "KERNELS", (*KERNELS, liar))
    group = layer(_plan(only=("liar",), parts=False, modes=("forward",))).groups[0]
    line = group.line("moesaic liar")
    assert line.samples == ()
    assert line.note.startswith("not timed, since it computes something else: y_TD is off by ")


def test_who_breaks_in_the_warm_up_is_told_apart_from_who_is_slow(monkeypatch):
    calls = []

    def tired(x_TD, plan, *weights):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return grouped_ffn_torch(x_TD, plan, *weights)

    monkeypatch.setattr(ours_module, "KERNELS", (*KERNELS, Kernel(name="tired", run=tired, what="")))
    group = layer(_plan(only=("tired",), parts=False, modes=("forward",))).groups[0]
    assert group.line("moesaic tired").note == "broke: RuntimeError: out of memory"
    assert group.line(DENSE).samples


def test_a_training_step_starts_without_gradients_and_a_forward_leaves_none(monkeypatch):
    seen = []

    def spying(x_TD, plan, *weights):
        seen.append((torch.is_grad_enabled(), x_TD.grad is None))
        return grouped_ffn_torch(x_TD, plan, *weights)

    monkeypatch.setattr(ours_module, "KERNELS", (Kernel(name="torch", run=spying, what=""),))
    layer(_plan(only=("moesaic torch",), parts=False, modes=("train",)))
    assert set(seen) == {(True, True)}
    seen.clear()
    layer(_plan(only=("moesaic torch",), parts=False, modes=("forward",)))
    # Parity runs first, without gradients too.
    assert set(seen) == {(False, True)}


def test_skew_and_shared_experts_are_named():
    case = replace(TINY, zipf=1.0).with_shared()
    group = layer(_plan(cases=(case,), only=("torch",), parts=False, modes=("forward",))).groups[0]
    assert group.title == "tiny, shared expert, Zipf 1, float32, forward"
    assert group.facts["max_over_mean"] > 1.2


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError) as error:
        modes_of(["train", "dream"])
    assert str(error.value) == "mode must be train or forward, got 'dream'. Pick one of these."


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_its_own_clock_and_names_peers_that_are_not_there():
    case = replace(TINY, num_experts=8, width=128, hidden=128, num_tokens=512)
    group = layer(_plan(cases=(case,), dtypes=(torch.bfloat16,), device=torch.device("cuda"))).groups[0]
    assert group.line(DENSE).samples
    assert all(line.samples or line.note for line in group.lines)
    assert {"ScatterMoE", "MegaBlocks", "SonicMoE"} <= {line.name for line in group.lines}


@pytest.mark.usefixtures("compiled")
def test_the_kernels_in_c_take_part_once_compiled_and_are_what_a_user_gets():
    found = ours_module.ours(draw(TINY, dtype=torch.float32, device=CPU))
    assert [one.name for one in found if not isinstance(one, Absent) and one.is_default] == ["moesaic native"]
