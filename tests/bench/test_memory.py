"""``bench memory``: known functions give known bytes, and contenders what their saved tensors say."""

import mmap
from dataclasses import replace

import pytest
import torch

from moesaic.bench.contender import Contender
from moesaic.bench.draw import draw
from moesaic.bench.layer import contenders
from moesaic.bench.memory import kept, memory
from moesaic.bench.ours import ours
from moesaic.bench.peers import GROUPED, transformers_contender, transformers_weights
from moesaic.core.living import Living

from .conftest import CPU, TINY


def _contender(drawn, forward):
    return Contender(name="x", forward=forward, leaves=(drawn.x_TD,), gradients=None)


def test_what_a_function_keeps_is_counted_once_and_its_input_and_output_not_at_all(drawn):
    one = 40 * 16 * 4
    # The doubled tokens are kept by sin for its cosine; the tokens themselves were there.
    found = kept(_contender(drawn, lambda: (drawn.x_TD + drawn.x_TD).sin()), drawn)
    assert (found.held_bytes, found.saved_bytes, found.largest) == (one, one, ((40, 16),))
    # exp keeps its output, which is the output.
    assert kept(_contender(drawn, lambda: drawn.x_TD.exp()), drawn).held_bytes == 0

    # Twice the same tensor.
    def twice():
        doubled_TD = drawn.x_TD + drawn.x_TD
        return doubled_TD * doubled_TD

    assert kept(_contender(drawn, twice), drawn).held_bytes == one


def test_what_is_kept_behind_the_back_of_autograd_counts_too(drawn):
    class Hoarder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_TD):
            ctx.mine = x_TD * 3
            return x_TD * 2

        @staticmethod
        def backward(ctx, grad_TD):
            return grad_TD * 2

    found = kept(_contender(drawn, lambda: Hoarder.apply(drawn.x_TD)), drawn)
    assert (found.held_bytes, found.saved_bytes) == (40 * 16 * 4, 0)


def test_the_peak_is_the_most_at_any_moment(drawn):
    one = 40 * 16 * 4
    # Forward: 2x, then sin: 2. Backward begins with cos and its product beside both, and ends in a gradient.
    found = kept(_contender(drawn, lambda: (drawn.x_TD + drawn.x_TD).sin()), drawn)
    assert 3 * one <= found.peak_bytes <= 5 * one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_storages_and_saved_tensors_tell_the_same_and_no_kernel_keeps_much_in_secret(dtype):
    drawn = draw(replace(TINY, num_tokens=400, hidden=48), dtype=dtype, device=CPU)
    for rival in contenders(drawn, training=True):
        if not isinstance(rival, Contender):
            continue
        found = kept(rival, drawn)
        assert found.held_bytes >= found.saved_bytes, rival.name
        # Ours keeps where rows are, a few integers for each, outside of autograd's sight.
        secret = 0.2 if rival.name.startswith("moesaic") else 0.0
        assert found.held_bytes <= (1 + secret) * found.saved_bytes, rival.name


def test_memory_that_no_operation_allocates_is_seen_and_what_was_there_is_not():
    there = torch.ones(100)
    living = Living([there])
    with living:
        there.mul_(2)
        assert living.live_bytes == 0
        mapped = torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.float32).view(32, 32)
        made = mapped[0] + 1
        assert living.live_bytes == 4096 + 128
        del mapped
        assert living.live_bytes == 128
        del made
    assert (living.live_bytes, living.peak_bytes) == (0, 4096 + 128)


def test_ours_keeps_less_than_grouped_mm_and_neither_outputs_nor_copies_of_inputs():
    drawn = draw(replace(TINY, width=32), dtype=torch.float32, device=CPU)
    mine = next(one for one in ours(drawn) if isinstance(one, Contender) and one.is_default)
    found = kept(mine, drawn)
    theirs = kept(transformers_contender(GROUPED, drawn, transformers_weights(drawn), "grouped_mm"), drawn)
    assert found.held_bytes < 0.6 * theirs.held_bytes
    # As wide as tokens: the copies of inputs, and the outputs before they are weighed.
    assert (80, 32) in theirs.largest
    assert (80, 32) not in found.largest


def test_tables_for_each_case_beside_grouped_mm():
    result = memory((TINY,), (torch.float32,), CPU, only=("torch",))
    assert [group.title for group in result.groups] == [
        "tiny, balanced, float32, kept for the backward",
        "tiny, balanced, float32, peak of a step",
    ]
    held = result.groups[0]
    assert [line.name for line in held.lines] == ["moesaic torch", GROUPED, "dense"]
    assert held.line(GROUPED).ratio == 1
    assert held.line("moesaic torch").note.startswith("keeps 2 × 80×16")
