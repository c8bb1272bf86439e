"""Adapters of libraries that need a GPU, tried on stand-ins that do what those document, in plain PyTorch."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moesaic.bench.gpu_peers import gpu_peers, megablocks, scattermoe
from moesaic.bench.parity import compare, truth_of


class _ParallelExperts(nn.Module):
    """ScatterMoE's: ``weight`` is (experts, outputs, inputs)."""

    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))


class _GLUMLP(nn.Module):
    """ScatterMoE's: ``h, gates = experts(x).chunk(2)``, then ``output_experts(activation(gates) * h)``."""

    def __init__(self, input_size, hidden_size, num_experts, top_k, activation):
        super().__init__()
        self.experts = _ParallelExperts(num_experts, input_size, 2 * hidden_size)
        self.output_experts = _ParallelExperts(num_experts, hidden_size, input_size)
        self.activation = activation

    def forward(self, x, expert_p, expert_idxs):
        h, gates = torch.einsum("td,tkfd->tkf", x, self.experts.weight[expert_idxs]).chunk(2, dim=-1)
        h = self.activation(gates) * h
        y = torch.einsum("tkf,tkdf->tkd", h, self.output_experts.weight[expert_idxs])
        return (y * expert_p[..., None]).sum(dim=1)


class _ParallelDroplessMLP(nn.Module):
    """MegaBlocks': w1, v1 and w2 of (experts * hidden, width); ``act(x w1^T) * (x v1^T)``, then ``w2``."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.mlp = nn.Module()

    def forward(self, x, _scores, expert_weights, top_experts):
        shape = (self.args.moe_num_experts, self.args.ffn_hidden_size, self.args.hidden_size)
        w1, v1, w2 = (weight.view(shape)[top_experts] for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        tokens = x.squeeze(0)
        gate, up = (torch.einsum("td,tkfd->tkf", tokens, weight) for weight in (w1, v1))
        y = torch.einsum("tkf,tkfd->tkd", self.args.activation_fn(gate) * up, w2)
        return (y * expert_weights[..., None]).sum(dim=1).unsqueeze(0)


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {
        "scattermoe": {},
        "scattermoe.mlp": {"GLUMLP": _GLUMLP},
        "megablocks": {},
        "megablocks.layers": {},
        "megablocks.layers.arguments": {"Arguments": SimpleNamespace},
        "megablocks.layers.dmoe": {"ParallelDroplessMLP": _ParallelDroplessMLP},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("build", [scattermoe, megablocks])
@pytest.mark.parametrize("which", ["drawn", "drawn_shared"])
def test_an_adapter_puts_every_weight_and_gradient_in_its_place(build, which, request):
    one = request.getfixturevalue(which)
    verdict = compare(build(one), one, truth_of(one))
    assert verdict.passed, verdict


def test_on_a_cpu_nobody_asks_for_them(drawn):
    assert gpu_peers(drawn) == []


def test_where_they_cannot_be_imported_the_table_says_so(drawn, monkeypatch):
    for name in ("scattermoe", "megablocks", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    elsewhere = SimpleNamespace(case=drawn.case, device=SimpleNamespace(type="cuda"), experts=drawn.experts)
    found = gpu_peers(elsewhere, weights=(drawn.experts.up_EDF, drawn.experts.down_EFD))
    assert [one.name for one in found] == ["ScatterMoE", "MegaBlocks", "SonicMoE"]
    assert all(one.why.startswith("cannot be imported: ") for one in found), found
