"""``bench decode``: a few tokens at a time, where the time is that of reading the chosen experts' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from moesaic.bench import bandwidth, goals
from moesaic.bench.case import Case
from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw, draw
from moesaic.bench.layer import Say, facts, title, wanted, warmed
from moesaic.bench.machine import machine
from moesaic.bench.ours import DENSE, dense, ours, with_router
from moesaic.bench.parity import checked
from moesaic.bench.peers import Weights, transformers_blocks, transformers_weights
from moesaic.bench.result import Goal, Group, Line, Result
from moesaic.bench.timing import Work, clock_of, interleaved, ratios

LIMIT = "bandwidth"
MIN_VISITS = 32
ABOUT = (
    "A visit is one forward of one layer in evaluation, under no_grad, by 1, 4 or 16 tokens. A pass makes at least 32 "
    "visits to several layers, so that every weight comes from memory and none from a cache, as in a model of many "
    "layers; times are of a visit.",
    bandwidth.ABOUT,
    "The command has PyTorch ask Linux for pages of 2 MiB (THP_MEM_ALLOC_ENABLE): everybody's weights lie in them, and "
    "so does what bandwidth is measured on.",
    "The limit is the time in which a visit's active weights, those of every expert that some token chose, can be "
    "read. A single token's experts are never chosen again within a pass where there are enough of them.",
    "The dense layer reads as many bytes, from copies that are just as cold.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """What to measure, and how.

    Attributes:
        cases: sizes; their number of tokens is not read.
        dtypes: of each.
        tokens: of a visit.
        rounds: that count.
        device: where.
        only: names, or parts of them, of contenders; empty for all.
        cold_bytes: weights of all layers together, and what bandwidth is measured on; None for many times the cache.
    """

    cases: Sequence[Case]
    dtypes: Sequence[torch.dtype]
    tokens: Sequence[int] = (1, 4, 16)
    rounds: int = 7
    device: torch.device
    only: Sequence[str] = ()
    cold_bytes: int | None = None


def decode(
    plan: Decoding, *, say: Say = lambda _line: None, done: Callable[[Group], None] = lambda _group: None
) -> Result:
    """Time decoding in every case.

    Args:
        plan: what to measure.
        say: told what is being done.
        done: given each table as soon as it is there.
    """
    groups = []
    for case in plan.cases:
        for dtype in plan.dtypes:
            for group in _groups(plan, case, dtype, say):
                groups.append(group)
                done(group)
    return Result(verb="decode", machine=machine(plan.device), rounds=plan.rounds, about=ABOUT, groups=tuple(groups))


def _groups(plan: Decoding, case: Case, dtype: torch.dtype, say: Say) -> Iterable[Group]:
    cold = plan.cold_bytes or bandwidth.cold_bytes(plan.device)
    layers = [
        draw(replace(case, num_tokens=1), dtype=dtype, device=plan.device, seed=seed)
        for seed in range(-(-cold // layer_bytes(case, dtype)))
    ]
    weights = [transformers_weights(one) for one in layers]
    for num_tokens in plan.tokens:
        visits = visits_of(replace(case, num_tokens=num_tokens), layers)
        entrants = _entrants(plan, visits, layers, weights, say)
        yield _timed(plan, visits, entrants, cold, say)


def layer_bytes(case: Case, dtype: torch.dtype) -> int:
    """Weights of one layer."""
    return 3 * case.width * (case.num_experts * case.hidden + case.shared_hidden) * dtype.itemsize


def active_bytes(visit: Draw) -> int:
    """Weights that a visit must read: those of each expert that some token chose, and the shared expert's."""
    num_experts = int(torch.bincount(visit.expert_TK.flatten()).count_nonzero())
    return 3 * visit.case.width * (num_experts * visit.case.hidden + visit.case.shared_hidden) * visit.dtype.itemsize


