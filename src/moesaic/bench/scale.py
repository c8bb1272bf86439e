"""``bench scale``: whether the time of a token stays the same in larger batches, with more experts, under skew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moesaic.bench import goals
from moesaic.bench.case import FINE, Case
from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw, draw
from moesaic.bench.layer import Say, facts, work_of
from moesaic.bench.machine import machine
from moesaic.bench.ours import DENSE, dense, ours
from moesaic.bench.parity import checked
from moesaic.bench.peers import GROUPED, transformers_contender, transformers_weights
from moesaic.bench.result import Goal, Group, Line, Result
from moesaic.bench.timing import Work, clock_of, interleaved, ratios

OURS = "moesaic"
ABOUT = (
    "Microseconds of a training step divided by its tokens. All sizes of a table take turns within each round.",
    "The dense layer beside each size has equal active FLOPs, and the same number of tokens.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """What to measure, and how.

    Attributes:
        base: the case that is varied; its number of tokens holds where experts or skew are varied.
        dtypes: of each.
        tokens: T of the first table.
        experts: E of the second.
        skews: Zipf exponents of the third, beside balanced load.
        rounds: that count.
        device: where.
    """

    base: Case = FINE
    dtypes: Sequence[torch.dtype]
    tokens: Sequence[int] = (1024, 4096, 16384, 65536)
    experts: Sequence[int] = (8, 16, 32, 64, 128, 256)
    skews: Sequence[float] = (0.5, 1.0, 1.5)
    rounds: int = 5
    device: torch.device


def scale(
    plan: Scaling, *, say: Say = lambda _line: None, done: Callable[[Group], None] = lambda _group: None
) -> Result:
    """Time a token against tokens, experts and skew.

    Args:
        plan: what to measure.
        say: told what is being done.
        done: given each table as soon as it is there.
    """
    groups = []
    for dtype in plan.dtypes:
        for group in _groups(plan, dtype, say):
            groups.append(group)
            done(group)
    return Result(verb="scale", machine=machine(plan.device), rounds=plan.rounds, about=ABOUT, groups=tuple(groups))


def _groups(plan: Scaling, dtype: torch.dtype, say: Say) -> Iterator[Group]:
    base, word = plan.base, str(dtype).removeprefix("torch.")
    sizes = f"E={base.num_experts}, K={base.top_k}, F={base.hidden}"
    swept = _Sweep(plan=plan, dtype=dtype, say=say)
    by_tokens = {f"T={count:,}": replace(base, num_tokens=count) for count in plan.tokens}
    # grouped_mm would take most of the time here, to show what is known from the other two.
    yield swept.group(f"time of a token by tokens, {sizes}, {word}", by_tokens, goals.of_tokens, peer=False)
    by_experts = {f"E={count}": replace(base, num_experts=count) for count in plan.experts}
    yield swept.group(f"time of a token by experts, equal active FLOPs, {word}", by_experts, goals.of_experts)
    by_skew = {"balanced": base} | {f"Zipf {skew:g}": replace(base, zipf=skew) for skew in plan.skews}
    yield swept.group(f"time of a token by skew, {sizes}, {word}", by_skew, goals.of_skew)


Judge = Callable[[Mapping[str, tuple[float, ...]]], dict[str, Goal]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sweep:
    """Tables of one dtype."""

    plan: Scaling
    dtype: torch.dtype
    say: Say

    def group(self, title: str, cases: Mapping[str, Case], judge: Judge, *, peer: bool = True) -> Group:
        """Time ours, the limit and a peer in every case, all in the same rounds."""
        plan = self.plan
        draws = self._draws(cases)
        works: dict[str, Work] = {}
        absent: dict[str, str] = {}
        for label, drawn in draws.items():
            for name, entrant in self._entrants(drawn, peer=peer).items():
                if isinstance(entrant, Absent):
                    absent[f"{name}, {label}"] = entrant.why
                else:
                    works[f"{name}, {label}"] = work_of(entrant, drawn, training=True)
        seconds = interleaved(
            works, rounds=plan.rounds, clock=clock_of(plan.device), say=lambda line: self.say(f"{title}: {line}")
        )
        per_token = {
            name: tuple(1e6 * value / cases[name.partition(", ")[2]].num_tokens for value in values)
            for name, values in seconds.items()
        }
        mine = {label: per_token[f"{OURS}, {label}"] for label in cases if f"{OURS}, {label}" in per_token}
        reached = judge(mine) if plan.base == FINE and plan.device.type == "cpu" else {}
        names = [f"{name}, {label}" for name in (OURS, GROUPED, DENSE) for label in cases]
        lines = [
            _line(name, per_token, absent, reached, draws) for name in names if name in per_token or name in absent
        ]
        first = next(iter(draws.values()))
        return Group(title=title, unit="µs a token", limit=DENSE, lines=tuple(lines), facts=facts(first, "scale"))

    def _draws(self, cases: Mapping[str, Case]) -> dict[str, Draw]:
        """One for each; those of as many experts share their weights."""
        found: dict[str, Draw] = {}
        by_experts: dict[int, Draw] = {}
        for label, case in cases.items():
            known = by_experts.get(case.num_experts)
            found[label] = draw(case, dtype=self.dtype, device=self.plan.device, weights=known)
            by_experts.setdefault(case.num_experts, found[label])
        return found

    def _entrants(self, drawn: Draw, *, peer: bool) -> dict[str, Entrant]:
        """Ours, the limit and a peer, those out that fail on a small draw of the kind."""

        def build(one: Draw) -> list[Entrant]:
            mine = next(entrant for entrant in ours(one) if isinstance(entrant, Contender) and entrant.is_default)
            found: list[Entrant] = [replace(mine, name=OURS)]
            if peer:
                found.append(transformers_contender(GROUPED, one, transformers_weights(one), "grouped_mm"))
            return [*found, dense(one)]

        entrants, _ = checked(drawn, build, training=True, itself=False)
        return {entrant.name: entrant for entrant in entrants}


def _line(
    name: str,
    per_token: Mapping[str, tuple[float, ...]],
    absent: Mapping[str, str],
    reached: Mapping[str, Goal],
    draws: Mapping[str, Draw],
) -> Line:
    if name in absent:
        return Line(name=name, note=absent[name])
    who, _, label = name.partition(", ")
    note = f"busiest expert {draws[label].max_over_mean:.1f} times the mean" if who == OURS else ""
    mine, limit = per_token[name], per_token[f"{DENSE}, {label}"]
    goal = (reached[label],) if who == OURS and label in reached else ()
    return Line(name=name, samples=mine, ratios=ratios(mine, limit), note=note, goals=goal)
