"""What rounding a router's product does, and what the z-loss does to its logits."""

import pytest
import torch

from moesaic.lab import PrecisionResult, Setup, Variant, every_variant
from moesaic.lab.precision import VARIANTS, changed_choices, page, round_routers, rounded_logits
from moesaic.lab.text import build, material_of
from moesaic.routers import TopKRouter


def test_a_rounded_router_rounds_and_only_in_the_model_that_was_asked_for(tiny):
    model, other = (build("mixtral", tiny, material_of(tiny)) for _ in range(2))
    round_routers(model)
    x_TD = torch.randn(50, tiny.width)
    routers = [next(part for part in one.modules() if isinstance(part, TopKRouter)) for one in (model, other)]
    rough, exact = routers[0].logits(x_TD), routers[1].logits(x_TD)
    assert torch.equal(rough, rough.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())


def test_choices_that_change_are_counted(tiny, monkeypatch):
    model = build("mixtral", tiny, material_of(tiny))
    assert 0 <= changed_choices(model, tiny) < 0.2
    monkeypatch.setattr("moesaic.lab.precision.rounded_logits", lambda router, x_TD: -rounded_logits(router, x_TD))
    assert changed_choices(model, tiny) > 0.9


def test_each_variant_is_trained_in_bfloat16_and_reported_as_it_ends(tiny):
    seen = []
    variants = [VARIANTS[0], Variant(recipe="olmoe", name="rough", rounded=True, num_experts=6, top_k=3)]
    results = every_variant(seeds=[0], setup=tiny, variants=variants, done=seen.append)
    assert seen == results
    assert [(one.recipe, one.variant, one.num_experts) for one in results] == [
        ("st-moe", "z-loss", 4),
        ("olmoe", "rough", 6),
    ]
    for one in results:
        # Two steps at a learning rate of 0.001 move little.
        assert one.squared_logsumexp[1] == pytest.approx(one.squared_logsumexp[0], rel=0.2)
        assert 4 < one.bits_per_byte < 9


def test_the_page_has_the_means_over_seeds():
    results = [
        PrecisionResult(
            recipe="st-moe",
            variant="z-loss",
            seed=seed,
            num_experts=8,
            squared_logsumexp=(4.0 + seed, 1.0),
            largest_logit=(2.0, 3.0 + seed),
            changed_choices=0.01 * seed,
            bits_per_byte=2.0,
        )
        for seed in (0, 1)
    ]
    last = page(results, Setup()).splitlines()[-1]
    assert last == "| `st-moe` | 8 | z-loss | 4.50 to 1.00 | 2.00 to 3.50 | 0.50% | 2.000 |"
