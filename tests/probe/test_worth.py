"""An expert is worth what the loss becomes without it, where it is used and nowhere else."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from moesaic import probe
from moesaic.core.errors import ConfigError
from moesaic.hf import Force, Swap, SwitchOff, intervene, moe_layers
from moesaic.probe import HeldOut
from moesaic.probe.losses import nats_of
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_forward import sparse
from tests.hf.tiny import build
from tests.probe.planted import planted_model, planted_text


@pytest.fixture(scope="module")
def planted():
    return planted_model(), planted_text()


def test_a_planted_expert_shows_on_its_domain_alone(planted):
    model, text = planted
    result = probe.causal(model, text, batch_size=5)
    mine = result.effects[0]
    assert mine.on("first").rows == mine.on("first").num_tokens > 200
    assert mine.on("second").rows == 0
    assert mine.on("second").nats_per_token == 0.0
    assert abs(mine.on("first").nats_per_token) > 0.01
    assert {(effect.expert, change.domain) for effect, change in result.found()} <= {
        (0, "first"),
        (1, "first"),
        (1, "second"),
        (2, "second"),
    }
    assert ("first", 0) in {(change.domain, effect.expert) for effect, change in result.found()}
    assert set(map(id, (change for _, change in result.special()))) <= {
        id(change) for effect in result.effects for change in effect.changes if change.beyond > 0
    }


@pytest.mark.parametrize("how", ["off", "drop"])
def test_an_expert_that_serves_nobody_is_worth_exactly_nothing(planted, how):
    model, text = planted
    effect = probe.causal(model, text, experts=[(0, 3)], how=how, batch_size=5).effects[0]
    for change in effect.changes:
        assert change.rows == 0
        assert (change.nats_per_token, change.low, change.high, change.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_nobody_is_run_again_for_an_expert_that_serves_nobody(planted):
    model, text = planted
    runs = []
    handle = model.register_forward_pre_hook(lambda *_args: runs.append(1))
    probe.causal(model, text, experts=[(0, 3)], batch_size=5)
    handle.remove()
    assert len(runs) == math.ceil(len(text.input_ids_BP) / 5)


def test_forcing_whom_all_have_chosen_and_swapping_twice_change_nothing(planted):
    model, text = planted
    twice = [Swap(layer=0, first=0, second=2)] * 2
    forced, swapped = probe.changes(model, text, [Force(layer=0, expert=1), twice])
    for change in (*forced, *swapped):
        assert change.nats_per_token == 0.0
        assert change.p_value == 1.0


def test_changes_are_what_slow_sums_say(planted):
    model, text = planted
    off = SwitchOff(layer=0, expert=1)
    found = {one.domain: one for one in probe.changes(model, text, [off], batch_size=7)[0]}
    sums: dict[str, list[float]] = {"first": [], "second": []}
    counts: dict[str, list[int]] = {"first": [], "second": []}
    for block in range(len(text.input_ids_BP)):
        ids = text.input_ids_BP[block][text.valid_BP[block]]
        nats = []
        for trial in ((), (off,)):
            with torch.no_grad(), intervene(model, *trial):
                logits = model(input_ids=ids[None]).logits[0].double()
            nats.append(sum(-float(logits[at].log_softmax(-1)[ids[at + 1]]) for at in range(len(ids) - 1)))
        domain = text.domains[text.domain_of_text[int(text.text_BP[block].max())]]
        sums[domain].append(nats[1] - nats[0])
        counts[domain].append(len(ids) - 1)
    for domain, change in found.items():
        delta = np.array(sums.get(domain, sums["first"] + sums["second"]))
        tokens = np.array(counts.get(domain, counts["first"] + counts["second"]))
        assert change.nats_per_token == pytest.approx(delta.sum() / tokens.sum(), abs=1e-6)
        assert change.num_tokens == tokens.sum()
        # The jackknife is another road to the same width.
        left = np.array([np.delete(delta, at).sum() / np.delete(tokens, at).sum() for at in range(len(delta))])
        error = math.sqrt((len(delta) - 1) / len(delta) * ((left - left.mean()) ** 2).sum())
        from scipy import stats

        half = stats.t.ppf(0.975, len(delta) - 1) * error
        assert (change.high - change.low) / 2 == pytest.approx(half, rel=0.02)


def test_chance_is_what_as_many_rows_of_the_others_cost(planted):
    model, text = planted
    result = probe.causal(model, text, batch_size=5)
    for domain in ("first", "second", "all"):
        changes = [effect.on(domain) for effect in result.effects]
        for mine in range(4):
            others = [one for index, one in enumerate(changes) if index != mine]
            rate = sum(one.nats_per_token for one in others) / sum(one.rows for one in others)
            assert changes[mine].chance == pytest.approx(rate * changes[mine].rows, abs=1e-12)
            assert changes[mine].beyond == pytest.approx(changes[mine].nats_per_token - changes[mine].chance)
            assert changes[mine].beyond_low <= changes[mine].beyond <= changes[mine].beyond_high
    alone = probe.causal(model, text, experts=[(0, 1)], batch_size=5).effects[0]
    assert math.isnan(alone.on("first").chance)


def test_experts_that_are_copies_of_each_other_are_worth_no_more_than_chance():
    torch.manual_seed(3)
    model = sparse("llama", num_hidden_layers=1).eval()
    layer = next(iter(moe_layers(model).values()))
    with torch.no_grad():
        # All experts are one: whoever takes a token's place does the same work, and only the weights remain.
        for name in ("gate_EDF", "up_EDF", "down_EFD"):
            weight = getattr(layer.experts, name)
            weight[1:] = weight[:1].clone() * 4
            weight[:1] *= 4
    result = probe.causal(model, planted_text(), batch_size=8)
    for effect in result.effects:
        assert abs(effect.on().nats_per_token) < 1e-6
    swapped = probe.causal(model, planted_text(), how="swap", batch_size=8)
    assert max(abs(effect.on().nats_per_token) for effect in swapped.effects) < 1e-6


def test_a_swap_is_with_the_expert_of_the_nearest_load(planted):
    model, text = planted
    result = probe.causal(model, text, how="swap", batch_size=5)
    load = [effect.on().rows for effect in result.effects]
    for effect in result.effects:
        others = [abs(load[other] - load[effect.expert]) for other in range(4) if other != effect.expert]
        assert abs(load[effect.partner] - load[effect.expert]) == min(others)


def test_everything_is_told_as_json_and_as_a_table(planted):
    model, text = planted
    result = probe.causal(model, text, batch_size=5)
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["num_tests"] == 8
    assert [line["domain"] for line in result.rows()] == ["first", "second", "all"] * 4
    assert told["effects"][0]["changes"][0]["bits_per_byte"] is None  # nobody said how many bytes there are
    assert result.rows()[0]["nats_per_token"] == told["effects"][0]["changes"][0]["nats_per_token"]


def test_bits_per_byte_are_nats_over_the_bytes(planted):
    from dataclasses import replace

    model, text = planted
    text = replace(text, num_bytes_of_text=tuple(3.0 * count for count in text.tokens_of_text))
    result = probe.causal(model, text, experts=[(0, 0)], batch_size=5)
    change = result.effects[0].on("first")
    assert change.bits_per_byte == pytest.approx(change.nats_per_token / 3 / math.log(2))
    assert (change.bits_low, change.bits_high) == pytest.approx(
        (change.low / 3 / math.log(2), change.high / 3 / math.log(2))
    )
    assert result.bits_per_byte["all"] == pytest.approx(result.nats_per_token["all"] / 3 / math.log(2))


@written_for_this_transformers
def test_a_mixture_of_transformers_is_measured_and_left_as_it_was():
    made = tiny("mixtral")
    kinds = [type(part) for part in made.model.modules()]
    made.model.train()
    torch.manual_seed(2)
    text = HeldOut.from_ids({"a": list(torch.randint(3, 90, (5, 12))), "b": list(torch.randint(3, 90, (4, 9)))})
    result = probe.causal(made.model, text, experts=[(1, 2)], batch_size=4)
    assert [type(part) for part in made.model.modules()] == kinds
    assert all(part.training for part in made.model.modules())
    made.model.eval()
    off = SwitchOff(layer=1, expert=2)
    with torch.no_grad():
        before = nats_of(made.model, text)
        with intervene(made.model, off):
            after = nats_of(made.model, text)
    assert result.effects[0].on().nats_per_token == pytest.approx(
        float((after - before).sum() / text.tokens_of_text.sum()), abs=1e-7
    )


def test_what_cannot_be_measured_is_refused():
    model, text = sparse("llama"), planted_text(2, 5)
    with pytest.raises(ConfigError, match="how must be 'off', 'drop', 'swap' or 'force', got 'kill'"):
        probe.causal(model, text, how="kill")
    with pytest.raises(ConfigError) as error:
        probe.causal(model, text, experts=[(0, 9)])
    assert str(error.value) == (
        "experts must name layers in 0..1 and their experts, got layer 0, expert 9. The layers have 4, 4 experts."
    )
    with pytest.raises(ConfigError, match="experts must be 'all' or pairs of layer and expert, got 'some'"):
        probe.causal(model, text, experts="some")
    with pytest.raises(ConfigError, match="MoE layers"):
        probe.causal(build("llama"), text)


@torch.no_grad()
def test_the_planted_model_is_what_it_says(planted):
    model, text = planted
    router = next(iter(moe_layers(model).values())).router
    chosen = []
    handle = router.register_forward_hook(lambda _m, _a, routing: chosen.append(routing.expert_N.view(-1, 2)))
    nats_of(model, text)
    handle.remove()
    first_T = (text.input_ids_BP < 30).reshape(-1)
    valid_T = text.valid_BP.reshape(-1)
    assert {tuple(sorted(pair)) for pair in chosen[0][first_T & valid_T].tolist()} == {(0, 1)}
    assert {tuple(sorted(pair)) for pair in chosen[0][~first_T & valid_T].tolist()} == {(1, 2)}
