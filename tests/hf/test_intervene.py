"""Switching experts off, forcing and swapping them does what weights changed by hand do, and leaves nothing behind."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.hf import Force, Swap, SwitchOff, intervene, sparsify
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_adopt_every_family import apart, main_output
from tests.hf.test_forward import sparse
from tests.hf.test_replay import NATIVE, OURS, built, choices
from tests.hf.tiny import OPTIONS, batch, build, gradients, recompute

pytestmark = written_for_this_transformers

TABLE = "deepseek_v4"  # its first layer looks choices up by token id


@torch.no_grad()
def ran(model, inputs, *interventions):
    """The output, and the trace of what was routed how."""
    with intervene(model, *interventions), mz.record(model) as trace:
        output = main_output(model(**inputs))
    return output, trace


def rows_of(trace, layer):
    """Each token's experts and weights in one layer, by sequence and position."""
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    rows = trace.where(trace.layer == layer)
    for sequence, position, expert, weight in zip(rows.sequence, rows.position, rows.expert, rows.weight, strict=True):
        found.setdefault((int(sequence), int(position)), []).append((int(expert), float(weight)))
    return found


def busiest(trace, layer):
    rows = trace.expert[(trace.layer == layer) & (trace.choice == 0)]
    return int(np.bincount(rows).argmax())


def experts_module(model: nn.Module, layer: int) -> nn.Module:
    found = [part for part in model.modules() if isinstance(getattr(part, "down_proj", None), nn.Parameter)]
    ours = [part for part in model.modules() if isinstance(getattr(part, "down_EFD", None), nn.Parameter)]
    return (ours or found)[layer]


def expert_weights(model: nn.Module, layer: int) -> list[nn.Parameter]:
    return list(experts_module(model, layer).parameters())


def down_of(model: nn.Module, layer: int) -> nn.Parameter:
    module = experts_module(model, layer)
    return module.down_EFD if hasattr(module, "down_EFD") else module.down_proj


@pytest.mark.parametrize("name", [one for one in (*NATIVE, *OURS) if one != TABLE])
def test_a_switched_off_expert_gets_nothing_and_who_did_not_want_it_is_left_as_it_was(name):
    model, inputs = built(name)
    layer = 0
    _, before = ran(model, inputs)
    expert = busiest(before, layer)
    output, after = ran(model, inputs, SwitchOff(layer=layer, expert=expert))
    assert output.isfinite().all()
    was, now = rows_of(before, layer), rows_of(after, layer)
    assert was.keys() == now.keys()
    changed = 0
    for token, rows in was.items():
        assert expert not in dict(now[token])
        assert len(dict(now[token])) == len(rows)
        if expert not in dict(rows):
            assert now[token] == rows
        else:
            # The others stay, and one more comes.
            assert {one for one, _ in rows} - {expert} < {one for one, _ in now[token]} or name.endswith("groups")
            changed += 1
    assert changed > 0


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "minimax_m2"])
def test_switching_off_is_what_the_familys_own_code_does_when_a_bias_keeps_the_expert_out(name):
    made = tiny(name)
    expert = busiest(ran(made.model, made.inputs)[1], 0)
    held = copy.deepcopy(made.model)
    found, _ = ran(made.model, made.inputs, SwitchOff(layer=0, expert=expert))
    with torch.no_grad():
        first = next(
            value
            for key, value in held.state_dict(keep_vars=True).items()
            if key.endswith(("router.bias", "e_score_correction_bias"))
        )
        first[expert] = -1e4
        expected = main_output(held(**made.inputs))
        assert apart(main_output(made.model(**made.inputs)), expected) > 1e-4
    assert apart(found, expected) <= 2e-6


