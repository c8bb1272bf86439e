"""``bench layer``: one layer, all that can compute it, beside the dense layer of equal active FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Literal

import torch

from moesaic.bench import goals
from moesaic.bench.breakdown import breakdown
from moesaic.bench.case import Case
from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw, draw
from moesaic.bench.gpu_peers import gpu_peers
from moesaic.bench.machine import machine
from moesaic.bench.ours import DENSE, WITH_ROUTER, dense, ours, with_router
from moesaic.bench.parity import Verdict, checked
from moesaic.bench.peers import transformers_blocks, transformers_weights
from moesaic.bench.result import Goal, Group, Line, Result
from moesaic.bench.timing import Work, clock_of, interleaved, ratios
from moesaic.core.errors import ConfigError

PRODUCT = "matrix product"
Mode = Literal["train", "forward"]
MODES: tuple[Mode, ...] = ("train", "forward")
IN_WORDS = {"train": "training step", "forward": "forward"}
ABOUT = (
    "All contenders of a table have the same weights and are handed the same choices: they differ in dispatch and "
    "experts alone. The row with its router routes by itself, and makes the same choices.",
    "The limit is a gated dense layer of as many active FLOPs, by autograd.",
    "A training step is forward and backward, with gradients for tokens, routing weights and all experts; it begins "
    "with every gradient None, as optimizers leave them, and the clearing is not timed. A forward is under no_grad.",
    "The matrix rate is that of one large square product in the same dtype, taken in the same rounds.",
    "Contenders take turns, in an order that moves on by one each round; a ratio is taken within a round. Before that, "
    "each one's outputs and gradients are compared with the plainest code in a wider dtype: who differs is not timed.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What of the library of cases to measure, and how.

    Attributes:
        cases: sizes and loads.
        dtypes: of each.
        extras: cases in one dtype each, after the others.
        modes: of each.
        rounds: that count.
        device: where.
        only: names, or parts of them, of contenders; empty for all. The limit always takes part.
        parts: whether a step is also taken apart into router, dispatch and experts.
    """

    cases: Sequence[Case]
    dtypes: Sequence[torch.dtype]
    extras: Sequence[tuple[Case, torch.dtype]] = ()
    modes: Sequence[Mode] = MODES
    rounds: int = 5
    device: torch.device
    only: Sequence[str] = ()
    parts: bool = True


Say = Callable[[str], None]


def layer(plan: Plan, *, say: Say = lambda _line: None, done: Callable[[Group], None] = lambda _group: None) -> Result:
    """Time one layer in every case.

    Args:
        plan: what to measure.
        say: told what is being done.
        done: given each table as soon as it is there.
    """
    groups = []
    for case, dtype in (*product(plan.cases, plan.dtypes), *plan.extras):
        for group in _groups(plan, case, dtype, say):
            groups.append(group)
            done(group)
    return Result(verb="layer", machine=machine(plan.device), rounds=plan.rounds, about=ABOUT, groups=tuple(groups))


def modes_of(names: Iterable[str]) -> list[Mode]:
    """Modes by name.

    Raises:
        ConfigError: if one is unknown.
    """
    known: dict[str, Mode] = {mode: mode for mode in MODES}
    for name in names:
        if name not in known:
            raise ConfigError(f"mode must be train or forward, got {name!r}. Pick one of these.")
    return [known[name] for name in names]


def contenders(drawn: Draw, *, training: bool) -> list[Entrant]:
    """Everybody who can compute a draw, and everybody who cannot, with the reason; the limit last."""
    weights = transformers_weights(drawn)
    return [
        *ours(drawn),
        with_router(drawn),
        *transformers_blocks(drawn, training=training, weights=weights),
        *gpu_peers(drawn, weights=weights),
        dense(drawn),
    ]


def wanted(entrants: Iterable[Entrant], only: Sequence[str]) -> list[Entrant]:
    """Those whose name has one of some parts in it, and the limit."""
    return [one for one in entrants if not only or one.name == DENSE or any(part in one.name for part in only)]


def _groups(plan: Plan, case: Case, dtype: torch.dtype, say: Say) -> Iterable[Group]:
    drawn = draw(case, dtype=dtype, device=plan.device)
    training = "train" in plan.modes

    def build(one: Draw) -> list[Entrant]:
        return wanted(contenders(one, training=training), plan.only)

    entrants, verdicts = checked(drawn, build, training=training, say=lambda line: say(f"{case.name}: {line}"))
    for mode in plan.modes:
        told = partial(_told, say, f"{title(case, dtype)}, {IN_WORDS[mode]}")
        yield _timed(plan, drawn, mode, entrants, verdicts, told)
        if plan.parts:
            yield breakdown(drawn, training=mode == "train", rounds=plan.rounds, title=title(case, dtype), say=told)


