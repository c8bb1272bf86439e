"""Put routers side by side on the same tokens: who agrees with whom, and how even each one is.

A layer is made of values, so a design of your own is a line: here four routers that differ in one option each.
"""

import torch

import moesaic as mz
from moesaic.routers import GroupLimit, TopKRouter, sigmoid, softmax
from moesaic.telemetry import RoutingSummary

WIDTH, NUM_EXPERTS, TOP_K = 64, 16, 4

designs = {
    "softmax, renormalised": {"score": softmax, "normalize": "chosen"},
    "softmax, as it is": {"score": softmax, "normalize": "scores"},
    "sigmoid, times 2.5": {"score": sigmoid, "normalize": "chosen", "scale": 2.5},
    "best 2 of 4 groups": {"score": sigmoid, "groups": GroupLimit(num_groups=4, groups_kept=2)},
}

torch.manual_seed(0)
x_TD = torch.randn(2048, WIDTH)
weight_ED = torch.randn(NUM_EXPERTS, WIDTH) / WIDTH**0.5

first_TK = None
print(f"{'router':22} {'same experts':>12} {'weights add to':>14} {'busiest/mean':>12} {'switch loss':>11}")
for name, options in designs.items():
    router = TopKRouter(WIDTH, NUM_EXPERTS, top_k=TOP_K, **options)
    with torch.no_grad():
        router.weight.copy_(weight_ED)
        layer = mz.MoELayer(router, mz.experts.GatedExperts(NUM_EXPERTS, WIDTH, 32))
        _, routing = layer(x_TD)
    chosen_TK = routing.expert_N.view(-1, TOP_K).sort(dim=1).values
    first_TK = chosen_TK if first_TK is None else first_TK
    same = (chosen_TK == first_TK).all(dim=1).float().mean()
    total = routing.weight_N.view(-1, TOP_K).sum(dim=1).mean()
    imbalance = RoutingSummary.of(routing).load_max_over_mean
    print(f"{name:22} {same:12.0%} {total:14.2f} {imbalance:12.2f} {mz.balance.switch_loss(routing):11.3f}")