def test_a_router_of_ours_takes_the_next_best_and_weighs_it_by_its_rule():
    model, inputs = built("ours/mixtral")
    router = next(iter(hf.moe_layers(model).values())).router
    read: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda _module, args, _output: read.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    _, trace = ran(model, inputs, SwitchOff(layer=0, expert=1))
    logits = (read[0].double() @ router.weight.double().T).tolist()
    valid = [index for index, one in enumerate(inputs["attention_mask"].reshape(-1).tolist()) if one]
    expected = []
    for token in valid:
        left = sorted((-score, expert) for expert, score in enumerate(logits[token]) if expert != 1)[:2]
        total = sum(np.exp(-score) for score, _ in left)
        expected.append([(expert, np.exp(-score) / total) for score, expert in left])
    found = list(rows_of(trace, 0).values())
    assert [[expert for expert, _ in rows] for rows in found] == [[expert for expert, _ in rows] for rows in expected]
    np.testing.assert_allclose(
        [[weight for _, weight in rows] for rows in found],
        [[weight for _, weight in rows] for rows in expected],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "inkling", "zaya", "gemma4", *OURS]
)
def test_dropping_an_experts_rows_is_what_weights_of_zero_do(name):
    model, inputs = built(name)
    expert = busiest(ran(model, inputs)[1], 0)
    found, trace = ran(model, inputs, SwitchOff(layer=0, expert=expert, reroute=False))
    kept = trace.kept[(trace.layer == 0) & (trace.expert == expert)]
    assert len(kept)
    assert not kept.any()
    held = copy.deepcopy(model)
    module = experts_module(held, 0)
    with torch.no_grad():
        down_of(held, 0)[expert] = 0
        for bias in ("down_proj_bias", "down_ED"):
            if isinstance(getattr(module, bias, None), nn.Parameter):
                getattr(module, bias)[expert] = 0
        expected = main_output(held(**inputs))
    assert apart(found, expected) <= 2e-6


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "inkling", *OURS])
def test_swapping_two_experts_is_swapping_their_weights(name):
    model, inputs = built(name)
    plain, trace = ran(model, inputs)
    first = busiest(trace, 0)
    second = (first + 1) % 3
    found, swapped = ran(model, inputs, Swap(layer=0, first=first, second=second))
    held = copy.deepcopy(model)
    with torch.no_grad():
        for weight in expert_weights(held, 0):
            weight[[first, second]] = weight[[second, first]].clone()
        expected = main_output(held(**inputs))
    assert apart(expected, plain) > 1e-5
    assert apart(found, expected) <= 2e-6
    turned = {first: second, second: first}
    was, now = rows_of(trace, 0), rows_of(swapped, 0)
    assert now == {token: [(turned.get(e, e), w) for e, w in rows] for token, rows in was.items()}
    twice, _ = ran(model, inputs, *[Swap(layer=0, first=first, second=second)] * 2)
    assert torch.equal(twice, plain)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "jetmoe", TABLE, *OURS])
def test_forcing_takes_the_place_of_the_last_choice_and_of_no_other(name):
    model, inputs = built(name)
    _, before = ran(model, inputs)
    was = rows_of(before, 0)
    _, after = ran(model, inputs, Force(layer=0, expert=2))
    now = rows_of(after, 0)
    came = 0
    for token, rows in was.items():
        chosen = [expert for expert, _ in rows]
        if 2 in chosen:
            assert now[token] == rows
        else:
            assert [expert for expert, _ in now[token]] == [*chosen[:-1], 2]
            came += 1
    assert came > 0


@pytest.mark.parametrize("name", ["deepseek_v3", "ours/deepseek-v3"])
def test_forcing_an_expert_that_all_have_chosen_changes_nothing(name):
    model, inputs = built(name)
    with torch.no_grad():
        for key, value in model.state_dict(keep_vars=True).items():
            if key.endswith(("e_score_correction_bias", "bias_E")):
                value[1] = 100.0
    plain, _ = ran(model, inputs)
    forced, _ = ran(model, inputs, Force(layer=0, expert=1), Force(layer=1, expert=1))
    assert torch.equal(forced, plain)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "ours/deepseek-v3"])
