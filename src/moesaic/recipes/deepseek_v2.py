"""DeepSeek-V2, 2024: tokens visit few devices, which have losses and a capacity of their own."""

from __future__ import annotations

from moesaic.balance import LossTerm, communication_loss, device_loss, sequence_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.dispatch import DeviceCapacity
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import GroupLimit, TopKRouter


def deepseek_v2_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 160,
    top_k: int = 6,
    num_shared: int = 2,
    num_devices: int | None = None,
    devices_per_token: int | None = None,
    scale: float = 16.0,
    capacity_factor: float = 1.0,
    never_dropped: float = 0.1,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Select within the best devices, weigh by raw softmax scores, drop what overfills a device in training.

    Args:
        width: D.
        hidden: F, of each routed and each shared expert.
        num_experts: routed experts.
        top_k: routed experts per token.
        num_shared: experts that every token visits.
        num_devices: equal, neighbouring groups of experts. None for 8 as published, or the next smaller number that
            divides the experts.
        devices_per_token: of them, those that a token may visit; the ones with the best experts for it. None for 3 as
            published, or as many as top_k experts need.
        scale: every weight is multiplied by this.
        capacity_factor: room of a device over balanced rows in training.
        never_dropped: share of sequences that lose no row.
        activation: of the experts' gates.
        init_std: 0.006 unless given.
        kernel: of the routed experts.
    """
    if num_shared < 0:
        raise ConfigError(f"num_shared must be at least 0, got {num_shared}. DeepSeek-V2 has 2.")
    if num_devices is None:
        num_devices = max(count for count in range(1, 9) if num_experts % count == 0)
    if devices_per_token is None:
        most = max(1, num_experts // max(1, num_devices))
        devices_per_token = min(num_devices, max(3, -(-top_k // most)))
    groups = GroupLimit(num_groups=num_devices, groups_kept=devices_per_token, best_per_group=1)
    init = drawn(init_std, normal(0.006))
    act = activation_named(activation)
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", scale=scale, groups=groups, init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    shared = SharedExpert(width, num_shared * hidden, activation=act, init=init) if num_shared else None
    dispatch = DeviceCapacity(capacity_factor, never_dropped=never_dropped)
    return MoELayer(router, experts, dispatch=dispatch, shared=shared)


DEEPSEEK_V2 = Recipe(
    name="deepseek-v2",
    year=2024,
    summary="each token visits few devices; losses and a capacity for experts, devices and communication",
    citation="DeepSeek-AI. DeepSeek-V2: A Strong, Economical, and Efficient MoE Language Model. 2024. arXiv:2405.04434",
    router="the six best experts of a softmax on the three devices with the best experts, weights raw times 16",
    formula="""\
s = softmax(W x);  a device scores its best s;  the M best devices stay;  S = the K largest of s on them
y = scale * sum_{e in S} s_e SwiGLU_e(x) + shared(x)
in training each device works on at most ceil(capacity_factor * T * K / D) rows, the largest s first
loss = 0.003 * E * sum_e f_e P_e + 0.05 * sum_i f'_i P'_i + 0.02 * sum_i f''_i P''_i within each sequence,
  over devices i: f' the mean of E * f_e, f'' tokens received * D / (M T), P' and P'' sums of P_e""",
    sources={
        "num_experts": "section 3.1.2",
        "top_k": "section 3.1.2",
        "num_shared": "section 3.1.2",
        "num_devices": "section 3.1.2, D = 8",
        "devices_per_token": "section 3.1.2, M = 3",
        "scale": "released configuration, routed_scaling_factor",
        "capacity_factor": "section 2.2.4",
        "never_dropped": "section 2.2.4, approximately 10 %",
        "activation": "released configuration",
        "init_std": "section 3.1.2",
    },
    differences=(
        "The paper's equations have no scale; the released model multiplies the routed part by 16. Devices left out "
        "are minus infinity here, 0 in the released code and in transformers, where a masked expert ties with an "
        "allowed one whose score has underflowed. Which tenth of the sequences is never dropped is not published: "
        "here every tenth by index. The Lite model has one group, scale 1 and drops nothing."
    ),
    build=deepseek_v2_layer,
    balance=(
        LossTerm(name="expert", loss=sequence_loss, coefficient=3e-3),
        LossTerm(name="device", loss=device_loss, coefficient=5e-2),
        LossTerm(name="communication", loss=communication_loss, coefficient=2e-2),
    ),
)
