"""The page of all results: goals first, then tables and drawings, then how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moesaic.bench.memory import NUMBERS
from moesaic.bench.picture import panels, picture
from moesaic.bench.result import Group, Line, Result
from moesaic.bench.show import markdown, number
from moesaic.bench.timing import spread
from moesaic.core.errors import DataError
from moesaic.core.files import replacing_file

VERBS = ("layer", "model", "decode", "memory", "scale")
HEADINGS = {
    "layer": "One layer",
    "model": "Whole models",
    "decode": "Decoding",
    "memory": "Memory of a training step",
    "scale": "Growth",
}
TRIED = "tried.md"
"""Written by hand, beside the folder of results: what did not pay."""
HEAD = """\
# Speed

<!-- Written by `moesaic bench page` from benchmarks/results: measure again to change it. -->

A mixture promises the cost of its active parameters. These tables say how much of the promise is kept, beside
transformers' own implementations and beside what bounds all of them: a dense layer of as many active FLOPs, and for
decoding the memory's bandwidth. Everything in one table was measured in one run. `moesaic bench` measures your machine;
`make bench` writes the figures of this page.
"""


def load(folder: Path) -> list[Result]:
    """All results of a folder, by device and then in the order of the page.

    Raises:
        DataError: if there are none.
        CheckpointError: if a file is none.
    """
    found = [Result.from_json(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise DataError(f"A page needs results, got none in {folder}. Measure some with: make bench")
    return sorted(found, key=lambda one: (one.machine.device, VERBS.index(one.verb)))


def write(folder: Path, out: Path) -> list[Path]:
    """Write the page, and a drawing beside it for each result that has one; give the files.

    Raises:
        BackendError: without matplotlib.
        DataError: if there are no results.
    """
    results = load(folder)
    written = []
    for one in results:
        drawn = picture(one)
        if drawn is not None:
            written.append(_text(out.with_name(drawing(out.stem, one)), drawn))
    return [_text(out, words(results, out.stem, tried(folder))), *written]


def drawing(stem: str, result: Result) -> str:
    """File name of a result's drawing."""
    return f"{stem}-{result.machine.slug}-{result.verb}.svg"


def tried(folder: Path) -> str:
    """What was written by hand about what did not pay; empty if nothing was."""
    path = folder.parent / TRIED
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def words(results: Sequence[Result], stem: str = "speed", tried: str = "") -> str:
    """The page.

    Args:
        results: in the order of the page.
        stem: of the page's file name, which drawings share.
        tried: closing part.
    """
    parts = [HEAD]
    for device in dict.fromkeys(one.machine.device for one in results):
        parts += _device([one for one in results if one.machine.device == device], stem)
    if tried:
        parts += ["", tried.strip()]
    return "\n".join(parts) + "\n"


def _device(results: Sequence[Result], stem: str) -> Iterator[str]:
    yield f"## {results[0].machine.device}"
    yield ""
    yield from _goals(results)
    for one in results:
        yield f"### {HEADINGS[one.verb]}"
        yield ""
        if panels(one):
            yield f"![{_DRAWN[one.verb]}]({drawing(stem, one)})"
            yield ""
        yield from _TABLES[one.verb](one)
        yield "*How it was measured.* " + " ".join(one.about) + f" {_rounds(one)}"
        yield ""
    yield from _machines(results)


def _rounds(one: Result) -> str:
    if one.rounds == 1:
        return ""
    return f"Figures are medians of {one.rounds} rounds, ± half the distance from the lowest to the highest."


def _machines(results: Iterable[Result]) -> Iterator[str]:
    yield "| figures | date | threads | versions | commit |"
    yield "|---|---|---:|---|---|"
    for one in results:
        versions = ", ".join(f"{name} {version}" for name, version in one.machine.versions.items())
        commit = f"`{one.machine.commit}`" if one.machine.commit else ""
        yield f"| {one.verb} | {one.machine.date} | {one.machine.threads} | {versions} | {commit} |"
    yield ""


def _goals(results: Sequence[Result]) -> Iterator[str]:
    rows = []
    for one in results:
        for group in one.groups:
            for line in group.lines:
                for goal in line.goals:
                    sign = "≤" if goal.at_most else "≥"
                    verdict = "met" if goal.met else "**missed**"
                    what = f"{group.title}: {line.name}"
                    rows.append(f"| {what} | {goal.what} {sign} {goal.bound:.2f} | {goal.value:.2f} | {verdict} |")
    if rows:
        yield "| what | goal | measured | |"
        yield "|---|---|---:|---|"
        yield from rows
        yield ""


