"""Experts that are the same are found to be, whatever the order of their hidden units; others are near chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.hf import moe_layers, sparsify
from moesaic.probe import likeness
from moesaic.probe.work import matrices
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_forward import sparse
from tests.hf.tiny import OPTIONS, build
from tests.probe.planted import planted_text


@pytest.fixture(scope="module")
def twins():
    """Expert 1 is expert 0 with its hidden units in another order; expert 2 is its negative where it leads out."""
    torch.manual_seed(0)
    model = sparse("llama")
    layer = next(iter(moe_layers(model).values()))
    order = torch.randperm(24)
    with torch.no_grad():
        for name in ("gate_EDF", "up_EDF"):
            weight = getattr(layer.experts, name)
            weight[1], weight[2] = weight[0][:, order], weight[0]
        layer.experts.down_EFD[1] = layer.experts.down_EFD[0][order]
        layer.experts.down_EFD[2] = -layer.experts.down_EFD[0]
    return model


def test_the_same_expert_in_another_order_is_found_once_units_are_aligned(twins):
    first = likeness(twins)[0]
    assert abs(first.weights.value[0][1]) < 0.25
    assert first.aligned.value[0][1] == pytest.approx(1, abs=1e-5)
    assert first.weights.value[0][2] == pytest.approx(1 / 3, abs=1e-5)
    # Random experts gain by alignment as much as these do.
    assert first.aligned.chance > 0.1
    assert first.aligned.chance_low <= first.aligned.value[0][3] + 0.1
    assert abs(first.weights.chance) < 0.1
    assert np.allclose(first.aligned.value, np.transpose(first.aligned.value))


def test_alignment_is_the_best_of_all_orders():
    from itertools import permutations

    from moesaic.probe.alike import _aligned

    torch.manual_seed(1)
    first, second = ([torch.randn(5, 3).double() for _ in range(2)] for _ in range(2))
    best = max(
        np.mean([float((a * b[list(order)]).sum()) for a, b in zip(first, second, strict=True)])
        for order in permutations(range(5))
    )
    assert _aligned(first, second) == pytest.approx(best)


def test_outputs_are_compared_on_the_same_tokens(twins):
    first = likeness(twins, planted_text(), num_tokens=64)[0]
    assert first.num_tokens == 64
    assert first.outputs.value[0][1] == pytest.approx(1, abs=1e-5)
    assert first.outputs.value[0][2] == pytest.approx(-1, abs=1e-5)
    assert first.cka.value[0][1] == pytest.approx(1, abs=1e-5)
    assert first.cka.value[0][2] == pytest.approx(1, abs=1e-5)
    assert first.cka.value[0][3] < 0.9
    assert 0 < first.cka.chance < 1
    assert abs(first.outputs.chance) < 0.5


@torch.no_grad()
def test_cka_is_what_the_paper_defines(twins):
    text, seen = planted_text(), []
    experts = next(iter(moe_layers(twins).values())).experts
    handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    found = likeness(twins, text, num_tokens=64, weights=False)[0]
    handle.remove()
    x = seen[0][text.valid_BP[: len(seen[0]) // text.valid_BP.shape[1]].reshape(-1)]
    x = x[torch.arange(64) * len(x) // 64].double()

    def run(e):
        gate, up, down = (getattr(experts, name)[e].double() for name in ("gate_EDF", "up_EDF", "down_EFD"))
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    for first, second in ((0, 3), (1, 3)):
        a, b = (run(e) - run(e).mean(dim=0) for e in (first, second))
        cka = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
        cosine = torch.cosine_similarity(run(first), run(second)).mean()
        assert found.cka.value[first][second] == pytest.approx(float(cka), abs=1e-5)
        assert found.outputs.value[first][second] == pytest.approx(float(cosine), abs=1e-5)


@written_for_this_transformers
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "llama4", "jetmoe", "deepseek_v3"])
def test_families_of_transformers_show_weights_and_outputs_and_stay_as_they_were(name):
    made = tiny(name)
    kinds = [type(part) for part in made.model.modules()]
    state = {key: value.clone() for key, value in made.model.state_dict().items()}
    for one in likeness(made.model, planted_text(2, 6), num_tokens=8):
        assert one.num_experts >= 2
        assert one.num_tokens == 8
        for pairs in (one.weights, one.aligned, one.outputs, one.cka):
            assert np.allclose(np.diag(pairs.value), 1, atol=1e-4)
            assert np.abs(pairs.value).max() <= 1 + 1e-4
            assert pairs.chance is not None
        assert one.aligned.mean >= one.weights.mean
    assert [type(part) for part in made.model.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in made.model.state_dict().items())


@written_for_this_transformers
def test_matrices_are_the_familys_own():
    import moesaic as mz

    model = mz.adopt(tiny("mixtral").model)
    path, layer = next(iter(moe_layers(model).items()))
    gate_EDF, up_EDF, down_EFD = matrices(layer, path)
    experts = layer.block.experts
    hidden = experts.down_proj.shape[-1]
    assert torch.equal(gate_EDF[1], experts.gate_up_proj[1, :hidden].T)
    assert torch.equal(up_EDF[1], experts.gate_up_proj[1, hidden:].T)
    assert torch.equal(down_EFD[1], experts.down_proj[1].T)


def test_everything_is_told_as_json_and_as_a_table(twins):
    found = likeness(twins, planted_text(), num_tokens=32)
    json.dumps([one.to_dict() for one in found], allow_nan=False)
    rows = found[0].rows()
    assert len(rows) == 4 * 6
    assert rows[0]["value"] == found[0].weights.value[0][1]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="MoE layers"):
        likeness(build("llama"))
    soft = sparsify(build("vit"), "soft-moe", layers="all", **OPTIONS["soft-moe"])
    with pytest.raises(ConfigError, match=r"got SoftMoE at .*weights=False"):
        likeness(soft)
