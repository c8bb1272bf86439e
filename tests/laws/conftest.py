"""Writes the table of recipes and laws, docs/laws.md, from what a run of the tests has shown.

``pytest tests/laws --write-laws docs/laws.md`` (``make pages``). One cell is one recipe under one law: it holds only if
every test of that law ran on the recipe and passed.
"""

from __future__ import annotations

import pytest

from moesaic import recipes
from tests import pages
from tests.laws.law import LAWS, why_not

HEAD = """\
# Recipes and laws

Each law is a fault that a well-known system shipped, turned round. Every recipe is tried on every law that it can be
tried on; this page is written by the run of those tests (`make pages`). ✓: holds. A letter: does not apply, for the
reason below the table. The tests are in `tests/laws`. What every recipe is compared with besides, in rows, weights,
outputs, losses and every gradient, are plain float64 loops (`tests/oracle`).

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    pages.add_option(parser, "laws", "recipes and laws")


@pytest.fixture(autouse=True)
def _note_law(request: pytest.FixtureRequest, record_property) -> None:
    """Let the report of each test say which law it tried on which recipe."""
    mark = request.node.get_closest_marker("law")
    if mark is not None:
        record_property("laws", [mark.args[0], request.node.callspec.params["setting"].recipe_name])


def pytest_configure(config: pytest.Config) -> None:
    pages.write_if_asked(config, "laws", table)


def table(held: pages.Held) -> str:
    """The page: a line for each recipe, a column for each law."""
    letters: dict[str, str] = {}
    lines = [
        "| recipe | " + " | ".join(str(law) for law in LAWS) + " |",
        "|---|" + "---|" * len(LAWS),
    ]
    for name in recipes.names():
        cells = []
        for law in LAWS:
            reason = why_not(law, recipes.get(name))
            if reason:
                letters.setdefault(reason, chr(ord("a") + len(letters)))
                cells.append(letters[reason])
            else:
                cells.append({True: "✓", False: "✗", None: "not run"}[held.get((law, name))])
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    laws = [f"- **{law}**: {text}." for law, text in LAWS.items()]
    reasons = [f"- **{letter}**: {reason}." for reason, letter in letters.items()]
    return (
        HEAD
        + "\n".join(lines)
        + "\n\n## The laws\n\n"
        + "\n".join(laws)
        + "\n\n## Where a law does not apply\n\n"
        + ("\n".join(reasons) + "\n")
    )
