"""Where healthy ends, in one table, each number with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """A number that a check compares with.

    Attributes:
        value: the number.
        means: what is compared with it.
        reason: why it is this one: a source, a calculation, or what was measured.
    """

    value: float
    means: str
    reason: str


THRESHOLDS: Mapping[str, Threshold] = {
    "rows expected": Threshold(
        value=20,
        means="rows that a fair share would be, below which an idle expert says nothing",
        reason="where 20 rows are fair, an expert of even chances gets none once in e^20, half a billion times",
    ),
    "starved share": Threshold(
        value=0.1,
        means="share of an expert, as a part of the fair one",
        reason=(
            "a tenth of the data for the same parameters; the idlest of four healthy trainings had 0.22, 0.34, "
            "0.85 and 0.02 without balance"
        ),
    ),
    "overfull": Threshold(
        value=4.0,
        means="busiest expert over the mean",
        reason="the most uneven of 159 short trainings of docs/gallery.json has 3.4, most below 2",
    ),
    "overfull, sick": Threshold(
        value=8.0,
        means="busiest expert over the mean",
        reason="twice the warning; an expert with eight times its share needs eight times the room",
    ),
    "collapse": Threshold(
        value=0.7,
        means="way of the busiest expert from a fair share (0) to every token (1)",
        reason="the furthest of docs/gallery.json is 0.58; for few experts, where four times the mean cannot be",
    ),
    "collapse, sick": Threshold(
        value=0.9,
        means="way of the busiest expert from a fair share (0) to every token (1)",
        reason="nine tokens of ten go to one expert: the layer is a dense one with spare parts",
    ),
    "dropped": Threshold(
        value=0.15,
        means="share of rows that capacity drops",
        reason="ST-MoE found 10 to 15 % dropped without harm when fine-tuning (section 4.3, from memory)",
    ),
    "dropped, sick": Threshold(
        value=0.5,
        means="share of rows that capacity drops",
        reason="most of what was routed is not computed",
    ),
    "logit": Threshold(
        value=32.0,
        means="largest size of a router logit",
        reason="bfloat16 numbers from 32 on are 0.25 apart: rounding turns a probability by up to 13 %",
    ),
    "logit, sick": Threshold(
        value=128.0,
        means="largest size of a router logit",
        reason="from 128 on they are 1 apart: ST-MoE's example of round-off that changes the choice",
    ),
    "logit grew": Threshold(
        value=4.0,
        means="largest logit at the end of training over the start's, or over 1 where that is less",
        reason="2.4 times is the most of six healthy trainings of docs/precision.md, 2.3 of four others",
    ),
    "task gradient": Threshold(
        value=1e-6,
        means="norm of the task's gradient on a router, over that on the rest of its layer",
        reason="rounding of float32 is 6e-8; a weight that is 1 by division leaves that much",
    ),
    "rerouted": Threshold(
        value=0.001,
        means="share of tokens that full precision sends elsewhere",
        reason="float32 against float64 gave 0 in five trainings; bfloat16 gives 0.2 % to 3 % (docs/precision.md)",
    ),
    "rerouted, sick": Threshold(
        value=0.05,
        means="share of tokens that full precision sends elsewhere",
        reason="beyond what bfloat16 does at 64 experts and 8 choices (3 %, docs/precision.md)",
    ),
    "rerouted again": Threshold(
        value=1e-4,
        means="share of tokens that go elsewhere when nothing has changed",
        reason="none on a CPU; room for sums in another order on a GPU",
    ),
    "output differs": Threshold(
        value=1e-4,
        means="largest difference of two outputs for the same text, over their size",
        reason="0 on a CPU; room for sums in another order on a GPU",
    ),
    "loss differs": Threshold(
        value=1e-4,
        means="change of a balance loss with other padding, over its size",
        reason="rounding of float32 sums gives about 1e-6",
    ),
    "bias mean": Threshold(
        value=1.0,
        means="size of the mean of a router's selection bias",
        reason="sigmoid and softmax scores are at most 1: a mean beyond that is drift, and selects nothing",
    ),
    "bias steps": Threshold(
        value=20,
        means="optimizer steps after which a bias should have moved",
        reason="it moves in every step in which two experts differ in load",
    ),
    "bias step": Threshold(
        value=0.001,
        means="size of one step of a selection bias",
        reason="DeepSeek-V3, section 4.2",
    ),
    "coarse step": Threshold(
        value=0.1,
        means="a step of the bias over the mean score, 1 over the number of experts for a softmax",
        reason="at 100 experts one step is worth a tenth of a score: load swings and does not settle",
    ),
    "one way": Threshold(
        value=0.95,
        means="how far an expert's bias got in half a training, over the way that it went",
        reason=(
            "1.0 in a healthy training of 300 steps, whose biases were still on their way: a sign only together "
            "with the spread below"
        ),
    ),
    "bias spread": Threshold(
        value=1.0,
        means="largest bias of a router minus its smallest",
        reason="scores lie between 0 and 1: with more, the bias alone decides",
    ),
    "size": Threshold(
        value=5.0,
        means="size of an expert's weights over the median of its layer, either way",
        reason="0.91 to 1.08 in four healthy trainings; five times is another initialisation, not another history",
    ),
    "still logit": Threshold(
        value=1e-3,
        means="deviation of an expert's logit over tokens, over the median of its layer",
        reason="the least of four healthy trainings is 0.47; a row of zeros gives 0",
    ),
    "pull": Threshold(
        value=3.0,
        means="norm of the balance losses' gradient on a router, over the task's",
        reason=(
            "0.0004 to 0.06 with published coefficients; 0.5 to 1.5 with 500 times as much (held-out loss 1.3 % up); "
            "3 to 9.5 with 1,000 (Switch) and 5,000 times (Mixtral), and the loss 15 to 20 % up"
        ),
    ),
    "undecided": Threshold(
        value=0.993,
        means="mean entropy of a token's probabilities over experts, over that of chance, ln E",
        reason=(
            "0.72 to 0.97 with published coefficients on real text, 0.989 in a tiny training on random words; 0.996 to "
            "0.999 with 1,000 and 5,000 times the published coefficient"
        ),
    ),
    "uneven": Threshold(
        value=0.65,
        means="way of the busiest expert from a fair share (0) to every token (1), where balance is judged",
        reason=(
            "at most 0.58 in docs/gallery.json and 0.5 in four healthy trainings; 0.55 and 0.89 in the two layers "
            "of one without balance"
        ),
    ),
    "load grows": Threshold(
        value=1.5,
        means="excess of the busiest expert at the end of training over that half way",
        reason="0.25 to 0.89 in three healthy trainings, 0.98 and 1.04 in one without balance, which starts uneven",
    ),
    "long enough": Threshold(
        value=100,
        means="optimizer steps from which on a trend is judged",
        reason="warmup and the first preferences of a router take some tens of steps",
    ),
}