def _told(say: Say, where: str, line: str) -> None:
    say(f"{where}: {line}")


def title(case: Case, dtype: torch.dtype) -> str:
    """Of a case, for people."""
    shared = ", shared expert" if case.shared_hidden else ""
    return f"{case.name}{shared}, {case.load}, {str(dtype).removeprefix('torch.')}"


def facts(drawn: Draw, mode: str) -> dict[str, str | int | float | bool]:
    """Of a draw, for programs."""
    case = drawn.case
    return {
        "case": case.name,
        "mode": mode,
        "kind": "times",
        "dtype": str(drawn.dtype).removeprefix("torch."),
        "T": case.num_tokens,
        "D": case.width,
        "E": case.num_experts,
        "K": case.top_k,
        "F": case.hidden,
        "shared": case.shared_hidden,
        "zipf": case.zipf,
        "max_over_mean": drawn.max_over_mean,
    }


def work_of(contender: Contender, drawn: Draw, *, training: bool) -> Work:
    """A training step, or a forward."""
    if training:
        return Work(run=partial(contender.step, drawn.grad_y_TD), before=contender.clear)
    return Work(run=torch.no_grad()(contender.forward), before=contender.clear)


def matrix_product(drawn: Draw) -> tuple[Work, int]:
    """One large product in the draw's dtype, and its floating-point operations: the matrix rate of this machine.

    As wide as the products of the dense layer, so that a CPU is not asked for more than the layer could reach.
    """
    case = drawn.case
    size = 8192 if drawn.device.type == "cuda" else min(2048, case.num_tokens)
    a, b = (torch.randn(size, size, dtype=drawn.dtype, device=drawn.device) for _ in range(2))
    return Work(run=lambda: torch.mm(a, b)), 2 * size**3


def warmed(works: Mapping[str, Work]) -> tuple[dict[str, Work], dict[str, str]]:
    """Run each once; give those that can, and why the others cannot."""
    able, broken = {}, {}
    for name, work in works.items():
        try:
            work.before()
            work.run()
            able[name] = work
        except Exception as error:
            broken[name] = f"broke: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return able, broken


def _timed(
    plan: Plan, drawn: Draw, mode: Mode, entrants: Sequence[Entrant], verdicts: Mapping[str, Verdict], say: Say
) -> Group:
    training = mode == "train"
    present = [one for one in entrants if isinstance(one, Contender)]
    works, broken = warmed({one.name: work_of(one, drawn, training=training) for one in present})
    product, flops = matrix_product(drawn)
    clock = clock_of(drawn.device)
    times = interleaved({**works, PRODUCT: product}, rounds=plan.rounds, clock=clock, warm_up=0, say=say)
    rate = tuple(flops / seconds for seconds in times.pop(PRODUCT))
    needed = drawn.case.flops * (3 if training else 1)
    for one in present:
        one.clear()
    limit = times[DENSE]
    lines = []
    for entrant in entrants:
        if isinstance(entrant, Absent) or entrant.name in broken:
            why = entrant.why if isinstance(entrant, Absent) else broken[entrant.name]
            lines.append(Line(name=entrant.name, note=why))
            continue
        mine = times[entrant.name]
        to_limit = ratios(mine, limit)
        share = tuple(needed / seconds / most for seconds, most in zip(mine, rate, strict=True))
        reached: tuple[Goal, ...] = ()
        if entrant.is_default and drawn.device.type == "cpu":
            reached = goals.of_layer(drawn.case, mode, to_limit, mine, times)
        elif entrant.is_default and entrant.name != WITH_ROUTER:
            reached = goals.on_gpu(drawn.case, mode, share, mine, times)
        lines.append(
            Line(
                name=entrant.name,
                samples=tuple(1e3 * value for value in mine),
                ratios=to_limit,
                note=_note(entrant, drawn, median(share), verdicts),
                goals=reached,
            )
        )
    what = f"{title(drawn.case, drawn.dtype)}, {IN_WORDS[mode]}"
    return Group(title=what, unit="ms", limit=DENSE, lines=tuple(lines), facts=facts(drawn, mode))


def _note(entrant: Contender, drawn: Draw, share: float, verdicts: Mapping[str, Verdict]) -> str:
    rate = f"{share:.0%} of the matrix rate"
    if entrant.name == DENSE:
        return f"the limit: hidden width {drawn.case.active_hidden:,}; {rate}"
    if entrant.name == WITH_ROUTER:
        return f"what a user runs: router, dispatch, experts; {rate}"
    verdict = verdicts.get(entrant.name)
    return rate if verdict is None else f"{rate}; off by {verdict.worst:.0e} at most"
