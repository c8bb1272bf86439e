"""Every Mixture-of-Experts family of transformers, adopted: same outputs and gradients, true rows, balance, saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.telemetry import RoutingTrace
from tests.hf.families import ALSO, FAMILIES, TRIED, Tiny, choices, tiny, valid, written_for_this_transformers

pytestmark = [written_for_this_transformers, pytest.mark.filterwarnings("ignore::FutureWarning")]

# transformers sends every token of NLLB-MoE to experts 0 and 1, whatever its router chose: rows are what runs.
NOT_AS_CHOSEN = ("nllb_moe",)
# Nothing that is learned chooses here.
GIVEN = ("vitpose_backbone", "vitpose")
# Its generate is a denoising loop that needs more than a prompt.
OWN_GENERATE = ("diffusion_gemma",)


def main_output(output) -> Tensor:
    for name in ("logits", "last_hidden_state", "feature_maps", "heatmaps"):
        value = getattr(output, name, None)
        if value is not None:
            return value[0] if isinstance(value, tuple) else value
    return output[0]


def run(made: Tiny) -> Tensor:
    return main_output(made.model(**made.inputs))


def apart(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the larger of 1 and the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))


@pytest.mark.family_column("adopt, record", "name")
@pytest.mark.parametrize("name", [*FAMILIES, *TRIED, *ALSO])
def test_an_adopted_model_computes_and_keeps_what_it_did_before_and_tells_whom_it_chose(name):
    made = tiny(name)
    expected, outputs = choices(made, also=main_output)
    weights = {key: value.data_ptr() for key, value in made.model.state_dict().items()}
    assert mz.adopt(made.model) is made.model
    with torch.no_grad(), mz.record(made.model) as trace:
        assert apart(run(made), outputs) <= 1e-5
    assert {key: value.data_ptr() for key, value in made.model.state_dict().items()} == weights
    if not name.startswith(NOT_AS_CHOSEN):
        check_rows(made, trace, expected)
    hf.release(made.model)
    with torch.no_grad():
        assert torch.equal(run(made), outputs)
    assert not any(type(part).__module__.startswith("moesaic") for part in made.model.modules())
    assert not hf.is_sparse(made.model)


def check_rows(made: Tiny, trace: RoutingTrace, expected) -> None:
    """A trace holds the experts and weights that the model itself used."""
    names = trace.metadata.layer_names
    # JetMoE's attention routes to heads too.
    assert len([name for name in names if "self_attention" not in name]) == len(expected) == made.num_layers_moe
    for path, (expert_TK, weight_TK) in expected.items():
        layer = next(index for index, name in enumerate(names) if path == name or path.startswith(f"{name}."))
        found = dense(trace.where(trace.layer == layer))
        wanted = torch.zeros(len(expert_TK), trace.metadata.num_experts[layer])
        # An id beyond the experts is none: a skip, whose weight is 0.
        wanted.scatter_add_(1, expert_TK.clamp_max(wanted.shape[1] - 1), weight_TK.float())
        wanted = wanted[valid(made, path, len(expert_TK))]
        if made.family.startswith("vitpose"):
            wanted = wanted.repeat_interleave(len(found) // len(wanted), dim=0)  # one choice for all of an image
        assert found.shape == wanted.shape
        assert apart(found, wanted) <= 1e-6


# Each way in which experts are run: our kernel, in general, by surgery, as modules; and a router that blocks ask twice.
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "switch_transformers", "zaya", "ernie4_5_vl_moe"])
def test_a_recording_adopts_for_its_time_and_leaves_the_experts_to_transformers(name):
    made = tiny(name)
    expected, outputs = choices(made, also=main_output)
    with torch.no_grad(), mz.record(made.model) as trace:
        assert apart(run(made), outputs) <= 1e-5
    assert not hf.is_sparse(made.model)
    check_rows(made, trace, expected)


def dense(rows: RoutingTrace) -> Tensor:
    """Weights by token and expert, tokens in the order of sequence and position; dropped rows count nothing."""
    _, token = np.unique(rows.sequence.astype(np.int64) << 32 | rows.position, return_inverse=True)
    (count,) = {rows.metadata.num_experts[layer] for layer in rows.layer}
    table = torch.zeros(token.max() + 1, count)
    weight = torch.from_numpy(rows.weight * rows.kept)
    return table.index_put((torch.from_numpy(token), torch.from_numpy(rows.expert).long()), weight, accumulate=True)


@pytest.mark.family_column("adopt, balance", "family")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*NOT_AS_CHOSEN, *GIVEN)])
def test_gradients_are_those_of_the_models_own_code_and_a_balance_loss_reaches_the_routers(family):
    made = tiny(family)
    expected = gradients(made)
    mz.adopt(made.model, balance={"switch": 0.01})
    check_gradients(made, expected)
    with hf.balance(made.model) as terms:
        run(made)
    layers = hf.moe_layers(made.model)
    moved = [path for path, layer in layers.items() if layer.spec.is_learned]
    assert moved
    made.model.zero_grad()
    terms.total.backward()
    for path in moved:
        routers = [
            weight
            for name, weight in made.model.get_submodule(path).named_parameters()
            if not name.startswith(("experts.", "text_moe.experts.", "vision_moe.experts.")) and weight.grad is not None
        ]
        assert any(float(weight.grad.abs().max()) > 0 for weight in routers), path


@pytest.mark.family_column("adopt", "family")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family in (*NOT_AS_CHOSEN, *GIVEN)])
def test_gradients_are_those_of_the_models_own_code_where_nothing_can_be_balanced(family):
    made = tiny(family)
    expected = gradients(made)
    mz.adopt(made.model)
    check_gradients(made, expected)


def check_gradients(made: Tiny, expected: dict[str, Tensor]) -> None:
    """In evaluation mode, where balance losses are in no output."""
    found = gradients(made)
    assert set(found) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * max(1.0, largest), name


def gradients(made: Tiny) -> dict[str, Tensor]:
    made.model.zero_grad()
    output = run(made)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weight).sum().backward()
    # An expert without tokens has no gradient in some families' own code and zeros in ours.
    return {
        name: torch.zeros_like(one) if one.grad is None else one.grad.clone()
        for name, one in made.model.named_parameters()
        if one.requires_grad
    }


def test_balance_is_refused_where_experts_are_not_run_as_chosen():
    made = tiny("nllb_moe")
    with pytest.raises(ConfigError, match="experts 0 and 1 only"):
        mz.adopt(made.model, balance={"switch": 0.01})
    assert not hf.is_sparse(made.model)


@pytest.mark.family_column("adopt", "family")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adopted_model_generates_what_it_did_and_saves_as_its_own_family(family, tmp_path):
    made = tiny(family)
    kind = type(made.model)
    with torch.no_grad():
        before, written = run(made), generated(made)
        mz.adopt(made.model)
        assert torch.equal(generated(made), written)
        made.model.save_pretrained(tmp_path)
        again = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert type(again) is kind
        assert apart(main_output(again(**made.inputs)), before) <= 1e-6


def generated(made: Tiny) -> Tensor:
    """What is written on from a prompt; nothing by families that need more than one."""
    if not made.can_generate or made.family in OWN_GENERATE:
        return torch.zeros(0)
    inputs = {name: value for name, value in made.inputs.items() if not name.startswith("decoder_")}
    return made.model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.family_column("record", "name")
@pytest.mark.parametrize("name", NOT_AS_CHOSEN)
def test_rows_of_nllb_moe_are_what_transformers_runs(name):
    made = tiny(name)
    gates = choices(made)
    with torch.no_grad(), mz.record(made.model) as trace:
        run(made)
    rows = trace.where(trace.layer == 0)
    first_TK = next(iter(gates.values()))[1]  # the router's two gates, the larger first
    mask = made.inputs["attention_mask"].reshape(-1).bool()
    found = dense(rows)
    assert set(rows.expert[rows.kept]) == {0, 1}
    # Expert 1 gets the first choice's gate and expert 0 the second's, whichever experts they were.
    assert apart(found[:, :2].sort(dim=-1, descending=True).values, first_TK[mask]) <= 1e-6
