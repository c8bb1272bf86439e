"""Experts made of a dense network's neurons, on weights alone."""

import dataclasses

import pytest
import torch

from moesaic.convert.layout.dense import run_dense
from moesaic.convert.weights.parts import copies, emptied, noised, partly_drawn, scaled, silenced, take, take_one
from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError
from moesaic.kernels.activations import gelu, relu, relu_squared, silu

D, F = 6, 12


def network(*, gated=True, biased=False, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    return DenseFFN(
        gate_DF=draw(D, F) if gated else None,
        up_DF=draw(D, F),
        down_FD=draw(F, D),
        gate_F=draw(F) if gated and biased else None,
        up_F=draw(F) if biased else None,
        down_D=draw(D) if biased else None,
    )


def outputs(stack, x_TD, act):
    return [run_dense(stack.expert(e), x_TD, act) for e in range(stack.num_experts)]


def weights(stack):
    return {f.name: getattr(stack, f.name) for f in dataclasses.fields(stack) if getattr(stack, f.name) is not None}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_copies_are_the_network_bit_for_bit(gated, biased):
    ffn = network(gated=gated, biased=biased, dtype=torch.bfloat16)
    x_TD = torch.randn(4, D, dtype=torch.bfloat16)
    assert all(torch.equal(given, run_dense(ffn, x_TD, silu)) for given in outputs(copies(ffn, 3), x_TD, silu))
    for name, stacked in weights(copies(ffn, 3)).items():
        single = getattr(
            ffn, name.replace("_EDF", "_DF").replace("_EFD", "_FD").replace("_EF", "_F").replace("_ED", "_D")
        )
        assert all(torch.equal(one, single) for one in stacked)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("granularity", [2, 3, 4])
def test_the_shards_of_a_virtual_group_add_up_to_the_network(gated, biased, granularity):
    ffn, x_TD = network(gated=gated, biased=biased), torch.randn(7, D, dtype=torch.float64)
    given = outputs(copies(ffn, 2 * granularity, granularity), x_TD, gelu)
    for group in (given[:granularity], given[granularity:]):
        torch.testing.assert_close(sum(group), run_dense(ffn, x_TD, gelu), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(one, other) for one, other in zip(given, given[granularity:], strict=False))


@pytest.mark.parametrize(("count", "granularity"), [(6, 4), (4, 5), (4, 0)])
def test_shards_that_do_not_come_out_even_are_refused(count, granularity):
    with pytest.raises(ConfigError) as error:
        copies(network(), count, granularity)
    assert str(error.value) == (
        f"granularity must divide the dense network's hidden width 12 and num_experts={count}, got {granularity}. Each "
        "expert holds one shard of the network, and all shards are there equally often."
    )


@pytest.mark.parametrize("biased", [False, True])
def test_a_factor_in_the_down_projection_is_exact_for_every_non_linearity(biased):
    x_TD = torch.randn(7, D, dtype=torch.float64)
    for gated in (False, True):
        for act in (silu, gelu, relu, relu_squared):
            stack = copies(network(gated=gated, biased=biased), 2)
            for expert, plain in zip(outputs(scaled(stack, 3.7), x_TD, act), outputs(stack, x_TD, act), strict=True):
                torch.testing.assert_close(expert, 3.7 * plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("gated", "act", "is_exact"),
    [
        (True, relu, True),
        (False, relu, True),
        (False, relu_squared, True),
        (True, silu, False),
        (True, gelu, False),
        (False, gelu, False),
        (True, relu_squared, False),
    ],
)
def test_the_published_factor_is_exact_only_where_the_non_linearity_is_homogeneous(gated, act, is_exact):
    """silu(a z) is not a silu(z): a root on the gate changes the function."""
    torch.manual_seed(0)
    stack, x_TD = copies(network(gated=gated), 1), 0.3 * torch.randn(64, D, dtype=torch.float64)
    made = scaled(stack, 2.0, "published", is_squared=act is relu_squared)
    (given,), (plain,) = outputs(made, x_TD, act), outputs(stack, x_TD, act)
    off = float((given - 2 * plain).norm() / (2 * plain).norm())
    assert off < 1e-12 if is_exact else 0.02 < off < 1.0
    power = 1 / 3 if gated or act is relu_squared else 1 / 2
    torch.testing.assert_close(made.down_EFD, 2**power * stack.down_EFD)


def test_the_published_factor_says_nothing_about_biases():
    with pytest.raises(ConfigError, match="scale_in='published' is for networks without biases, got some"):
        scaled(copies(network(biased=True), 2), 2.0, "published")
    with pytest.raises(ConfigError, match="scale_in must be 'down' or 'published', got 'gate'"):
        scaled(copies(network(), 2), 2.0, "gate")


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.99, 11), (1.0, 12)])
def test_drawing_anew_replaces_that_part_of_the_neurons_in_all_matrices_and_no_other(ratio, count):
    stack = copies(network(dtype=torch.float32), 4)
    made, is_new_EF = partly_drawn(stack, ratio, torch.Generator().manual_seed(0))
    assert is_new_EF.sum(dim=1).tolist() == [count] * 4
    kept_EF = ~is_new_EF
    for name, neurons in (("gate_EDF", (0, 2, 1)), ("up_EDF", (0, 2, 1)), ("down_EFD", (0, 1, 2))):
        new, old = (getattr(one, name).permute(neurons) for one in (made, stack))
        assert torch.equal(new[kept_EF], old[kept_EF])
        assert (new[is_new_EF] != old[is_new_EF]).all()
    if 0 < count < 12:
        assert len({tuple(row) for row in is_new_EF.tolist()}) > 1


