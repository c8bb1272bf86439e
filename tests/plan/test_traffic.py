"""Traffic: formulas against small exchanges that are carried out, message by message."""

from __future__ import annotations

import pytest

from moesaic import zoo
from moesaic.plan import devices
from moesaic.plan.layout import Layout
from moesaic.plan.load import reach
from moesaic.plan.memory import Job
from moesaic.plan.popularity import Zipf
from moesaic.plan.traffic import all_gather, all_to_all, layer_traffic, pipe_traffic, step_traffic
from moesaic.zoo import Experts


def exchange(choices_TK, *, num_experts, ep, per_node, dispatch):
    """Send each token from every device in turn, and count the copies that each link carries, for one token."""
    inside = across = 0
    for sender in range(ep):
        for choices in choices_TK.tolist():
            targets = [expert * ep // num_experts for expert in choices]
            if dispatch == "per-choice":
                messages = [(sender, target) for target in targets]
            else:
                messages = []
                for node in sorted({target // per_node for target in targets}):
                    # To the device of the sender's place in that node, which hands it on.
                    door = node * per_node + sender % per_node
                    messages.append((sender, door))
                    messages += [(door, target) for target in sorted(set(targets)) if target // per_node == node]
            for one, other in messages:
                if one // per_node != other // per_node:
                    across += 1
                elif one != other:
                    inside += 1
    return inside / ep / len(choices_TK), across / ep / len(choices_TK)


@pytest.mark.parametrize("dispatch", ["per-choice", "once-per-node"])
@pytest.mark.parametrize(("ep", "per_node"), [(8, 8), (8, 4), (16, 4), (4, 1)])
@pytest.mark.parametrize("groups_kept", [0, 2])
def test_all_to_all_carries_what_a_small_exchange_carries(dispatch, ep, per_node, groups_kept):
    limits = {"groups": 4, "groups_kept": groups_kept} if groups_kept else {}
    experts = Experts(num_experts=32, top_k=4, hidden=8, **limits)
    uniform = Zipf(exponent=0.0)
    choices_TK = uniform.choices_TK(0, experts, 3000, seed=5)
    inside, across = exchange(choices_TK, num_experts=32, ep=ep, per_node=per_node, dispatch=dispatch)
    reached = reach(uniform, 0, experts, ep=ep, per_node=per_node)
    found = all_to_all(reached, ep=ep, per_node=per_node, numbers=10, bytes_each=2, dispatch=dispatch)
    assert found.inside == pytest.approx(20 * inside, rel=0.03, abs=1e-9)
    assert found.across == pytest.approx(20 * across, rel=0.03, abs=1e-9)


def test_once_per_node_sends_less_across_than_once_per_choice():
    experts = Experts(num_experts=256, top_k=8, hidden=8, groups=8, groups_kept=4)
    reached = reach(Zipf(exponent=0.0), 0, experts, ep=64, per_node=8)
    sizes = {"ep": 64, "per_node": 8, "numbers": 1, "bytes_each": 1}
    once = all_to_all(reached, **sizes, dispatch="once-per-node")
    plain = all_to_all(reached, **sizes, dispatch="per-choice")
    # At most 4 nodes, of which the own one costs nothing one time in eight.
    assert once.across <= 4 * 7 / 8 < plain.across == pytest.approx(8 * 7 / 8)


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 4), (8, 4), (8, 1), (1, 1), (6, 3)])
def test_all_gather_carries_what_a_small_exchange_carries(ranks, per_node):
    """Each part goes to one rank of every other node, shared out over its ranks, then around the node."""
    inside = across = 0
    have = [{rank} for rank in range(ranks)]
    nodes = ranks // per_node
    for part in range(ranks):
        home, place = divmod(part, per_node)
        for node in range(nodes):
            if node != home:
                have[node * per_node + place].add(part)
                across += 1
    for node in range(nodes):
        members = range(node * per_node, (node + 1) * per_node)
        for rank in members:
            inside += len(set().union(*(have[it] for it in members)) - have[rank])
    found = all_gather(ranks * 1.0, ranks, per_node)
    assert found.inside == pytest.approx(inside / ranks)
    assert found.across == pytest.approx(across / ranks)


def traffic(layout, job=None, model="mixtral-8x7b", dispatch="once-per-node"):
    shape = zoo.get(model)
    return layer_traffic(
        shape,
        shape.layers[-1],
        0,
        device=devices.get("h100-80g"),
        layout=layout,
        job=job or Job(context=1024),
        popularity=Zipf(exponent=0.0),
        dispatch=dispatch,
    )


def test_one_device_sends_nothing():
    shape, layout, job = zoo.get("mixtral-8x7b"), Layout(), Job()
    one = traffic(layout).total
    once = step_traffic(shape, layout.stages(shape)[0], devices.get("h100-80g"), layout, job)
    pipe = pipe_traffic(shape, devices.get("h100-80g"), layout, job)
    assert [it for sent in (one, once, pipe) for it in (sent.inside, sent.across)] == [0.0] * 6


def test_mixtral_on_one_node_by_hand():
    """8 devices, one expert each: 1,024 tokens of 4,096 bfloat16 numbers go to two devices of eight."""
    found = traffic(Layout(devices=8, ep=8))
    copies = 1024 * 2 * 7 / 8
    # Forward and backward.
    assert found.dispatch.inside == pytest.approx(2 * copies * 4096 * 2)
    assert found.combine.inside == pytest.approx(2 * copies * 4096 * 2)
    assert found.dispatch.across == 0


def test_eight_bits_halve_what_goes_out_but_not_what_comes_back():
    layout = Layout(devices=8, ep=8)
    wide, narrow = traffic(layout), traffic(layout, Job(context=1024, dtype="fp8"))
    # Out in 8 bits, its gradient back in 16.
    assert narrow.dispatch.inside == pytest.approx(0.75 * wide.dispatch.inside)
    assert narrow.combine.inside == pytest.approx(0.75 * wide.combine.inside)


def test_split_weights_are_fetched_twice_and_their_gradients_scattered_once():
    layout = Layout(devices=8, fsdp=8)
    found = traffic(layout, Job(context=1024, grad_dtype="fp32"))
    weights = zoo.get("mixtral-8x7b").layer_params(zoo.get("mixtral-8x7b").layers[-1]).total
    assert found.fetch.inside == pytest.approx(2 * weights * 2 * 7 / 8)
    assert found.gradients.inside == pytest.approx(weights * 4 * 7 / 8)


def test_replicas_sum_their_gradients_once_a_step():
    shape = zoo.get("olmoe-1b-7b")
    layout, job = Layout(devices=4), Job()
    found = step_traffic(shape, layout.stages(shape)[0], devices.get("h100-80g"), layout, job)
    assert found.inside == pytest.approx(2 * shape.num_params * 4 * 3 / 4)
    zero = Layout(devices=4, fsdp=4, shard="optimizer")
    split = step_traffic(shape, zero.stages(shape)[0], devices.get("h100-80g"), zero, job)
    # Gradients are scattered in 4 bytes, weights handed out in 2.
    assert split.inside == pytest.approx(shape.num_params * (4 + 2) * 3 / 4)