@pytest.mark.parametrize("reroute", [True, False])
def test_switching_off_an_expert_without_load_changes_nothing_at_all(name, reroute):
    model, inputs = built(name)
    with torch.no_grad():
        for key, value in model.state_dict(keep_vars=True).items():
            if key.endswith(("e_score_correction_bias", "bias_E", "router.bias")):
                value[3] = -100.0
    plain, trace = ran(model, inputs)
    assert not (trace.expert == 3).any()
    off = [SwitchOff(layer=layer, expert=3, reroute=reroute) for layer in range(trace.num_layers)]
    assert torch.equal(ran(model, inputs, *off)[0], plain)


@pytest.mark.parametrize("name", ["mixtral", "ours/mixtral"])
def test_what_is_written_with_a_cache_is_what_whole_sequences_give(name):
    model, inputs = built(name)
    off = SwitchOff(layer=0, expert=busiest(ran(model, inputs)[1], 0))
    with torch.no_grad(), intervene(model, off), mz.record(model) as written:
        answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(answer), 3, dtype=torch.int64)], dim=1)
    _, whole = ran(model, {"input_ids": answer[:, :-1], "attention_mask": mask}, off)
    assert choices(written) == choices(whole)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3/groups", "llama4", "dbrx"])
def test_a_model_of_transformers_is_as_it_was_afterwards(name):
    made = tiny(name)
    with torch.no_grad():
        plain = main_output(made.model(**made.inputs))
    kinds = [type(part) for part in made.model.modules()]
    state = {key: value.clone() for key, value in made.model.state_dict().items()}
    with torch.no_grad(), intervene(made.model, SwitchOff(layer=0, expert=0)):
        main_output(made.model(**made.inputs))
    with pytest.raises(ValueError, match="input_ids"), intervene(made.model, SwitchOff(layer=0, expert=0)):
        made.model(nothing="of the kind")
    assert [type(part) for part in made.model.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in made.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(main_output(made.model(**made.inputs)), plain)


@pytest.mark.parametrize("name", ["mixtral", "ours/mixtral"])
def test_threads_switch_off_their_own_experts_only(name):
    model, inputs = built(name)
    asked = [(), *[(SwitchOff(layer=0, expert=expert),) for expert in range(3)]]
    alone = [ran(model, inputs, *one)[0] for one in asked]
    assert all(not torch.equal(alone[0], other) for other in alone[1:])
    found: list[torch.Tensor | None] = [None] * len(asked)
    start = threading.Barrier(len(asked))

    @torch.no_grad()
    def work(index: int) -> None:
        with intervene(model, *asked[index]):
            start.wait()
            for _ in range(5):
                found[index] = main_output(model(**inputs))
            start.wait()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", *OURS])
def test_recomputed_activations_are_intervened_in_after_the_block_too(name):
    model, inputs = built(name)
    interventions = (SwitchOff(layer=0, expert=0), Swap(layer=1, first=0, second=2))
    found = []
    for recomputes in (False, True):
        if recomputes:
            recompute(model)
        model.train()
        model.zero_grad()
        with intervene(model, *interventions):
            output = main_output(model(**inputs))
        output.square().sum().backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_blocks_within_each_other_add_up_and_end_one_by_one():
    model, inputs = built("ours/mixtral")
    both, _ = ran(model, inputs, SwitchOff(layer=0, expert=(0, 1)))
    outer, _ = ran(model, inputs, SwitchOff(layer=0, expert=0))
    with intervene(model, SwitchOff(layer=0, expert=0)):
        inner, _ = ran(model, inputs, SwitchOff(layer=0, expert=1))
        again, _ = ran(model, inputs)
    assert torch.equal(inner, both)
    assert torch.equal(again, outer)


@pytest.mark.parametrize("recipe", ["switch", "top-p", "relu", "expert-choice", "hash", "gshard", "moe++"])
def test_rows_are_dropped_and_experts_swapped_whatever_wrote_the_table(recipe):
    family = "vit" if recipe == "expert-choice" else "llama"
    model, inputs = sparsify(build(family), recipe, layers="all", **OPTIONS[recipe]).eval(), batch(family)
    del inputs["labels"]
    plain, trace = ran(model, inputs)
    expert = busiest(trace, 0)
    off, dropped = ran(model, inputs, SwitchOff(layer=0, expert=expert, reroute=False))
    assert not torch.equal(off, plain)
    assert not dropped.kept[(dropped.layer == 0) & (dropped.expert == expert)].any()
    assert torch.equal(ran(model, inputs, *[Swap(layer=0, first=0, second=1)] * 2)[0], plain)


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        (
            [SwitchOff(layer=5, expert=0)],
            "layer must be an index in 0..1 or the path of a MoE layer, got 5. The first is 'model.layers.0.mlp'; "
            "moesaic.hf.moe_layers(model) lists them.",
        ),
        ([SwitchOff(layer=0, expert=7)], "expert must be in 0..3 in layer model.layers.0.mlp, got 7."),
        (
            [SwitchOff(layer=0, expert=(0, 1, 2))],
            "Layer model.layers.0.mlp needs top_k=2 experts to choose from, got 1 once 3 of 4 are switched off. "
            "Switch off fewer, or use reroute=False.",
        ),
        (
            [Force(layer=0, expert=0), Force(layer=0, expert=1), Force(layer=0, expert=3)],
            "A token of layer model.layers.0.mlp visits 2 experts, and 3 are forced. Force fewer.",
        ),
        (
            [SwitchOff(layer=0, expert=1), Swap(layer="model.layers.0.mlp", first=1, second=2)],
            "Expert 1 of layer model.layers.0.mlp is switched off and also named by Swap. Ask one thing of an expert.",
        ),
        (
            [SwitchOff(layer=0, expert=1), SwitchOff(layer=0, expert=1, reroute=False)],
            "Expert 1 of layer model.layers.0.mlp is switched off with reroute=True and with reroute=False. "
            "Use one of them.",
        ),
        (
            [Swap(layer=1, first=2, second=2)],
            "Swap needs two different experts in layer model.layers.1.mlp, got 2 twice.",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(interventions, message):
    model = sparse("llama")
    with pytest.raises(ConfigError) as error, intervene(model, *interventions):
        pass
    assert str(error.value) == message


def test_layers_without_a_table_and_routers_that_do_not_choose_say_so():
    soft = sparsify(build("vit"), "soft-moe", layers="all", **OPTIONS["soft-moe"])
    with pytest.raises(ConfigError, match=r"got SoftMoE at .* whose experts are mixed and not chosen"):
        intervene(soft, SwitchOff(layer=0, expert=0, reroute=False)).__enter__()
    hashed = sparsify(build("llama"), "hash", layers="all", **OPTIONS["hash"])
    with pytest.raises(ConfigError, match=r"got HashRouter at .* SwitchOff\(..., reroute=False\)"):
        intervene(hashed, SwitchOff(layer=0, expert=0)).__enter__()
    switch = tiny("switch_transformers")
    with pytest.raises(ConfigError, match=r"got SwitchTransformersSparseMLP at .* whose choices hang on a capacity"):
        intervene(switch.model, SwitchOff(layer=0, expert=0)).__enter__()
    with pytest.raises(ConfigError, match="MoE layers"):
        intervene(build("llama"), SwitchOff(layer=0, expert=0)).__enter__()


def test_a_router_with_noise_is_refused_in_training():
    model, inputs = sparse("llama"), batch("llama")
    next(iter(hf.moe_layers(model).values())).router.jitter = 0.25
    model.train()
    with (
        intervene(model, SwitchOff(layer=0, expert=0)),
        pytest.raises(ConfigError, match=r"jitter=0.25. Call model.eval\(\) first"),
    ):
        model(**inputs)
