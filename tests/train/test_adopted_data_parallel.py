"""Two processes that train an adopted model together take one step, with one bias, on the load of both."""

import pytest
import safetensors.torch
import torch

from moesaic import hf
from moesaic.telemetry import RoutingSummary
from tests.hf.families import written_for_this_transformers
from tests.hf.tiny import gradients

from .adopted_worker import CASES, adopted, batches
from .ranks_worker import launch

pytestmark = [pytest.mark.slow, written_for_this_transformers]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    launch(out, out, "tests.train.adopted_worker")
    return out


def of_rank(pair, family, rank):
    return safetensors.torch.load_file(pair / f"{family}-{rank}.safetensors")


def alone(family):
    """The same step in one process: losses weighted by predicted tokens, loads added up."""
    model, made = adopted(family)
    parts = batches(family, made)
    is_pair = model.config.is_encoder_decoder
    counts = [int((part["labels"] if is_pair else part["labels"][:, 1:]).ne(-100).sum()) for part in parts]
    seen = {}

    def count(one):
        new = RoutingSummary.of(one.routing)
        seen[one.layer] = seen[one.layer] + new if one.layer in seen else new

    with hf.observe(model, count):
        if family == "deepseek_v3":  # equally many tokens: the loss of both with the load of both is that of one batch
            model(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss.backward()
        else:
            for part, share in zip(parts, counts, strict=True):
                (model(**part).loss * share / sum(counts)).backward()
    for one in hf.controllers(model):
        one.step(seen)
    biases = {f"bias {name}": value for name, value in model.state_dict().items()}
    return {**gradients(model), **biases}


@pytest.mark.parametrize("family", CASES)
def test_both_ranks_take_the_step_of_one_process_with_the_batches_of_both(pair, family):
    first, second, expected = of_rank(pair, family, 0), of_rank(pair, family, 1), alone(family)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in first.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    moved = [name for name in first if name.startswith("bias ")]
    assert len(moved) == (2 if "bias" in CASES[family] else 0)


def test_experts_without_tokens_on_a_rank_keep_no_other_rank_waiting(pair):
    found = of_rank(pair, "switch_transformers", 0)
    experts = [value for name, value in found.items() if ".experts." in name]
    assert len(experts) == 4 * 8 * 2
    assert any(not value.any() for value in experts)


def test_the_bias_of_one_rank_alone_would_be_another(pair):
    """What the comparison above would miss if the two were the same."""
    model, made = adopted("deepseek_v3")
    seen = {}
    with hf.observe(model, lambda one: seen.update({one.layer: RoutingSummary.of(one.routing)})), torch.no_grad():
        model(**batches("deepseek_v3", made)[0])
    for one in hf.controllers(model):
        one.step(seen)
    found = of_rank(pair, "deepseek_v3", 0)
    state = model.state_dict()
    assert not all(
        torch.equal(value, state[name.removeprefix("bias ")]) for name, value in found.items() if "bias " in name
    )
