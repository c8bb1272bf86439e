"""What adoption refuses, and how it is set, looked at and undone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.hf.native.experts import form_of
from moesaic.hf.native.spec_router import SpecRouter
from moesaic.telemetry import writer
from moesaic.telemetry.trace import COLUMNS
from tests.hf.families import tiny, written_for_this_transformers

pytestmark = written_for_this_transformers


def logits(made) -> torch.Tensor:
    with torch.no_grad():
        return made.model(**made.inputs).logits


def test_a_dense_model_is_refused():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ConfigError) as error:
        mz.adopt(LlamaForCausalLM(config))
    assert str(error.value) == (
        "adopt needs a transformers model with MoE layers, got LlamaForCausalLM without one that is known. Make a "
        "dense model sparse with moesaic.sparsify; the families are in docs/families.md."
    )


def test_experts_beside_a_router_that_nobody_described_are_refused_by_name():
    made = tiny("mixtral")

    class HomeMadeRouter(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    made.model.model.layers[1].mlp.gate = HomeMadeRouter(made.model.model.layers[1].mlp.gate.weight)
    with pytest.raises(ConfigError) as error:
        mz.adopt(made.model)
    assert str(error.value) == (
        "adopt needs routers that Moesaic can describe, got experts (MixtralExperts) at model.layers.1.mlp.experts "
        "with none of them beside (HomeMadeRouter). Use a family of the table in docs/families.md."
    )
    assert not hf.is_sparse(made.model)


@pytest.mark.parametrize(
    ("family", "change", "first"),
    [
        # Each is a real difference between two families that look alike.
        ("mixtral", "unnormalized", "the weight of expert"),
        ("deepseek_v3", "bias in the weights", "the weight of expert"),
        ("olmoe", "temperature", "the logit of token 0 and expert 0 is"),
        ("deepseek_v3", "bias left out", "it sends token"),
        ("qwen3_moe", "one choice less", "it chooses 1 experts for a token, the spec 2"),
    ],
)
def test_a_router_that_computes_something_else_is_refused_with_the_first_difference(family, change, first, monkeypatch):
    made = tiny(family)
    gate = made.model.model.layers[-1].mlp.gate
    own = type(gate).forward

    def forward(self, x):
        logits_TE, weight_TK, expert_TK = own(self, x)
        if change == "unnormalized":
            weight_TK = logits_TE.softmax(dim=-1).gather(1, expert_TK)
        elif change == "bias in the weights":
            weight_TK = weight_TK + self.e_score_correction_bias[expert_TK]
        elif change == "temperature":
            logits_TE = logits_TE / 2
        elif change == "bias left out":
            scores_TE = logits_TE.sigmoid()
            expert_TK = scores_TE.topk(2).indices
            weight_TK = scores_TE.gather(1, expert_TK)
        else:
            weight_TK, expert_TK = weight_TK[:, :1], expert_TK[:, :1]
        return logits_TE, weight_TK, expert_TK

    monkeypatch.setattr(type(gate), "forward", forward)
    with pytest.raises(ConfigError) as error:
        mz.adopt(made.model)
    assert f"is not what its description in Moesaic says: {first}" in str(error.value)
    assert str(error.value).endswith(
        "Its code may have changed: use a transformers version that Moesaic is tested with, and report it."
    )
    assert not hf.is_sparse(made.model)


def test_experts_that_compute_something_else_are_refused_and_the_model_is_as_it_was(monkeypatch):
    made = tiny("llama4")
    before = logits(made)
    block = next(type(part) for part in made.model.modules() if type(part).__name__ == "Llama4TextMoe")
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: (own(self, x)[0] * 1.001, own(self, x)[1]))
    with pytest.raises(ConfigError, match="does not compute what Moesaic's kernels for it do: outputs differ by"):
        mz.adopt(made.model)
    monkeypatch.undo()
    assert not hf.is_sparse(made.model)
    assert torch.equal(logits(made), before)


def test_a_gate_is_told_by_value_and_not_by_its_name(monkeypatch):
    made = tiny("mixtral")
    before = logits(made)
    experts = made.model.model.layers[0].mlp.experts
    # A family that clamps where Mixtral does not: the fused kernel would be silently wrong.
    monkeypatch.setattr(
        type(experts), "_apply_gate", lambda self, x: self.act_fn(x.chunk(2, -1)[0]).clamp(max=0.01) * x.chunk(2, -1)[1]
    )
    made.model.set_experts_implementation("grouped_mm")
    clamped = logits(made)
    assert not torch.allclose(clamped, before, atol=1e-4)
    form = form_of(experts, "auto")
    assert form.activation is None
    assert "grouped, by autograd" in form.report(experts)


def test_reports_say_which_kernel_runs_and_why():
    made = tiny("mixtral")
    mz.adopt(made.model)
    reports = hf.kernel_reports(made.model)
    assert list(reports) == [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    assert set(reports.values()) == {
        "torch: PyTorch, one graph node with a hand-written backward; fastest that runs on cpu in torch.float32 "
        "(passed over: native: it is not compiled on this machine: run `moesaic native`)"
    }
    mz.adopt(made.model, kernel="reference")
    assert all("asked for by name" in report for report in hf.kernel_reports(made.model).values())
    mz.adopt(made.model, kernel=None)
    assert made.model.get_experts_implementation()[""] == "grouped_mm"
    with pytest.raises(
        ConfigError, match="kernel must be auto or one of grouped_mm, triton, native, torch, reference, got 'fast'"
    ):
        mz.adopt(made.model, kernel="fast")


@pytest.mark.parametrize("family", ["mixtral", "llama4", "dbrx", "jetmoe", "longcat_flash", "step3p7"])
def test_without_a_kernel_experts_are_left_to_transformers_bit_for_bit(family):
    made = tiny(family)
    before = logits(made)
    mz.adopt(made.model)
    mz.adopt(made.model, kernel=None)
    assert hf.is_sparse(made.model)
    found = logits(made)
    # Llama 4's block is ours, as its router returns no choice; its experts are transformers'.
    assert torch.allclose(found, before, atol=1e-6) if family == "llama4" else torch.equal(found, before)


def test_two_models_of_one_configuration_do_not_meet():
    first, second = tiny("mixtral"), tiny("mixtral", seed=1)
    second.model.config = first.model.config
    expected = logits(second)
    mz.adopt(first.model)
    assert not hf.is_sparse(second.model)
    assert torch.allclose(logits(second), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "dbrx", "jetmoe", "switch_transformers", "gemma4"])
def test_an_adopted_model_can_be_copied_and_pickled(family):
    made = tiny(family)
    mz.adopt(made.model)
    expected = logits(made)
    for other in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
        assert hf.is_sparse(other)
        with torch.no_grad(), mz.record(other) as trace:
            assert torch.equal(other(**made.inputs).logits, expected)
        assert trace.num_rows
        assert hf.release(other) is other
    assert hf.is_sparse(made.model)


def test_the_random_numbers_of_no_device_begin_anew(monkeypatch):
    made, seeds, before = tiny("mixtral"), [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)  # what torch.manual_seed calls, GPU or not
    mz.adopt(made.model, balance={"switch": 0.1})
    assert seeds == []
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert seeds == [3]


def test_what_is_loaded_with_an_adopted_models_class_is_its_own_family(tmp_path):
    made = tiny("mixtral")
    kind = type(made.model)
    mz.adopt(made.model).save_pretrained(tmp_path)
    again = type(made.model).from_pretrained(tmp_path)
    assert type(again) is kind
    assert not hf.is_sparse(again)


def test_balance_twice_over_is_refused():
    made = tiny("mixtral", output_router_logits=True)
    with pytest.raises(ConfigError) as error:
        mz.adopt(made.model, balance={"switch": 0.01})
    assert str(error.value) == (
        "The model adds a balance loss of its own, pooled over layers, since its config has output_router_logits=True; "
        "with balance it would be balanced twice. Set it to False."
    )


@pytest.mark.parametrize(
    ("family", "balance", "why"),
    [
        ("mixtral", {"bias": 1e-3}, "MixtralTopKRouter at model.layers.0.mlp.gate has none"),
        ("mixtral", {"annealing": 1}, "has no place for what AnnealingRule moves"),
        ("mixtral", {"device": 0.1}, "needs routing.extras['device_E']"),
        ("mixtral/all", {"switch": 0.1}, "pushes SpecRouter nowhere"),
        ("vitpose_backbone", {"switch": 0.1}, "whose choices are all fixed"),
        ("mixtral", {"swich": 0.1}, "got swich"),
    ],
)
def test_balance_that_would_do_nothing_is_refused(family, balance, why):
    made = tiny(family)
    with pytest.raises(ConfigError) as error:
        mz.adopt(made.model, balance=balance)
    assert why in str(error.value)
    assert not hf.is_sparse(made.model)


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v3/groups", "kolibri1", "granitemoe", "laguna/softcap", "beam"]
)
def test_a_spec_routes_behind_our_own_contract_as_the_family_does(family):
    made = tiny(family)
    mz.adopt(made.model)
    layer = list(hf.moe_layers(made.model).values())[-1]
    gate = layer.reporter
    router = SpecRouter(gate.weight.shape[1], layer.spec)
    with torch.no_grad():
        router.weight.copy_(gate.weight)
        if layer.spec.selection_bias:
            router.bias_E.copy_(layer.router.bias_E)
        x_TD = torch.randn(63, gate.weight.shape[1])
        logits_TE, weight_TK, expert_TK = type(gate).native_class.forward(gate, x_TD)
        routing = router(x_TD)
    wanted = torch.zeros_like(logits_TE).scatter(1, expert_TK, weight_TK)
    found = torch.zeros_like(wanted).index_put((routing.token_N, routing.expert_N), routing.weight_N)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_recording_to_disk_holds_few_rows_at_a_time_and_all_of_them_in_the_end(tmp_path, monkeypatch):
    made = tiny("qwen3_moe")
    with torch.no_grad(), mz.record(made.model) as expected:
        for _ in range(3):
            with hf.trace_domain("text"):
                made.model(**made.inputs)
    held = []
    monkeypatch.setattr(writer, "_ROWS_HELD", 50)
    own = writer.TraceStream.take
    monkeypatch.setattr(writer.TraceStream, "take", lambda self, rows: (own(self, rows), held.append(self.num_rows)))
    file = tmp_path / "sub" / "trace.parquet"
    with torch.no_grad(), mz.record(made.model, to=file) as trace:
        for _ in range(3):
            with hf.trace_domain("text"):
                made.model(**made.inputs)
        assert not file.exists()
    assert trace.num_rows == 0
    assert len(held) == 9
    assert max(held) < 50
    found = mz.RoutingTrace.load(file)
    assert found.metadata == expected.metadata
    parts = list(mz.RoutingTrace.parts(file, rows=40))
    assert [part.num_rows for part in parts[:-1]] == [40] * (len(parts) - 1)
    for name in COLUMNS:
        assert (getattr(found, name) == getattr(expected, name)).all(), name
        assert (np.concatenate([getattr(part, name) for part in parts]) == getattr(expected, name)).all(), name


def test_a_recording_that_fails_leaves_model_and_file_as_they_were(tmp_path):
    made = tiny("qwen3_moe")
    file = tmp_path / "trace.parquet"
    file.write_bytes(b"older")

    def fail():
        with mz.record(made.model, to=file):
            logits(made)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [file]
    assert not hf.is_sparse(made.model)