def test_what_is_drawn_has_the_mean_and_spread_of_what_it_replaces():
    torch.manual_seed(0)
    up_DF = 3 + 0.5 * torch.randn(200, 400)
    ffn = DenseFFN(gate_DF=None, up_DF=up_DF, down_FD=-1 + 2 * torch.randn(400, 200))
    made, is_new_EF = partly_drawn(copies(ffn, 1), 0.5, torch.Generator().manual_seed(0))
    new_up, new_down = made.up_EDF[0][:, is_new_EF[0]], made.down_EFD[0][is_new_EF[0]]
    assert float(new_up.mean()) == pytest.approx(3, abs=0.01)
    assert float(new_up.std()) == pytest.approx(0.5, rel=0.02)
    assert float(new_down.mean()) == pytest.approx(-1, abs=0.03)
    assert float(new_down.std()) == pytest.approx(2, rel=0.02)


def test_a_seed_gives_one_answer_in_drawing_and_in_noise():
    stack = copies(network(dtype=torch.float32), 3)
    for act in (lambda draw: partly_drawn(stack, 0.5, draw)[0], lambda draw: noised(stack, 0.1, draw)):
        first, again, other = (act(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert all(torch.equal(one, weights(again)[name]) for name, one in weights(first).items())
        assert not torch.equal(first.up_EDF, other.up_EDF)


def test_moments_of_neurons_drawn_anew_are_zero_and_the_others_stay():
    stack = copies(network(dtype=torch.float32), 3)
    _, is_new_EF = partly_drawn(stack, 0.5, torch.Generator().manual_seed(0))
    left = emptied(stack, is_new_EF)
    for name, neurons in (("gate_EDF", (0, 2, 1)), ("up_EDF", (0, 2, 1)), ("down_EFD", (0, 1, 2))):
        new, old = (getattr(one, name).permute(neurons) for one in (left, stack))
        assert not new[is_new_EF].any()
        assert torch.equal(new[~is_new_EF], old[~is_new_EF])


def test_noise_is_a_part_of_the_spread_of_each_matrix():
    torch.manual_seed(0)
    ffn = DenseFFN(gate_DF=torch.randn(200, 300), up_DF=5 * torch.randn(200, 300), down_FD=0.1 * torch.randn(300, 200))
    stack = copies(ffn, 2)
    made = noised(stack, 0.02, torch.Generator().manual_seed(0))
    for name, spread in (("gate_EDF", 1.0), ("up_EDF", 5.0), ("down_EFD", 0.1)):
        off = getattr(made, name) - getattr(stack, name)
        assert float(off.std()) == pytest.approx(0.02 * spread, rel=0.02)
        assert not torch.equal(off[0], off[1])
    assert noised(stack, 0.0, torch.Generator()) is stack


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda stack, draw: partly_drawn(stack, 1.5, draw),
            "drop_ratio must be from 0 to 1, got 1.5. Drop-Upcycling found 0.5 the best.",
        ),
        (
            lambda stack, draw: noised(stack, -0.25, draw),
            "noise must be at least 0, got -0.25. 0.01 is one per cent of the weights' spread.",
        ),
    ],
)
def test_impossible_numbers_are_refused(act, text):
    with pytest.raises(ConfigError) as error:
        act(copies(network(), 2), torch.Generator())
    assert str(error.value) == text


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_slices_of_all_neurons_add_up_to_the_network(gated, biased):
    ffn, x_TD = network(gated=gated, biased=biased), torch.randn(7, D, dtype=torch.float64)
    neuron_EF = torch.randperm(F).view(4, 3)
    given = sum(outputs(take(ffn, neuron_EF, parts=4), x_TD, silu))
    torch.testing.assert_close(given, run_dense(ffn, x_TD, silu), rtol=1e-12, atol=1e-12)


def test_one_smaller_network_and_silence():
    ffn, x_TD = network(biased=True), torch.randn(7, D, dtype=torch.float64)
    some = take_one(ffn, torch.arange(5)), take_one(ffn, torch.arange(5, F))
    given = sum(run_dense(one, x_TD, silu) for one in some) + ffn.down_D
    torch.testing.assert_close(given, run_dense(ffn, x_TD, silu), rtol=1e-12, atol=1e-12)
    assert not any(one.any() for one in outputs(silenced(copies(ffn, 2)), x_TD, silu))
    assert isinstance(silenced(copies(ffn, 2)), ExpertStack)