def visits_of(case: Case, layers: Sequence[Draw]) -> list[Draw]:
    """The visits of a pass, one layer after the other, round and round."""
    rounds = -(-MIN_VISITS // len(layers))
    visits = []
    for turn in range(rounds):
        for index, layer in enumerate(layers):
            among_TE = _not_seen_lately(case, turn, index, layer.device) if case.num_tokens == 1 else None
            seed = 1000 + turn * len(layers) + index
            visits.append(
                draw(case, dtype=layer.dtype, device=layer.device, seed=seed, weights=layer, among_TE=among_TE)
            )
    return visits


def _not_seen_lately(case: Case, turn: int, index: int, device: torch.device) -> Tensor:
    """The experts of a single token's turn: K others in every turn, until all have had one."""
    random = torch.Generator(device=device).manual_seed(index)
    order_E = torch.randperm(case.num_experts, generator=random, device=device)
    start = turn * case.top_k % (case.num_experts - case.num_experts % case.top_k)
    among_TE = torch.zeros(1, case.num_experts, dtype=torch.bool, device=device)
    among_TE[0, order_E[start : start + case.top_k]] = True
    return among_TE


@dataclass(frozen=True, kw_only=True, slots=True)
class _Everywhere:
    """One contender over all visits of a pass.

    Attributes:
        name: of it.
        forwards: of each visit.
        is_default: see :class:`~moesaic.bench.contender.Contender`.
    """

    name: str
    forwards: tuple[Callable[[], Tensor], ...]
    is_default: bool

    def run(self) -> None:
        """One pass."""
        with torch.no_grad():
            for forward in self.forwards:
                forward()


def _entrants(
    plan: Decoding, visits: Sequence[Draw], layers: Sequence[Draw], weights: Sequence[Weights], say: Say
) -> list[_Everywhere | Absent]:
    """Who passes the test of the first visit, over all visits."""

    def build(one: Draw, own: Weights | None = None) -> list[Entrant]:
        found = [
            *ours(one, training=False),
            with_router(one, training=False),
            *transformers_blocks(one, training=False, weights=own),
        ]
        # Without the limit: it has weights of its own.
        return [entrant for entrant in wanted(found, plan.only) if entrant.name != DENSE]

    first, _ = checked(visits[0], build, training=False, say=lambda line: say(f"{visits[0].case.name}: {line}"))
    everywhere = [build(visit, weights[index % len(layers)]) for index, visit in enumerate(visits)]
    found: list[_Everywhere | Absent] = []
    for at, entrant in enumerate(first):
        copies = [one[at] for one in everywhere]
        if isinstance(entrant, Absent):
            found.append(entrant)
            continue
        forwards = tuple(copy.forward for copy in copies if isinstance(copy, Contender))
        found.append(_Everywhere(name=entrant.name, forwards=forwards, is_default=entrant.is_default))
    limits = tuple(dense(visit).forward for visit in visits)
    return [*found, _Everywhere(name=DENSE, forwards=limits, is_default=False)]


def _timed(
    plan: Decoding, visits: Sequence[Draw], entrants: Sequence[_Everywhere | Absent], cold: int, say: Say
) -> Group:
    case = visits[0].case
    what = f"{title(case, visits[0].dtype)}, decoding {case.num_tokens} token{'s' * (case.num_tokens > 1)}"
    present = [one for one in entrants if isinstance(one, _Everywhere)]
    works, broken = warmed({one.name: Work(run=one.run) for one in present})
    reading, read_bytes = bandwidth.readers(plan.device, cold)
    times = interleaved(
        {**works, **reading},
        rounds=plan.rounds,
        clock=clock_of(plan.device),
        say=lambda line: say(f"{what}: {line}"),
    )
    bytes_per_s = bandwidth.best(times, read_bytes)
    mean_bytes = sum(map(active_bytes, visits)) / len(visits)
    limit = tuple(mean_bytes / rate for rate in bytes_per_s)
    per_visit = {name: tuple(value / len(visits) for value in times[name]) for name in works}
    lines = [_line(entrant, case, per_visit, broken, limit) for entrant in entrants]
    note = f"{median(bytes_per_s) / 1e9:.1f} GB/s over {mean_bytes / 2**20:.1f} MiB"
    lines.append(Line(name=LIMIT, samples=_micro(limit), ratios=tuple(1.0 for _ in limit), note=f"the limit: {note}"))
    known = {
        **facts(visits[0], "decode"),
        "active_bytes": mean_bytes,
        "bytes_per_s": median(bytes_per_s),
        "visits": len(visits),
    }
    return Group(title=what, unit="µs", limit=LIMIT, lines=tuple(lines), facts=known)


def _line(
    entrant: _Everywhere | Absent,
    case: Case,
    per_visit: dict[str, tuple[float, ...]],
    broken: dict[str, str],
    limit: tuple[float, ...],
) -> Line:
    if isinstance(entrant, Absent):
        return Line(name=entrant.name, note=entrant.why)
    if entrant.name in broken:
        return Line(name=entrant.name, note=broken[entrant.name])
    mine = per_visit[entrant.name]
    reached: tuple[Goal, ...] = ()
    if entrant.is_default:
        theirs = [times for name, times in per_visit.items() if name.startswith("transformers ")]
        reached = goals.of_decoding(case, mine, limit, theirs)
    note = "as many bytes, dense" if entrant.name == DENSE else ""
    return Line(name=entrant.name, samples=_micro(mine), ratios=ratios(mine, limit), note=note, goals=reached)


def _micro(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(1e6 * value for value in values)
