"""``bench memory``: what a training step keeps for its backward, and the most that it ever holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.bench import goals
from moesaic.bench.case import Case
from moesaic.bench.contender import Absent, Contender
from moesaic.bench.draw import Draw, draw
from moesaic.bench.layer import Say, contenders, facts, title, wanted
from moesaic.bench.machine import machine
from moesaic.bench.peers import GROUPED
from moesaic.bench.result import Group, Line, Result
from moesaic.core.living import Living

MIB = 2**20
NUMBERS = {
    "kept for the backward": "held_bytes",
    "peak of a step": "peak_bytes",
}
ABOUT = (
    "Kept: tensors that the forward made and that are alive after it, without the output; weights, tokens and routing "
    "were there before and do not count. The note names the largest that autograd was given to keep.",
    "Peak: the most that is alive at any moment of forward and backward, gradients of all weights included. Both count "
    "the storages of tensors, from the operation that first shows one until it is freed; on a GPU the allocator does.",
    "Scratch that an operation makes and drops inside itself is not seen on a CPU. One step after a warm-up.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Memory of one training step.

    Attributes:
        held_bytes: alive between forward and backward.
        peak_bytes: most at any moment, gradients included.
        saved_bytes: of tensors that autograd was given to keep, each storage once, those that were there before left
            out; less than ``held_bytes`` where something is kept behind its back.
        largest: the saved tensors, largest first, as shapes.
    """

    held_bytes: int
    peak_bytes: int
    saved_bytes: int
    largest: tuple[tuple[int, ...], ...]


def memory(
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    only: Sequence[str] = (),
    say: Say = lambda _line: None,
    done: Callable[[Group], None] = lambda _group: None,
) -> Result:
    """Measure the memory of a training step in every case.

    Args:
        cases: sizes.
        dtypes: of each.
        device: where.
        only: names, or parts of them, of contenders; empty for all. grouped_mm, which others are compared with, and
            the dense layer always take part.
        say: told what is being done.
        done: given each table as soon as it is there.
    """
    groups = []
    for case in cases:
        for dtype in dtypes:
            for group in _groups(draw(case, dtype=dtype, device=device), only, say):
                groups.append(group)
                done(group)
    return Result(verb="memory", machine=machine(device), rounds=1, about=ABOUT, groups=tuple(groups))


def _groups(drawn: Draw, only: Sequence[str], say: Say) -> Iterator[Group]:
    entrants = wanted(contenders(drawn, training=True), [*only, GROUPED] if only else ())
    found: dict[str, Kept] = {}
    why_not: dict[str, str] = {}
    for entrant in entrants:
        if isinstance(entrant, Absent):
            why_not[entrant.name] = entrant.why
            continue
        say(f"{title(drawn.case, drawn.dtype)}: memory of {entrant.name}")
        try:
            found[entrant.name] = kept(entrant, drawn)
        except Exception as error:
            why_not[entrant.name] = f"broke: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        finally:
            entrant.clear()
    defaults = {one.name for one in entrants if isinstance(one, Contender) and one.is_default}
    for word, number in NUMBERS.items():
        if not any(getattr(one, number) for one in found.values()):
            continue
        lines = []
        for entrant in entrants:
            if entrant.name not in found:
                lines.append(Line(name=entrant.name, note=why_not[entrant.name]))
                continue
            mine, grouped = getattr(found[entrant.name], number), getattr(found.get(GROUPED), number, 0)
            is_judged = entrant.name in defaults and number == "held_bytes" and grouped
            lines.append(
                Line(
                    name=entrant.name,
                    samples=(mine / MIB,),
                    ratios=(mine / grouped,) if grouped else (),
                    note=_shapes(found[entrant.name].largest) if number == "held_bytes" else "",
                    goals=goals.of_memory(drawn.case, mine, grouped) if is_judged else (),
                )
            )
        what = f"{title(drawn.case, drawn.dtype)}, {word}"
        yield Group(title=what, unit="MiB", limit=GROUPED, lines=tuple(lines), facts=facts(drawn, number))


def kept(contender: Contender, drawn: Draw) -> Kept:
    """Measure one contender; its gradients are cleared before, and there after."""
    contender.clear()
    contender.step(drawn.grad_y_TD)
    contender.clear()
    saved = _saved(contender, drawn)
    contender.clear()
    step = partial(contender.step, drawn.grad_y_TD)
    if drawn.device.type == "cuda":
        held, _, y_TD = _on_cuda(contender.forward)
        held -= y_TD.untyped_storage().nbytes()
        del y_TD
        _, peak, _ = _on_cuda(step)
    else:
        before = (*contender.leaves, *_given(drawn))
        held, peak = _held(contender.forward, before), _peak(step, before)
    largest = tuple(shape for _, shape in sorted(saved.values(), reverse=True))
    return Kept(
        held_bytes=held,
        peak_bytes=peak,
        saved_bytes=sum(size for size, _ in saved.values()),
        largest=largest,
    )


def _given(drawn: Draw) -> tuple[Tensor, ...]:
    """What a draw holds beside leaves."""
    return drawn.expert_TK, drawn.logits_TE, drawn.router_ED, drawn.grad_y_TD


def _held(forward: Callable[[], Tensor], before: Sequence[Tensor]) -> int:
    living = Living(before)
    with living:
        y_TD = forward()
    return living.live_bytes - y_TD.untyped_storage().nbytes()


def _peak(step: Callable[[], None], before: Sequence[Tensor]) -> int:
    living = Living(before)
    with living:
        step()
    return living.peak_bytes


def _saved(contender: Contender, drawn: Draw) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Size and shape of each storage that autograd was given, those of leaves and of the draw left out."""
    before = {there.untyped_storage().data_ptr() for there in (*contender.leaves, *_given(drawn))}
    found: dict[int, tuple[int, tuple[int, ...]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before and storage.nbytes():
            found[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = contender.forward()
    # Kept until here, so that no address is given out twice.
    del y_TD
    return found


def _shapes(largest: tuple[tuple[int, ...], ...]) -> str:
    """The three kinds that matter most."""
    counted: dict[tuple[int, ...], int] = {}
    for shape in largest:
        counted[shape] = counted.get(shape, 0) + 1
    shown = [f"{count} × {'×'.join(map(str, shape))}" for shape, count in list(counted.items())[:3]]
    return "keeps " + ", ".join(shown) if shown else ""


def _on_cuda(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that are there after ``run`` and were not before, the most on the way, and what it returned."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before, result
