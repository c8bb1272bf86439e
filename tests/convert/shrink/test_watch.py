"""What is seen of experts in every family: what its own calls say, and what plain float64 loops make of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import hf
from moesaic.convert.shrink.calibration import calibrate
from moesaic.convert.shrink.merge import merge_experts
from moesaic.convert.shrink.prune import prune_experts
from moesaic.convert.shrink.saliency import ExpertStats
from tests.convert.plain import largest_error, native, plain_stats
from tests.convert.shrink.plain_families import PLAIN, added
from tests.hf.families import FAMILIES, Tiny, choices, tiny, valid, written_for_this_transformers

pytestmark = written_for_this_transformers

Row = tuple[int, int, float]


def rows_of(made: Tiny, path: str, found: tuple[Tensor, Tensor], num_experts: int) -> list[Row]:
    """(token, expert, weight) of what ran: no padding, nothing dropped, nothing that is no expert."""
    expert_TK, weight_TK = found
    mask_T = valid(made, path, len(expert_TK))
    if made.family == "nllb_moe":
        # Expert 1 runs with the gate of the first choice and expert 0 with that of the second.
        expert_TK = torch.tensor([1, 0]).expand_as(expert_TK)
    experts, weights = expert_TK.reshape(len(mask_T), -1).tolist(), weight_TK.reshape(len(mask_T), -1).tolist()
    return [
        (t, e, w)
        for t in mask_T.nonzero().flatten().tolist()
        for e, w in zip(experts[t], weights[t], strict=True)
        if e < num_experts and (w != 0 or made.family not in ("nllb_moe", "switch_transformers"))
    ]


def stats_around(stats: dict[str, ExpertStats], path: str) -> ExpertStats:
    """Those of the layer in which a module stands that knows what was chosen: the experts, or in some the router."""
    if path in stats:
        return stats[path]
    block = path.rpartition(".")[0]
    return stats[block] if block in stats else stats[f"{block}.experts"]


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_weights_are_those_that_each_family_applied(family):
    made = tiny(family)
    stats = calibrate(made.model, [made.inputs])
    applied = choices(made)
    assert len(stats) == len(applied) == made.num_layers_moe
    for path, found in applied.items():
        one = stats_around(stats, path)
        count_E, weight_E = torch.zeros(2, one.num_experts, dtype=torch.float64)
        for _, e, w in rows_of(made, path, found, one.num_experts):
            count_E[e] += per_choice(made)
            weight_E[e] += w * per_choice(made)
        assert torch.equal(one.count_E.double(), count_E)
        assert torch.allclose(one.weight_E, weight_E, rtol=1e-5)
        assert bool((one.contribution_E[weight_E > 0] > 0).all())


def per_choice(made: Tiny) -> int:
    """ViTPose chooses once for all tokens of an image."""
    return 6 if made.family.startswith("vitpose") else 1


@pytest.mark.parametrize("family", PLAIN)
def test_statistics_of_families_that_no_interface_reaches_are_those_of_plain_loops(family):
    made = tiny(family)
    made.model.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in made.inputs.items()}
    made = Tiny(**{**vars(made), "inputs": inputs})
    stats = calibrate(made.model, [inputs], every_expert=family not in ("nllb_moe", "doge"))
    read = read_by_blocks(made)
    for path, found in choices(made).items():
        one, name = (
            stats_around(stats, path),
            next(name for name in read if path == name or path.startswith(f"{name}.")),
        )
        block, tokens = copy.deepcopy(made.model.get_submodule(name)), read[name]
        rows = rows_of(made, path, found, one.num_experts)
        if family.startswith("vitpose"):
            rows = [(6 * t + patch, e, w) for t, e, w in rows for patch in range(6)]
        mask_T = valid(made, path, len(tokens))
        with torch.no_grad():
            plain = plain_stats(
                tokens, rows, lambda e, x_D, block=block: PLAIN[family].expert(block, e, x_D), one.num_experts
            )
            plain["num_tokens"] = int(mask_T.sum())
            contribution = [0.0] * one.num_experts
            for t, e, w in rows:
                contribution[e] += added(family, block, e, tokens[t], w)
            plain["reap"] = [c / max(n, 1) for c, n in zip(contribution, plain["frequency"], strict=True)]
            # Routers that work in float32 whatever the model does round to 1e-7.
            assert largest_error(one, plain) < 3e-7
            if one.every_ED is not None:
                each = [
                    [PLAIN[family].expert(block, e, tokens[t]) for t in mask_T.nonzero()]
                    for e in range(one.num_experts)
                ]
                mean_ED = torch.stack([torch.stack(outputs).mean(dim=0) for outputs in each])
                assert torch.allclose(one.every_ED, mean_ED, rtol=1e-6, atol=1e-9)


def read_by_blocks(made: Tiny) -> dict[str, list[Tensor]]:
    """What the experts of each block read, padding included, in float64."""
    read: dict[str, list[Tensor]] = {}
    handles = []
    for name, block in made.model.named_modules():
        if type(block).__name__ == PLAIN[made.family].block:

            def look(block: Any, args: tuple[Any, ...], name: str = name) -> None:
                flat = args[0].reshape(-1, args[0].shape[-1])
                read[name] = [PLAIN[made.family].reads(block, x_D) for x_D in flat]

            handles.append(block.register_forward_pre_hook(look))
    with torch.no_grad():
        made.model(**made.inputs)
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("family", ["llama4", "switch_transformers"])
def test_families_that_no_interface_reaches_lose_their_least_useful_experts(family):
    made = tiny(family)
    stats = calibrate(made.model, [made.inputs])
    converted = prune_experts(made.model, 6, batches=[made.inputs], probe=made.inputs)
    for (path, one), note in zip(stats.items(), converted.receipt.notes, strict=True):
        order = one.saliency("reap").argsort(stable=True, descending=True)
        kept = set(order[:6].tolist())
        assert note == f"{path}: kept 6 of 8 experts; pruned {', '.join(str(e) for e in range(8) if e not in kept)}"
    merged = merge_experts(made.model, 4, batches=[made.inputs], probe=made.inputs)
    assert type(merged.model) is type(converted.model) is type(made.model)


@pytest.mark.parametrize("kernel", ["auto", None])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers", "dbrx"])
def test_an_adopted_model_is_seen_as_it_routes_and_is_left_as_it_was(family, kernel):
    made = tiny(family)
    before = calibrate(made.model, [made.inputs])
    hf.adopt(made.model, kernel=kernel, balance={"switch": 0.1})
    classes = {name: (type(part), part.__dict__.get("_moesaic")) for name, part in made.model.named_modules()}
    after = calibrate(made.model, [made.inputs])
    for path, one in before.items():
        assert torch.equal(one.count_E, after[path].count_E)
        assert torch.allclose(one.contribution_E, after[path].contribution_E, rtol=1e-4)
    assert {name: (type(part), part.__dict__.get("_moesaic")) for name, part in made.model.named_modules()} == classes
    hf.release(made.model)
    assert not any(type(part).__module__.startswith("moesaic") for part in made.model.modules())


def test_a_model_that_was_not_adopted_is_left_with_its_own_code():
    model = native("mixtral").float()
    model.set_experts_implementation("grouped_mm")
    calibrate(model, [torch.randint(3, 61, (2, 6))])
    assert not any(type(part).__module__.startswith("moesaic") for part in model.modules())
    assert not any("_moesaic" in name for part in model.modules() for name in part.__dict__)
    assert model.config._experts_implementation == "grouped_mm"
