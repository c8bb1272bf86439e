"""Switch Transformer, 2021: one expert per token, and a loss that keeps them busy."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import scaled_by_fan_in
from moesaic.dispatch import Capacity
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def switch_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 128,
    top_k: int = 1,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    jitter: float = 0.01,
    activation: str = "relu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Top-1 of a softmax, the probability as weight, a capacity that drops the latest tokens.

    Args:
        width: D.
        hidden: F.
        num_experts: E, 128 in Switch-Base.
        top_k: 1 as published; more works the same way.
        capacity_factor: room over a balanced load in training; 1.0 to 2.0 in the paper's table 1.
        eval_capacity_factor: the same in evaluation; 2.0 in the authors' code.
        min_capacity: least rows per expert; 4 in the authors' code.
        jitter: width of the noise on the router's input in training.
        activation: of the experts; ReLU as in the first T5.
        init_std: None draws with variance 0.1 / fan-in (section 2.4), ten times less than usual.
        kernel: of the experts.
    """
    init = drawn(init_std, scaled_by_fan_in(0.1))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", jitter=jitter, init=init)
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    dispatch = Capacity(capacity_factor, eval_factor=eval_capacity_factor, minimum=min_capacity)
    return MoELayer(router, experts, dispatch=dispatch)


SWITCH = Recipe(
    name="switch",
    year=2021,
    summary="one expert per token, weighted by its probability; capacity; load balancing loss",
    citation="Fedus, Zoph, Shazeer. Switch Transformers. JMLR 23(120), 2022. arXiv:2101.03961",
    router="one expert per token, the best of a softmax, weighted by its probability",
    formula="""\
p = softmax(W x);  in training W sees x times uniform noise from 1 - jitter to 1 + jitter
e* = argmax_e p_e;  y = p_e* FFN_e*(x)
each expert takes at most C = max(min_capacity, ceil(capacity_factor * T * K / E)) tokens, earliest first
loss = 0.01 * E * sum_e f_e P_e,  f_e = share of rows that chose e,  P_e = mean_t p_te""",
    sources={
        "num_experts": "section 3.1, Switch-Base",
        "top_k": "section 2.1",
        "capacity_factor": "table 1, 1.0 to 2.0; 1.25 in the authors' code",
        "eval_capacity_factor": "authors' code (Mesh TensorFlow)",
        "min_capacity": "authors' code (Mesh TensorFlow)",
        "jitter": "table 11 and authors' code",
        "activation": "T5 (2019)",
        "init_std": "section 2.4",
    },
    differences=(
        "Table 9 lists GEGLU networks for Switch-Base; transformers has ReLU for the original model, and so has this. "
        "Appendix F adds the jitter to logits; the authors' code multiplies the input, as here. The paper's "
        "pseudo-code keeps C - 1 rows (an inclusive count compared with <); the authors' code and this keep C. "
        "transformers has a fixed capacity of 64 for each sequence and a loss of the same value. "
        "DeepSpeed drops random rows of an overfull expert unless told otherwise; here the latest go."
    ),
    build=switch_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),),
)
