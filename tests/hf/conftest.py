"""Writes the table of Mixture-of-Experts families, docs/families.md, from what a run of the tests has shown.

``pytest tests/hf/test_adopt_every_family.py --write-families docs/families.md`` (``make pages``). A cell holds only if
every test behind it ran on the family and passed; the last column is the table of export, which has tests of its own.
"""

from __future__ import annotations

import pytest

from tests import pages

HEAD = """\
# Families

Every Mixture-of-Experts family of transformers {version}, and what Moesaic does with it; this page is written by the
run of the tests (`make pages`), on a tiny random model of each family. What the columns mean:

- **adopt**: [`mz.adopt`](adopt.md) gives outputs and gradients within 1e-5 of the model's own code (relative to the
  larger of 1 and the largest entry, float32), shares the weights, saves as the family, generates the same tokens, and
  can be undone.
- **record**: [`mz.record`](trace.md) holds the experts and weights that the model itself handed to its experts, padding
  left out, within 1e-6.
- **balance**: a balance loss reaches the router's weights in every layer whose choices are learned.
- **export**: a model made with `mz.sparsify` can [become this family](convert.md), with logits within 1e-5.

How a router chooses is its `RouterSpec`, read off the loaded model and compared with its code by numbers. *Score*: what
turns logits into scores. *Best*: what the best K are taken of, and whether a model may limit a token to groups.
*Weights*: what the chosen scores are divided and multiplied by.

"""

COLUMNS = ("adopt", "record", "balance", "export")


def pytest_addoption(parser: pytest.Parser) -> None:
    pages.add_option(parser, "families", "families")


@pytest.fixture(autouse=True)
def _note_family(request: pytest.FixtureRequest, record_property) -> None:
    """Let the report of each test say which columns of which family it is evidence for."""
    mark = request.node.get_closest_marker("family_column")
    if mark is not None:
        family = request.node.callspec.params[mark.args[1]].partition("/")[0]
        for column in mark.args[0].split(", "):
            record_property("families", [family, column])


def pytest_configure(config: pytest.Config) -> None:
    pages.write_if_asked(config, "families", table)


def table(held: pages.Held) -> str:
    """The page: a line for each family."""
    import transformers

    from moesaic.convert.native.homes import HOMES
    from tests.hf.families import FAMILIES

    # tests/convert/native exports to each of these, and fails if it leaves one out.
    exported = {home.family for home in HOMES}
    lines = [
        "| family | score | best | weights | kernel | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for family in FAMILIES:
        marks = [{True: "✓", False: "✗", None: "–"}[held.get((family, column))] for column in COLUMNS[:-1]]
        marks.append("✓" if family in exported else "–")
        lines.append(f"| `{family}` | " + " | ".join([*described(family), *marks]) + " |")
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n\n" + FOOT


FOOT = """\
*–* under balance: nothing that is learned chooses (ViTPose), or transformers does not run the experts that the router
chose (NLLB-MoE: its mask of first choices is taken for expert numbers, so experts 0 and 1 run; a trace shows that).
*–* under export: no recipe of Moesaic on a backbone that transformers has dense computes what the family does.

Kernels: *fused*, one operation with a hand-written backward; *grouped*, rows sorted by expert, for gates, biases and
norms that are the family's own; *modules*, each expert a module of its own. `mz.hf.kernel_reports(model)` tells for a
loaded model.
"""


def described(family: str) -> list[str]:
    """Score, choice, weights and kernel in words, read off an adopted tiny model."""
    import moesaic as mz
    from tests.hf.families import VARIANTS, tiny

    model = mz.adopt(tiny(family).model)
    spec = [layer.spec for layer in mz.hf.moe_layers(model).values()][-1]
    if spec.policy == "given":
        return ["none", "told by data set", "1", "modules"]
    best = "score" if spec.select == "score" else "logit"
    best += " + bias" * spec.selection_bias + ", groups" * (f"{family}/groups" in VARIANTS)
    best = {"table": "by token id", "sparsemixer": "best, then best of the rest"}.get(spec.policy, best)
    weights = {None: "score", "sum": "score / Σ", "clamp": "score / max(Σ, ε)", "norm": "score / p-norm"}[
        spec.normalize
    ]
    weights = "own softmax each" if spec.policy == "sparsemixer" else weights
    weights = "with shared experts' gates / Σ" if spec.shared_gates else weights
    weights += " × scale" * (spec.scale != 1) + " × factor of expert" * spec.expert_scale
    weights += " × learned factor" * spec.global_scale
    weights += ", on the input" * (spec.weigh == "input") + ", up to a capacity" * spec.capacity
    if spec.null_experts:
        weights += {"identity": "; some experts give the token back", "skip": "; one is a skip"}[spec.null]
    reports = set(mz.hf.kernel_reports(model).values())
    kernel = "modules" if not reports else "grouped" if any("autograd" in one for one in reports) else "fused"
    kernel = "its own" if family == "doge" else kernel
    return [spec.score.replace("sqrt_softplus", "√softplus"), best, weights, kernel]