def _layer(result: Result) -> Iterator[str]:
    times = [group for group in result.groups if group.facts.get("kind") == "times"]
    for mode, in_words in (("train", "Training step"), ("forward", "Forward")):
        for dtype in _values(times, "dtype"):
            chosen = [group for group in times if (group.facts["mode"], group.facts["dtype"]) == (mode, dtype)]
            if chosen:
                yield from _pivot(
                    f"{in_words}, {dtype}: ms, and over the dense layer's", chosen, [_short(one) for one in chosen]
                )
    parts = [group for group in result.groups if group.facts.get("kind") == "parts" and group.facts["mode"] == "train"]
    if parts:
        columns = [f"{_short(one)}, {one.facts['dtype']}" for one in parts]
        yield from _pivot("Parts of our training step: ms, and share of the whole", parts, columns)


def _decode(result: Result) -> Iterator[str]:
    for case in _values(result.groups, "case"):
        for dtype in _values(result.groups, "dtype"):
            chosen = [one for one in result.groups if (one.facts["case"], one.facts["dtype"]) == (case, dtype)]
            columns = [f"{one.facts['T']} token{'s' * (one.facts['T'] != 1)}" for one in chosen]
            if chosen:
                caption = f"{_short(chosen[0])}, {dtype}: µs, and over the time to read the weights"
                yield from _pivot(caption, chosen, columns)


def _memory(result: Result) -> Iterator[str]:
    for caption, number_of in NUMBERS.items():
        chosen = [group for group in result.groups if group.facts["mode"] == number_of]
        columns = [f"{_short(group)}, {group.facts['dtype']}" for group in chosen]
        if chosen:
            yield from _pivot(f"{caption.capitalize()}: MiB, and over grouped_mm's", chosen, columns)


def _plain(result: Result) -> Iterator[str]:
    for group in result.groups:
        yield f"**{group.title}**"
        yield ""
        yield from markdown(group)
        yield ""


def _short(group: Group) -> str:
    """The case, with what is not as usual about it."""
    shared = ", shared" if group.facts.get("shared") else ""
    skew = f", Zipf {group.facts['zipf']:g}" if group.facts.get("zipf") else ""
    return f"{group.facts['case']}{shared}{skew}"


def _pivot(caption: str, groups: Sequence[Group], columns: Sequence[str]) -> Iterator[str]:
    """One table of several groups: a row for each contender, a column for each group."""
    names = list(dict.fromkeys(line.name for group in groups for line in group.lines))
    yield f"**{caption}**"
    yield ""
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for name in names:
        yield f"| {name} | " + " | ".join(_cell(group.line(name)) for group in groups) + " |"
    yield ""
    limits = [(column, group.line(group.limit)) for column, group in zip(columns, groups, strict=True)]
    notes = [f"{column}, {line.name}: {line.note}" for column, line in limits if line is not None and line.note]
    whys = dict.fromkeys(f"{name}: {line.note}" for name in names for line in _absent(groups, name))
    for note in (*notes, *whys):
        yield f"- {note}"
    if notes or whys:
        yield ""


def _absent(groups: Sequence[Group], name: str) -> list[Line]:
    found = [group.line(name) for group in groups]
    return [line for line in found if line is not None and not line.samples]


def _cell(line: Line | None) -> str:
    if line is None or line.value is None:
        return "–"
    low, middle, high = spread(line.samples)
    around = f" ± {50 * (high - low) / middle:.0f} %" if len(line.samples) > 1 else ""
    return number(middle) + around + ("" if line.ratio is None else f" ({line.ratio:.2f})")


def _values(groups: Iterable[Group], fact: str) -> list[str]:
    return list(dict.fromkeys(str(group.facts[fact]) for group in groups if fact in group.facts))


def _text(path: Path, content: str) -> Path:
    with replacing_file(path) as partial:
        partial.write(content.encode("utf-8"))
    return path


_DRAWN = {
    "layer": "Time of a training step beside the dense layer's",
    "model": "Tokens per second in training",
    "decode": "Time of one token beside the time to read its weights",
    "memory": "MiB kept for the backward",
    "scale": "Time of a token over tokens, experts and skew",
}
_TABLES = {"layer": _layer, "model": _plain, "decode": _decode, "memory": _memory, "scale": _plain}
